# Set-up, demo, tests. Everything lands in .venv (control, training, quantization), .venv-serve (vLLM) and .mansard (state).
SHELL := /bin/bash
PYTHON ?= python3.11
MAIN := .venv/bin/python
SERVE := .venv-serve/bin/python

.PHONY: setup demo check test lint types bench-surgery bench-router bench-loss fuzz fuzz-router bench-gate bench-store bench-efficacy bench-rollout bench-rollback bench-canary chaos clean up down stage-versions

setup: .venv/.ready .venv-serve/.ready

.venv/.ready: infra/constraints/main.txt infra/setup-environment.sh pyproject.toml
	@PYTHON=$(PYTHON) bash infra/setup-environment.sh main

.venv-serve/.ready: infra/constraints/serve-cpu.txt infra/constraints/serve-cuda.txt infra/setup-environment.sh infra/vllm-plugin/pyproject.toml .venv/.ready
	@PYTHON=$(PYTHON) bash infra/setup-environment.sh serve

demo: setup
	@$(MAIN) -m flows.demo

.PHONY: demo-carry-on bench-carry-on
demo-carry-on: setup
	@$(MAIN) -m flows.demo_carry_on

up down: setup
	@.venv/bin/mansard $@

lint:
	@.venv/bin/ruff check .

types:
	@.venv/bin/mypy

check: setup lint types
	@$(MAIN) -m pytest -q -m "not slow and not engine"

# Two workers, a file to each; tests/conftest.py puts the long ones first.
test: setup lint types
	@$(MAIN) -m pytest -v -n 2 --dist loadfile --no-loadscope-reorder --durations=25

stage-versions: setup
	@$(MAIN) tests/mansard/stage_versions.py

bench-surgery: setup
	@$(MAIN) tests/benchmarks/bench_surgery.py

bench-efficacy: setup
	@$(MAIN) tests/benchmarks/efficacy.py --small

bench-store: setup
	@$(MAIN) tests/benchmarks/bench_store.py

fuzz: setup
	@$(MAIN) tests/benchmarks/fuzz_safetensors.py

bench-gate: setup
	@$(MAIN) tests/benchmarks/bench_gate.py

bench-rollback: setup
	@$(MAIN) tests/benchmarks/bench_rollback.py

.PHONY: bench-outage
bench-outage: setup
	@$(MAIN) tests/benchmarks/bench_outage.py

bench-canary: setup
	@$(MAIN) tests/benchmarks/bench_canary.py

bench-rollout: setup
	@$(MAIN) tests/benchmarks/bench_rollout.py

.venv-litellm/.ready: infra/constraints/litellm.txt infra/setup-environment.sh
	@PYTHON=$(PYTHON) bash infra/setup-environment.sh litellm

bench-router: setup .venv-litellm/.ready
	@$(MAIN) tests/benchmarks/bench_router.py

fuzz-router: setup
	@$(MAIN) tests/mansard/serving/router/test_fuzz.py

bench-loss: setup
	@$(MAIN) tests/benchmarks/bench_loss.py

chaos: setup
	@$(MAIN) -m tests.chaos.campaign

bench-carry-on: setup
	@$(MAIN) tests/benchmarks/bench_carry_on.py

.PHONY: bench-carry-on-taps
bench-carry-on-taps: setup
	@$(MAIN) tests/benchmarks/carry_on_taps.py

.PHONY: bench-carry-on-learning bench-carry-on-reasoning
bench-carry-on-learning: setup
	@$(MAIN) tests/benchmarks/carry_on_learning.py

bench-carry-on-reasoning: setup
	@$(MAIN) tests/benchmarks/carry_on_reasoning.py

# ms-swift's tuners beside .venv; where the package cannot be had, the benchmark says so and goes on.
.swift/.ready: infra/constraints/swift.txt
	@$(MAIN) -m pip install --quiet --no-deps --target .swift -r $< && touch $@

.PHONY: bench-training bench-training-gpu
bench-training: setup
	-@$(MAKE) --no-print-directory .swift/.ready
	@$(MAIN) tests/benchmarks/bench_training.py

bench-training-gpu: setup
	@$(MAIN) tests/benchmarks/bench_training_gpu.py

.PHONY: bench-adapters
bench-adapters: setup
	@$(MAIN) tests/benchmarks/bench_adapters.py

.PHONY: bench-branch-serving-gpu bench-capture
bench-branch-serving-gpu: setup
	@$(MAIN) tests/benchmarks/bench_branch_serving_gpu.py --python $(SERVE)

bench-capture: setup
	@$(MAIN) tests/benchmarks/bench_capture.py --python $(SERVE)

.PHONY: bench-serving-gpu
bench-serving-gpu: setup
	@$(MAIN) tests/benchmarks/bench_serving_gpu.py

.PHONY: bench-two-gpus
bench-two-gpus: setup
	@$(MAIN) tests/benchmarks/bench_two_gpus.py

.PHONY: bench-average
bench-average: setup
	@$(MAIN) tests/benchmarks/bench_average.py

clean:
	@test ! -x .venv/bin/mansard || .venv/bin/mansard down
	rm -rf .venv .venv-serve .mansard demo-summary.json
