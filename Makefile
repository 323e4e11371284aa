# `make demo` names the sounds in recordings; `make test` runs the tests. Each sets up what it needs on its first run.

PYTHON ?= python3
AUDIO ?= examples/audio
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

# Of other sounds: make demo AUDIO="dog.wav recordings/"
demo: $(BIN)/transformers-cat
	$(BIN)/transformers-cat classify $(AUDIO) --top 3

# One process for each core, up to four, with one thread each. A file's tests stay together, for what they share.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Both are made anew when what the package depends on changes. To classify takes less than to train and to test.
$(BIN)/transformers-cat: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed: $(BIN)/transformers-cat
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
