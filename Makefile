# Two commands on a fresh machine with Python 3.10 or later: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check docs clean help

help:  ## this list
	@awk -F':.*##' '/^[a-z]+:.*##/ {printf "  make %-8s%s\n", $$1, $$2}' Makefile

demo: $(VENV)/demo-ready  ## digits: train a network, give it exits, calibrate, time it (about a minute)
	$(BIN)/python -m examples.digits.run

test: $(VENV)/dev-ready  ## every check and every test
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/dev-ready  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/dev-ready  ## the pages of docs/ as HTML, in build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees -c docs . build/docs

clean:  ## remove the virtual environment
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo-ready: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	touch $@

$(VENV)/dev-ready: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps torchvision==0.28.0 timm  # for tests of the zoos; random weights
	touch $@ $(VENV)/demo-ready
