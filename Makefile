# `make demo` trains a small model on real sounds and lets it name others; `make test` runs the tests.
# Each sets up what it needs on its first run.

PYTHON ?= python3
DATA ?= ../shared/data/esc10
EPOCHS ?= 8
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo data test lint clean

demo: data $(VENV)/installed
	$(BIN)/python examples/demo.py --data "$(DATA)" --epochs $(EPOCHS)

# Asked first: nobody should wait for an installation to read that there is nothing to train on.
data:
	@test -d "$(DATA)" || { echo "No data folder $(DATA). Pass one in the layout of ESC-50 or UrbanSound8K," \
	  "or with train/<class>/ and test/<class>/ sub-folders: make demo DATA=/path/to/recordings"; exit 2; }

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
