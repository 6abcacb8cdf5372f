# `make demo` and `make test` do all the set-up on a Linux machine with only Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= .demo

.DEFAULT_GOAL := help
unexport PYTHONDONTWRITEBYTECODE  # set in many images: each of a hundred processes of the tests would compile the project again
.PHONY: help setup demo check test lint docs bench gpu mutate clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make the virtual environment in .venv (about 7 GB; once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("MoVA on Ray needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray,train,deepspeed,tensorboard,serve,s3,demo,dev]'
	@touch $@

demo: $(STAMP)  ## the whole path on real pictures: precompute, train, route, answer, report.html
	$(BIN)/mova demo --folder $(DEMO)

check: $(STAMP)  ## the tests that need no Ray, on two processes (under two minutes)
	$(BIN)/python -m pytest -m "not ray and not slow and not gpu" --numprocesses 2

test: check  ## all tests but those that need a GPU
	$(BIN)/python -m pytest -m "(ray or slow) and not gpu" --numprocesses 2 --dist loadfile

lint: $(STAMP)  ## ruff and mypy on the whole tree, and the documents build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

docs: $(STAMP)  ## the documents with their API reference, as a site in .site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(STAMP)  ## the benchmarks, ratios side by side
	@for script in adapter experts model placement precompute store training; do echo "== benchmarks/$$script.py"; $(BIN)/python benchmarks/$$script.py || exit 1; done

gpu:  ## the GPU tests and benchmarks, in parts of under nine minutes; uses PYTHON, which needs torch and no Ray
	$(PYTHON) benchmarks/gpu.py

mutate: $(STAMP)  ## mutation tests of the modules that decide numbers; ONLY='mova_core.samplers*' for one (minutes each)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutate]'
	rm -rf mutants
	OMP_NUM_THREADS=1 nice -n 15 $(BIN)/mutmut run --max-children 1 $(if $(ONLY),'$(ONLY)')
	$(BIN)/mutmut results | awk '!/: not checked$$/'

clean:  ## remove what was built here, the virtual environment too
	rm -rf $(VENV) $(DEMO) .site build mutants *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
