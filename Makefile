# Every target sets up what it needs: one virtual environment, .venv, rebuilt only when its inputs change.
# `make` prints the targets.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all gpu lint types format clean

help: ## print the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

# The stamp is written last, so that an interrupted set-up starts again. torch comes first and alone: the range that
# the package asks for is then satisfied, and nothing else is resolved beside the largest download.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mugraph needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	@rm -f $(READY)
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

setup: $(READY) ## set up .venv

demo: $(READY) ## optimise the four example programs, check them, write their kernels and pictures
	$(PY) -m examples.demo

test: lint types ## lint, check types and run the tests
	$(PY) -m pytest -q -n 2 --dist worksteal

test-all: $(READY) ## run the full matrices; resumable, results in tests/full_results.json
	$(PY) -m tests.full

gpu: $(READY) ## run the benchmarks that need a GPU
	$(PY) -m benchmarks.gpu

lint: $(READY) ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY) ## check types
	$(PY) -m mypy

format: $(READY) ## format the sources and apply safe fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove caches and outputs; keeps .venv
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
