# `make demo` and `make test` set up everything they need; Python 3.11 must be installed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-slow test-mutations lint format docs results-shapes benchmark clean

venv: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: venv
	$(BIN)/python -m gdmd_lightning demo

test: venv
	$(BIN)/python -m pytest -q

test-slow: venv
	$(BIN)/python -m pytest -q -m slow

# Check that the tests notice one-line errors. Takes about an hour on one core, so CI does not run it.
test-mutations: venv
	$(BIN)/python tests/mutations/run.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Check the documentation's links, commands and examples; docs/ itself is plain Markdown.
docs: venv
	$(BIN)/python -m pytest -q tests/test_docs.py

results-shapes: venv
	$(BIN)/python -m gdmd_lightning compare --config compare_shapes.yaml

benchmark: venv
	$(BIN)/python benchmarks/demo.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
