# The two commands of this project: `make demo` and `make test`. Both set everything up first.
# `make check` runs only the fast tests; `make test-cluster` runs those on a real SLURM cluster and real ssh hosts.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo check test suite test-cluster fuzz lint style types format install develop clean

demo: install
	@$(BIN)/python -m fusiontree demo

# empty means unset: without cached bytecode, each process that a test starts would compile the project again
export PYTHONDONTWRITEBYTECODE :=

# types are checked while the tests' workers start
check: style
	@$(MAKE) --no-print-directory -j 2 types suite SELECTION="-m 'not slow'"

test: style
	@$(MAKE) --no-print-directory -j 2 types suite
	@echo 'Not run: the tests on a real SLURM cluster and real ssh hosts (make test-cluster).'

# loadfile keeps a file's fixtures in one worker; tests/conftest.py orders the files, the longest first
suite: develop
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(SELECTION)

# needs root and Debian's slurm-wlm, munge, pdsh, openssh-server and iproute2; runs in namespaces of its own
test-cluster: develop
	FUSIONTREE_CLUSTER=1 $(BIN)/python -m pytest -m cluster -v -n 2 --dist worksteal tests/test_cluster_*.py

# mutated datasets and records, FUZZ_SECONDS for each test; a failure names its case
FUZZ_SECONDS ?= 600
fuzz: develop
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -v -n 2 --dist worksteal tests/test_fuzz_*.py

lint: style types

style: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: develop
	$(BIN)/mypy

format: develop
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed
develop: $(VENV)/.developed

# no compiled DeepSpeed operators are needed; the constraints also apply to isolated builds
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "FusionTree needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[parquet,wandb]'
	@touch $@

# plus the packages for tests, lint and types
$(VENV)/.developed: $(VENV)/.installed
	$(PIP) -e '.[dev,harness,parquet,wandb]'
	@touch $@

clean:
	rm -rf $(VENV) data/demo runs/demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@if [ -d data ]; then rmdir --ignore-fail-on-non-empty data; fi; if [ -d runs ]; then rmdir --ignore-fail-on-non-empty runs; fi
