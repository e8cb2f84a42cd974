# `make` alone lists the targets. Everything runs in .venv, which `make venv` fills once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYPROJECTS := pyproject.toml packages/inl-core/pyproject.toml packages/complexity-lm/pyproject.toml packages/complexity-dit/pyproject.toml

# where `make demo` writes: make demo OUT=runs/another
OUT = runs/demo
# where `make demo-lm` writes
OUT_LM = runs/demo-lm
# parallel test processes: make test JOBS=4
JOBS = 2

# parts of `make gpu`: make gpu PART=tests, ops, models or train; all four by default
PART = tests ops models train

# Offline tests and one OpenMP thread a process: more threads than idle cores make torch slower.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo demo-lm test test-slow lint docs clean kernels bench gpu

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## create .venv with the three packages and their tools

$(STAMP): constraints.txt $(PYPROJECTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make venv PYTHON=python3.12" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the three packages into $(VENV) (torch alone is several GB; usually 2 to 5 minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1" # knows --group
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group docs --group release \
		-e "packages/inl-core[dev]" -e "packages/complexity-lm[dev]" -e "packages/complexity-dit[dev]"
	@touch $@
	@echo "$(VENV) is ready."

demo: venv ## train a small model on the art set, sample from it, evaluate it
	$(BIN)/complexity-dit demo --out $(OUT)

demo-lm: venv ## train a small language model on the standard library, generate, compare with gzip
	$(BIN)/complexity-lm demo --out $(OUT_LM)

test: venv lint ## lint, then every test that is not slow
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" -n $(JOBS)

test-slow: venv ## the tests of more than 20 s each (COMPLEXITY_FUZZ_SECONDS=300 for a long fuzz)
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

lint: venv ## ruff (rules and format) and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: venv ## build the documentation strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

kernels: venv ## compile every Triton kernel, no GPU needed; table to docs/results/tables/kernels.md
	$(BIN)/python -m benchmarks.speed.kernel_resources

bench: venv ## measure this machine: rows to benchmarks/results.csv, tables to docs/results/tables
	$(BIN)/python -m benchmarks.speed.bench_ops --out benchmarks/results.csv
	$(BIN)/python -m benchmarks.speed.bench_tax --out benchmarks/results.csv
	$(BIN)/python -m benchmarks.pages.tables

# No venv: the machine with the GPU may have a bare python3 with torch and triton, and no network.
gpu: export PYTHONPATH := packages/inl-core/src:packages/complexity-dit/src:$(PYTHONPATH)
gpu: ## on a GPU: test kernels against the definition, measure them and compiled training steps
	@for part in $(PART); do $(PYTHON) -m benchmarks.speed.gpu $$part || exit $$?; done

clean: ## remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist site packages/*/build packages/*/dist .pytest_cache .ruff_cache .hypothesis
	find packages tests -name __pycache__ -type d -prune -exec rm -rf {} +
