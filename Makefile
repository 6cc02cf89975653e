# Every target sets up what it needs by itself, on a machine with Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run tests: more than cores, for many tests wait.
WORKERS ?= 3
# Which tests, as pytest's -m says it; empty for all.
TESTS ?= not slow

.PHONY: demo test slow lint bench wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/base ## a real search on real text: minutes on two cores; again: resumes
	$(BIN)/workbench run studies/quickstart.toml

test: $(VENV)/dev ## everything but what needs CUDA or is marked slow
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "$(TESTS)"

slow: ## tests of ten seconds and more: exports, wheels, whole studies
	$(MAKE) test TESTS=slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev ## the tables that the README quotes
	$(BIN)/python benchmarks/cpu_scans.py --check
	$(BIN)/python benchmarks/startup.py --check

# The descriptions are of this tree's sources, wherever VENV's workbench comes from.
wheel: $(VENV)/dev ## dist/: a wheel that holds the descriptions of the presets
	PYTHONPATH="$(CURDIR):$(CURDIR)/plugins" $(BIN)/python -m workbench.description_making
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Without descriptions made before, all works as well, and a preset's first takes seconds.
$(VENV)/base: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	-$(BIN)/python -m workbench.description_making
	touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist workbench/descriptions.zip *.egg-info .pytest_cache .mypy_cache .ruff_cache
