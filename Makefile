# `make demo` and `make test` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process, as many processes as cores; the tests of a file stay together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: help demo test check format clean

help:
	@echo "make demo    set up, run the main job on the demo model, print the table, write report.html"
	@echo "make test    set up, then every test that needs no GPU"
	@echo "make check   format, lint, types, fast tests"

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Equipoise needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/equipoise trace demo --task mmlu --data bundled --shots 5 -o build/demo.trace --force
	$(BIN)/equipoise stats build/demo.trace
	$(BIN)/equipoise report build/demo.trace -o report.html --force

test: $(VENV)/.ready
	$(PYTEST) -m "not gpu"

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -q -m "not gpu and not slow and not distributed"

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache report.html
