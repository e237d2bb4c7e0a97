# Every target sets itself up: .venv in this checkout, made once, renewed when its recipe changes.
# Needs python3 (3.11 or newer), pip and make. `make help` lists what there is.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready

# A virtual environment that is broken, or made for another folder, is set up anew.
ifneq ($(MAKECMDGOALS),clean)
$(shell test "$$(cat $(READY) 2>/dev/null)" = "$(CURDIR)" && $(BIN)/python -c '' 2>/dev/null || rm -f $(READY))
endif

.PHONY: help setup demo demo-chat test test-all lint format bench docs clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## the virtual environment, with everything the other targets need

demo: $(READY)  ## train on help-desk messages: linear probe, LoRA, full fine-tuning (4 minutes)
	$(BIN)/graftune demo

demo-chat: $(READY)  ## teach a small chat model a house style with LoRA (6 minutes)
	$(BIN)/graftune demo --chat

test: $(READY)  ## every test but the slow ones (under 10 minutes on two cores)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow"

test-all: $(READY)  ## every test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

lint: $(READY)  ## formatting, style, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(READY)  ## write what the formatter and the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## measured ratios to HF PEFT
	$(BIN)/python -m benchmarks

docs: $(DOCS_READY)  ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## what builds and checks left behind (.venv stays)
	rm -rf build dist site htmlcov .coverage .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt requirements-demo.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" sh scripts/setup.sh

$(DOCS_READY): $(READY)
	@$(BIN)/python -m pip install -q $(GRAFTUNE_PIP_ARGS) -c constraints.txt -e '.[docs]'
	@touch $@
