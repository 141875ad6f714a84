# `make` alone prints what there is. The README's two commands are `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
UV := $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt
# What no worker imports. The rest is compiled once, not by each process that starts: a Flink worker is up in half the time.
UNUSED := /(torch|triton|nvidia|sympy|onnxscript|scipy|sklearn|tests?)/
.DEFAULT_GOAL := help
.NOTPARALLEL: # what the system lacks comes first
.PHONY: help setup setup-dev bench-setup system demo test test-all check format bench chaos train-demo clean

help: ## print this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

system: ## install Java and Maven where this user may, else say how
	@PYTHON="$(PYTHON)" sh scripts/system.sh

.venv/.made:
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "flink-llm needs Python 3.11 or 3.12: install one, then run make PYTHON=/path/to/it"; exit 1; }
	@"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check "uv>=0.9"
	@touch $@

.venv/.light: .venv/.made pyproject.toml constraints.txt $(wildcard flink_llm/engine/kernels/*)
	@echo "installing flink-llm into .venv ..."
	@$(UV) -e '.[cpu]'
	@touch $@

.venv/.dev: .venv/.light
	@echo "installing what tests, training and export need ..."
	@$(UV) -e '.[cpu,dev,export]'
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m compileall -q -j 0 -x '$(UNUSED)' .venv/lib/python3.*/site-packages || true
	@touch $@

setup: system .venv/.light ## a light .venv: what running jobs needs, without torch

setup-dev: system .venv/.dev ## and what tests, training and export need

bench-setup: setup-dev ## and what the benchmarks' peers need (llama.cpp is compiled: several minutes)
	@$(UV) -c benchmarks/constraints.txt -e '.[cpu,dev,export,bench]'
	@CMAKE_ARGS="$$($(BIN)/python -m benchmarks.peers.flags)" $(UV) -c benchmarks/constraints.txt llama-cpp-python || \
	  echo "llama.cpp could not be built: the benchmarks say null where it is compared"
	@$(BIN)/python -m benchmarks.prepare

demo: setup ## set everything up and run the main job, Kafka to Kafka, with the demo model
	@$(BIN)/flink-llm demo

test: check ## set everything up, lint, check types and run the tests
	@$(BIN)/python -m pytest -m "not slow"

test-all: setup-dev ## the tests, the slow ones included
	@$(BIN)/python -m pytest

check: setup-dev ## lint, types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@mkdir -p build/typed/flink_llm && ln -sfn "$(CURDIR)"/flink_llm/* "$(CURDIR)/udfs" "$(CURDIR)/jobs" build/typed/flink_llm/
	@cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml

format: setup-dev ## format the code
	@$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format .

bench: bench-setup ## every benchmark, coarse (docs/benchmarks.md has the full ones)
	@for name in operator overhead forms streaming stragglers burst capacity recovery poison outage demo_model constrained decoder serving encoder host_memory; do $(BIN)/python -m benchmarks.$$name --quick || exit 1; done

chaos: setup-dev ## kill, stop, cut and fill every part under load, the long form (some hours)
	@$(BIN)/python -m benchmarks.recovery
	@$(BIN)/python -m benchmarks.chaos

train-demo: setup-dev ## train the demo model anew, export and grade it (an hour and a half on two cores)
	@$(BIN)/python -m models.training.train --to build/first
	@$(BIN)/python -m models.training.train --to build/refusals --resume build/first --mix refusals --seed 8 --steps 1500 --rate 1.5e-3 --long-from 0
	@$(BIN)/python -m models.training.train --to build/varied --resume build/first --mix varied --seed 8 --steps 2000 --rate 2e-3 --long-from 0 --long-share 0.15
	@$(BIN)/python -m models.training.train --to build/support-chat --average build/refusals build/varied
	@$(BIN)/flink-llm export build/support-chat --to build/exported/support-chat --name support-chat --precision int8 --license Apache-2.0
	@$(BIN)/python -m benchmarks.demo_model --model build/exported/support-chat

clean: ## remove .venv and what was built; the local broker's data stays
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
