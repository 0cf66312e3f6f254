# `make demo` shows it, `make test` proves it, `make check` reads it, `make bench` times it.
# Each sets up what it needs in .venv, once, from nothing but Python 3.11, make and a package index.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

.PHONY: help demo test check format bench clean
help:
	@sed -n 's/^# //p' Makefile | head -2

demo: $(VENV)/.runtime
	$(BIN)/snapshot-proxy demo $(if $(ONCE),--once)

test: $(VENV)/.dev
	$(BIN)/coverage erase
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),--cov --cov-report=)
	$(if $(ARGS),,$(BIN)/coverage report --format=total --include='proxy/core/*' --fail-under=100 >/dev/null)
	$(if $(ARGS),,$(BIN)/coverage report --fail-under=90)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python deploy/validate.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "snapshot-proxy needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[embedded,fast]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.runtime
