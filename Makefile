# sessionstore's commands. Each sets up what it needs in .venv by itself; nothing is installed outside this directory.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BENCH_READY := .venv-bench/.ready
BUILD_REQUIREMENTS := hatchling
# The modules whose every branch is tested: they decide what is stored, what is sent to a model and what a caller catches.
EXACT := server/sessionstored/rules.py,server/sessionstored/leases.py,server/sessionstored/retention.py,server/sessionstored/trusted.py,client/sessionstore/history.py,client/sessionstore/errors.py,client/sessionstore/codec.py
PYTEST_COVERED := $(BIN)/pytest --cov --cov-report=

.PHONY: help run demo test test-all torture bench bench-quick check generate constraints clean

help: ## list these targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf 'make %-12s %s\n' "$$name" "$$text"; done

run: $(READY) ## serve on the embedded engine; ARGS="--data DIR --listen ADDR" passes flags on
	@$(BIN)/sessionstored config $(ARGS) | sed -n 's/^data = /data:  /p'
	@echo "stop:  Ctrl-C; what was acknowledged is on disk"
	@exec $(BIN)/sessionstored serve $(ARGS)

demo: $(READY) ## four agents, a daemon killed in the middle, and a report of what was lost
	@exec $(BIN)/python demo/demo.py $(ARGS)

test: check ## what CI runs: the checks, the tests and the coverage gate
	$(PYTEST_COVERED) -m "not slow" $(ARGS)
	$(BIN)/coverage report --include=$(EXACT) --fail-under=100

test-all: check ## the same with the slow tests: full kill storms and floods
	$(PYTEST_COVERED) $(ARGS)
	$(BIN)/coverage report --include=$(EXACT) --fail-under=100

torture: $(READY) ## break everything on purpose, and print a table of what was lost; ARGS="--only TEXT --seed N"
	@exec $(BIN)/python tests/crash/torture.py $(ARGS)

bench: $(READY) $(BENCH_READY) ## measure ours and the peers, write bench/RESULTS.md; half an hour, on an idle machine
	@exec .venv-bench/bin/python -m bench $(ARGS)

bench-quick: $(READY) $(BENCH_READY) ## the same in under 3 minutes, for directions; writes build/bench/RESULTS.md
	@exec .venv-bench/bin/python -m bench --size quick $(ARGS)

check: $(READY) ## lint and types of Python and proto, and that the generated code is fresh
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd proto && ../$(BIN)/buf lint
	$(BIN)/python proto/generate.py --check

generate: $(READY) ## write client/sessionstore/v1 from proto/
	$(BIN)/python proto/generate.py

constraints: $(READY) ## write constraints.txt anew from the newest versions that pyproject.toml allows
	@rm -rf .venv-constraints
	@$(PYTHON) -m venv .venv-constraints
	@.venv-constraints/bin/pip install --quiet $(BUILD_REQUIREMENTS) '.[dev]'
	@{ sed -n '/^#/p' constraints.txt; .venv-constraints/bin/pip freeze --exclude sessionstore | sort -f; } > .venv-constraints/new
	@mv .venv-constraints/new constraints.txt
	@PIP_CONSTRAINT=constraints.txt .venv-constraints/bin/pip install --quiet '.[bench]'
	@{ sed -n '/^#/p' bench/constraints.txt; .venv-constraints/bin/pip freeze --exclude sessionstore | sort -f | \
	  grep -vxFf constraints.txt; } > .venv-constraints/new
	@mv .venv-constraints/new bench/constraints.txt
	@rm -rf .venv-constraints
	@echo "constraints.txt is new: run make test"

clean: ## remove everything that these commands made, except data
	rm -rf .venv .venv-bench .venv-proto .venv-constraints .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew when the requirements change. An environment whose Python is gone or too old is not reused.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "There is no $(PYTHON). On Debian: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sessionstore needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up .venv: the first time takes about a minute"
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' || { \
	  echo "The installation failed: see above." >&2; \
	  command -v cc >/dev/null || echo "There is no C compiler: if a package had to be compiled, apt-get install build-essential python3-dev" >&2; \
	  exit 1; }
	@touch $@

# The benchmark has an environment of its own: what it compares with brings a hundred packages.
$(BENCH_READY): $(READY) bench/constraints.txt
	@echo "setting up .venv-bench: the first time takes some minutes"
	@$(PYTHON) -m venv --clear .venv-bench
	@PIP_CONSTRAINT="constraints.txt bench/constraints.txt" .venv-bench/bin/pip install --quiet \
	  --disable-pip-version-check --editable '.[bench]'
	@touch $@
