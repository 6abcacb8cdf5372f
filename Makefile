# `make demo` and `make test` do all the set-up on a machine with only Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= .demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make the virtual environment in .venv (about 7 GB; once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("MoVA on Ray needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray,train,serve,s3,demo,dev]'
	@touch $@

demo: $(STAMP)  ## the whole path on real pictures: precompute, train, route, answer, report.html
	$(BIN)/mova demo --folder $(DEMO)

test: $(STAMP)  ## all tests but those that need a GPU
	$(BIN)/python -m pytest -m "not gpu"

lint: $(STAMP)  ## ruff and mypy on the whole tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## the benchmarks, ratios side by side
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## remove what was built here, the virtual environment too
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
