# `make demo` shows it, `make test` proves it, `make check` reads it, `make bench` times it.
# Each sets up what it needs in .venv, once, from nothing but Python 3.11, make and a package index.

# The first Python that is new enough; `make PYTHON=...` names another.
PYTHON ?= $(shell for each in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
# Tests import their files in several processes, and start the program hundreds of times: from compiled files.
export PYTHONDONTWRITEBYTECODE :=
# A file's tests run in one process: they share servers. The slowest files come first (tests/conftest.py).
PARALLEL := --dist loadfile --no-loadscope-reorder -n 3
# Tests of services wait half of their time: four processes keep two cores busy. Several at once are a load that some
# bounds of time were not made for: what fails has to pass alone.
passes = $(BIN)/python -m pytest $(PARALLEL) $(1) \
	|| $(BIN)/python -m pytest --last-failed --last-failed-no-failures none $(1) -n 0

.PHONY: help demo quick test test-long simulate check lengths format bench screenshot clean
.DELETE_ON_ERROR:

help:
	@sed -n "s/^# //p" Makefile | head -2

demo: $(VENV)/.runtime
	$(BIN)/snapshot-proxy demo $(if $(ONCE),--once)

# The core, and everything else that starts no process and opens no socket: the answer in half a minute.
quick: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) --quick $(ARGS)

# All tests but the long ones; or what ARGS says: make test ARGS="tests/core -x". Coverage is of the parts by their own
# tests. Those of whole services, worlds and deployments come on top, uncounted: counted they would take twice as long.
UNCOUNTED := $(addprefix tests/,deploy e2e simulation test_day.py test_demo.py test_documents.py test_outage_of_minutes.py)
test: $(VENV)/.dev
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/coverage erase
	$(call passes,-m "not long" $(UNCOUNTED:%=--ignore=%) --cov --cov-append --cov-report=)
	$(call passes,-n 4 -m "not long" $(UNCOUNTED))
	$(BIN)/coverage report --fail-under=90
	@$(BIN)/coverage report --include='proxy/core/*' --format=total --fail-under=100 >/dev/null \
	|| { echo "proxy/core has to be covered to 100 %: see above for what is missing"; exit 1; }
endif

# What `make test` leaves out. Then all tests of whole services again, without the memory in front of Redis: what callers
# see is the same.
test-long: $(VENV)/.dev
	$(call passes,-n 4 -m long)
	$(call passes,-m hypothesis --hypothesis-profile=long)
	export TEST_MEMORY=off; $(call passes,-n 4 -m "not long" tests/e2e)

# The program in simulated worlds: SEED=197 tells the story of one, N=100000 runs many on all cores (FROM= the first,
# WORKERS= in so many processes).
given = $(if $(filter undefined,$(origin $(1))),,--$(2)='$($(1))')
simulate: $(VENV)/.dev
	PYTHONPATH=.:tests $(BIN)/python -m simulation $(call given,SEED,seed) $(call given,N,n) $(call given,FROM,from) \
	  $(call given,WORKERS,workers)

check: $(VENV)/.dev lengths
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python deploy/validate.py

# One idea a file: no product file may be longer.
MOST_LINES := 350

lengths:
	@find proxy -name '*.py' -exec wc -l {} + | awk '$$2 != "total" && $$1 > $(MOST_LINES) \
	{ print $$2 ": " $$1 " lines, where $(MOST_LINES) are allowed: split it by its ideas"; failed = 1 } \
	END { exit failed }'

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# All figures; or what ARGS says of those beside other servers: make bench ARGS="--only misses --profile".
bench: $(VENV)/.dev
ifdef ARGS
	$(BIN)/python -m benchmarks $(ARGS)
else
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.bursts
	$(BIN)/python -m benchmarks.day
	$(BIN)/python -m benchmarks.documents
endif

# The picture of the status page in README, anew.
screenshot: $(VENV)/.dev
	SCREENSHOT=1 $(BIN)/python -m pytest tests/e2e/test_page.py -k screenshot

clean:
	rm -rf $(VENV) .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "snapshot-proxy needs Python 3.11 or newer; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[embedded,fast]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.runtime
