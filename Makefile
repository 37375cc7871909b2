# The commands of this project. Each sets up what it needs in .venv; start with `make demo`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2
TESTS ?= tests
NVCC ?= nvcc
RESULTS ?= bench/results/$(shell date +%F)-$(shell uname -m)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIN := -c $(VENV)/torch.txt
NATIVE := setup.py pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

# The shipped model is read from this folder; nothing here may wait for a network.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test timm-check lint compile-checks bench docs-check setup clean
.DELETE_ON_ERROR:

help: ## Say what each command does
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/.demo ## Stock against patched on a real model and a long real document (3 minutes)
	$(BIN)/python -m adaptive demo $(DEMO_FLAGS)

test: $(VENV)/.dev ## Run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(TESTS)

lint: $(VENV)/.dev ## Check style, types and C++ formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

timm-check: $(VENV)/.dev ## Run the tests of timm's models on timm itself
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/timm 'timm==1.0.31'
	PYTHONPATH=$(VENV)/timm OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_timm*.py

compile-checks: ## CUDA for sm_80 and sm_90a if nvcc is found; baseline objects without AVX
	.ci/compile-checks $(NVCC)

bench: $(VENV)/.dev ## Measure this machine and print the tables (15 minutes)
	$(BIN)/python -m bench.ops --json $(RESULTS)-ops.json
	$(BIN)/python -m bench.models --json $(RESULTS)-models.json

docs-check: $(VENV)/.dev ## Run every code block and follow every link of the documentation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_docs.py

setup: $(VENV)/.dev ## Make the development environment

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Torch comes first and is pinned from then on: other packages must not bring a different one.
$(VENV)/torch.txt:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.10 or newer," \
	  "or name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "adaptive needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; \
	  sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo "The headers of $(PYTHON) are missing: install python3-dev (Debian, Ubuntu) or" \
	  "python3-devel (Fedora)"; exit 1; }
	@set -- $${CXX:-g++}; command -v "$$1" >/dev/null || { \
	  echo "The C++ compiler '$$*' was not found: install g++ (Debian: apt install g++) or name" \
	  "yours: CXX=clang++ make $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "python -m venv failed: install python3-venv (Debian, Ubuntu)"; exit 1; }
	$(PIP) install '$(TORCH)'
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

$(VENV)/.demo: $(VENV)/torch.txt $(NATIVE)
	$(PIP) install -q $(PIN) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/torch.txt $(NATIVE)
	$(PIP) install -q $(PIN) -e '.[dev]'
	@touch $(VENV)/.demo $@
