# Every target prints what it does under `make help`. The first one that needs Python creates .venv;
# nothing is installed twice as long as pyproject.toml and constraints.txt stay as they are.

PYTHON ?= $(shell command -v python3.11 >/dev/null 2>&1 && python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   ?= $(if $(FULL),demo-full,demo)
CODE   := pretrain parallel data_pipeline cluster benchmarks
SHELL_FILES := .ci/run $(wildcard cluster/slurm/*.sbatch tests/cluster/*.sh benchmarks/*/*.sh)

# One thread a process: tests start several ranks, and threads that wait for each other are slower.
test test-slow test-cluster: export OMP_NUM_THREADS = 1
# Dozens of processes import the same modules: compile them once, whatever the environment says.
test test-slow test-cluster: export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-cluster lint format bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  (PYTHON=python3.12 chooses the interpreter, VENV=path the environment)"

install: $(STAMP)  ## Create .venv with everything that the other targets need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] < (3, 13); \
	  sys.exit(0 if ok else "Python 3.11 or 3.12 is needed, $(PYTHON) is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## From raw text to a figure in 5 minutes on 2 cores (FULL=1: 20 minutes; DEMO=folder)
	$(BIN)/epochal demo --dir $(DEMO) $(if $(FULL),--full)

# Each worker takes half of the tests in the order of the folders, later those that the other has
# left: the first one the unit tests, the second one, with a few of them, all that start ranks.
test: $(STAMP)  ## Fast tests on two cores: unit, end to end, several ranks; stops at the first failure
	$(BIN)/python -m pytest -x -n 2 --dist worksteal -m "not slow and not gpu and not cluster" \
	  tests/unit tests/end_to_end tests/distributed $(ARGS)

test-slow: $(STAMP)  ## Tests that take long, on an NVIDIA GPU also those of its kernels
	$(BIN)/python -m pytest -x -m "slow or gpu" --durations=10 tests $(ARGS)

test-cluster: $(STAMP)  ## A real SLURM on this machine (root; Debian packages slurm-wlm munge)
	$(BIN)/python -m pytest -x -m cluster tests/cluster $(ARGS)

lint: $(STAMP)  ## Style, types, unused code and dependencies, shell: as before every commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@sed -n 's/.*implementation: ClassVar.*:\([A-Za-z_]*\)"$$/\1/p' pretrain/config/*.py > $(VENV)/components.py
	$(BIN)/vulture $(CODE) $(VENV)/components.py
	$(BIN)/deptry .
	@if command -v shellcheck >/dev/null; then echo shellcheck $(SHELL_FILES); shellcheck $(SHELL_FILES); \
	  else echo "shellcheck is not installed; skipped (apt-get install shellcheck)"; fi

format: $(STAMP)  ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A benchmark answers 3 where this machine lacks what it measures (a GPU).
bench: $(STAMP)  ## Every benchmark in benchmarks/, one after the other
	@for file in $$(grep -l __main__ benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file; code=$$?; \
	  test $$code -eq 0 -o $$code -eq 3 || exit $$code; done

clean:  ## Remove caches and builds (not .venv, runs, data)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
