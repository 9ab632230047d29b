# Every target sets up what it needs in .venv: python3, make and a package registry are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The interpreter for GPU work: override it where torch is installed already.
GPU_PYTHON ?= $(BIN)/python

.PHONY: help setup demo test check format test-gpu bench bench-cpu eval-small clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## install kvzip and its development tools in .venv

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,eval]'
	@touch $@

demo: $(READY)  ## zip the bundled document with the bundled model and ask about it
	$(BIN)/kvzip demo

test: $(READY)  ## run the tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

check: $(READY)  ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(READY))  ## run the tests that need a CUDA device
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -m gpu

# BENCH takes options of `kvzip bench`, such as BENCH='--quick -o results.jsonl'.
bench: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(READY))  ## run the benchmarks that need a CUDA device
	PYTHONPATH=src $(GPU_PYTHON) -m kvzip bench $(BENCH)

bench-cpu: $(READY)  ## run the benchmarks of the bundled model on a CPU
	$(BIN)/python benchmarks/whole_flow.py
	$(BIN)/python benchmarks/eviction_quality.py

EVAL_SMALL := build/eval-small

eval-small: $(READY)  ## evaluate the bundled model on two CPU cores, in under five minutes
	rm -rf $(EVAL_SMALL)
	$(BIN)/kvzip eval --device cpu --data 'synthetic_*' --num 2 --lengths 512,2048 \
		--ratios 1.0,0.5,0.3,0.1,0.05 --output $(EVAL_SMALL)

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
