# Two commands on a bare Debian 12 with git, make and python3-venv: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PYTEST_ARGS ?=

.PHONY: demo test lint bench simulate simulate-mutants simulate-faults test-matrix lock wheel clean

demo: $(VENV)/.installed
	$(BIN)/indexer demo

# Three workers for two cores: a third of a worker's time is waiting. Long files come first, so that all end together.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/acceptance tests/simulation tests/integration tests/unit $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m tests.bench $(BENCH_ARGS)

# Seeded worlds against the oracle (docs/simulation.md): SEEDS of them, from FIRST on, or the one SEED again.
SEEDS ?= 200
FIRST ?= 1
simulate: $(VENV)/.installed
	$(BIN)/python -m tests.simulation.seeded $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --first $(FIRST)) $(SIMULATE_ARGS)

# Planted bugs: some seed must notice each.
simulate-mutants: $(VENV)/.installed
	$(BIN)/python -m tests.simulation.seeded $(SIMULATE_ARGS) --mutants $(MUTANTS)

# Each seeded fault alone, or FAULTS="'F01 stale head' …": the metric that docs/faults.md names must move.
simulate-faults: $(VENV)/.installed
	$(BIN)/python -m tests.simulation.seeded $(SIMULATE_ARGS) --faults $(FAULTS)

# Python 3.11, 3.12, 3.13 against PostgreSQL 15 to 18: interpreters that are missing are named, not silently skipped.
test-matrix:
	$(PYTHON) tests/matrix.py

lock:  ## re-resolve the hashed requirements (needs uv)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -q --extra demo pyproject.toml -o requirements/run.txt
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -q --extra demo --group dev pyproject.toml -o requirements/dev.txt

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation -w dist .

$(VENV)/.installed: pyproject.toml requirements/dev.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) dist build .state .mypy_cache .ruff_cache .pytest_cache
