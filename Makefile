# Everything a person or CI does with this checkout. `make help` lists the targets.
# A fresh machine needs python3 >= 3.11, pip and make; the first target that needs more installs it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
# The stamp's name holds a checksum of what the environment is made from, so an unchanged one is never touched again.
READY := .venv/ready-$(shell cat requirements.lock pyproject.toml scripts/setup | cksum | cut -d' ' -f1)

# Two cores, tiny models: more threads only wait for each other. PASSIVE lets a waiting thread sleep.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
# Nothing here may reach for a model hub.
export HF_HUB_OFFLINE ?= 1
TEST_ENV := OMP_NUM_THREADS=1
# Tests of one file share their fixtures (a database, a trained model): loadfile keeps a file on one process.
PYTEST := $(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv and install requirements.lock and this project into it

$(READY):
	@PYTHON=$(PYTHON) scripts/setup $@

services: ## Install Redis and PostgreSQL by apt where they are missing (the tests start private ones)
	@scripts/services

test: setup services ## Run the tests (TESTS=tests/store for a part, ARGS="-k name" for pytest)
	$(PYTEST) -m "not long" $(ARGS) $(TESTS)

test-all: setup services ## Run the tests and those marked long
	$(PYTEST) $(ARGS) $(TESTS)

demo: setup ## Teach a small model facts, make it forget chemistry, print the table (TWIN=1 adds the retrained twin)
	$(BIN)/python examples/demo.py $(if $(filter 1,$(TWIN)),--twin) $(ARGS)

serve: setup ## Start the whole service on this machine, on loopback (seuf up)
	$(BIN)/seuf up $(ARGS)

lint: setup ## Check style (ruff), and that no tracked file names a machine path or a registry
	$(BIN)/ruff check .
	git ls-files -z | xargs -0 $(BIN)/python scripts/refuse_addresses.py

format: setup ## Apply ruff's safe fixes
	$(BIN)/ruff check --fix .

types: setup ## Check types (mypy, strict)
	$(BIN)/mypy

contract: setup ## Check which package may import which (import-linter)
	$(BIN)/lint-imports

check: lint types contract test ## All that CI checks

families: setup ## Run every model family's tests and write what passed into the families page
	PYTHONPATH=. $(TEST_ENV) $(BIN)/python scripts/families_table.py --run

benchmark-defaults: setup ## Measure the default method on every kind of reference model (docs/results/defaults.md; an hour)
	$(BIN)/python benchmarks/defaults.py $(ARGS)

benchmark-speed: setup ## Measure speed and memory at true scale (docs/results/performance.md; over an hour; ARGS="--only steps")
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m benchmarks.speed $(ARGS)
	$(BIN)/python scripts/results_table.py

chaos: setup services ## 100 jobs under 160 kills: nothing lost, nothing doubled (docs/results/chaos.md; ARGS="--jobs 20 --seed 3")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.chaos $(ARGS)

benchmark-service: setup services ## Measure what the service costs (docs/results/service.md; half an hour; ARGS="--only latency"; needs nginx)
	$(BIN)/python -m benchmarks.service $(ARGS)

docs: setup ## Write what is made from the code and the figures: pages of method, families and speed, the README's tables
	$(BIN)/python scripts/method_reference.py
	PYTHONPATH=. $(BIN)/python scripts/settings_reference.py
	$(BIN)/python scripts/families_table.py
	$(BIN)/python -m benchmarks.page
	$(BIN)/python scripts/results_table.py

lock: ## Make requirements.lock again from pyproject.toml, in a new environment
	PYTHON=$(PYTHON) scripts/lock

hooks: setup ## Run the checks of .pre-commit-config.yaml before every commit
	$(BIN)/pre-commit install

clean: ## Remove .venv, caches and build/
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.PHONY: help setup services test test-all demo serve lint format types contract check families benchmark-defaults benchmark-speed benchmark-service chaos docs lock hooks clean
