# Two commands to know: `make demo` and `make test`. Needs only Python 3.11+, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FAST := tests/aai tests/test_configs.py tests/test_imports.py tests/test_layering.py tests/test_lint.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test fast lint fix coverage accept mutation foundation docs

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv with the pinned packages (again only when pyproject.toml or constraints.txt change)

# A Python without ensurepip (Debian's, for one) makes a venv without pip; the outer pip then puts one in.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || $(PYTHON) -m venv --without-pip --clear $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(BIN)/python install --quiet pip
	@echo 'installing what is pinned into $(VENV): about 7 GB, some minutes without a word'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## the whole chain on the toy world, ending with runs/demo/report.html
	$(BIN)/aai demo

# Two processes, each with whole files: they fill two cores. Hundreds of
# processes import the sources: they are compiled once, whatever the environment says.
test: setup ## all tests, lint and type checks among them (one file: make test ARGS=tests/aai/test_schema.py)
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist loadfile --durations=12 $(ARGS)

fast: setup ## lint, types and the tests without Ray, under a minute: for each change
	$(BIN)/pytest -n 2 --dist loadfile -m 'not accept and not gpu and not slow' $(FAST) $(ARGS)

lint: setup ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: setup ## let ruff mend and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: setup ## the tests with a report of the lines that none of them runs: htmlcov/index.html
	$(BIN)/pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered --cov-report=html $(ARGS)

# Losses are compared with open_clip's; without what it depends on, torchvision, which would change transformers' ways.
accept: setup ## the long evidence, one test per acceptance line
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps open_clip_torch==3.3.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt schemathesis==4.32.5
	$(BIN)/pytest -m accept $(ARGS)

# One thread a process: the tests' models are too small for more.
mutation: setup ## change the code in 360 places and count the changes that the tests catch (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation $(ARGS)

foundation: setup ## train the toy foundation models again from nothing (hours on a CPU)
	$(BIN)/aai foundation

docs: setup ## the pages of docs/ as a site, each link checked: runs/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
