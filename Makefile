# `make demo` names the sounds of a recording; `make test` runs the tests. Each sets up what it needs on its first run.

PYTHON ?= python3
AUDIO ?= examples/audio
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

# Another recording, a folder or several: make demo AUDIO="dog.wav recordings/"
demo: $(VENV)/installed
	$(BIN)/transformers-cat classify $(AUDIO) --top 3

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Made anew when what the package depends on changes.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
