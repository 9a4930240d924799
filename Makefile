# `make demo` and `make test` are all a newcomer needs: each makes .venv, installs what is missing,
# and runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Without an NVIDIA GPU one CPU build of torch is pinned; anything else pulls gigabytes of CUDA.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints/cpu.txt")

.PHONY: help install demo test test-all lint format bench bench-gpu clean

help:
	@echo "make demo      fine-tune the demo model to speak like Yoda (a few minutes)"
	@echo "make test      lint, types and the tests"
	@echo "make test-all  the slow tests as well"
	@echo "make bench     speed beside trl + peft on this machine"
	@echo "make bench-gpu the same on an NVIDIA GPU (docs/gpu.md)"
	@echo "make lint      ruff and mypy; make format mends the layout"

install: $(STAMP)

$(STAMP): pyproject.toml constraints/cpu.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"finegraft needs Python 3.11 or newer, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/finegraft quickstart

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Quick tests first, then parity, then end to end on the real small models; two files at a time, on
# one thread each, because most of an end-to-end test is one thread that loads libraries.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
QUICK := tests/test_architecture.py tests/unit tests/parity

test: lint
	$(PYTEST) -m "not slow and not cuda" $(QUICK)
	$(PYTEST) -m "not slow and not cuda" tests/e2e

test-all: lint
	$(PYTEST) $(QUICK)
	$(BIN)/python -m pytest -q tests/e2e

bench: install
	$(BIN)/python benchmarks/cpu_sft.py --quick

bench-gpu: install
	$(BIN)/python benchmarks/gpu_kernels.py
	$(BIN)/python benchmarks/gpu_sft.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
