# Everything here works on a machine that has Python 3.11 or newer and make: the environment is made on the way.
#   make quickstart                 a first run, minutes on two cores
#   make test                       the tests a change needs
#   make quickstart ARGS="--set schedule.steps=100"

PYTHON ?= python3
VENV ?= .venv
# What pip is asked for. On Linux the package index may have it as the build for NVIDIA GPUs, several gigabytes; where
# there is no such GPU a note says so and how to name a smaller one, and the install goes on.
TORCH ?= torch==2.13.0
# Options for the command of a run, such as ARGS="--set run.seed=1".
ARGS ?=
# C4-shaped shards, for `make bench` and `make tables`; and the longest sitting of the latter.
DATA ?= $(if $(BLOCKLLM_SHARED),$(BLOCKLLM_SHARED)/data/realtext/en)
MINUTES ?= 60
# Which peers `make bench-setup` makes; all if none is named.
PEERS ?=
NVIDIA ?= $(shell test -e /proc/driver/nvidia/version && echo yes)

BIN := $(VENV)/bin
RUN := $(VENV)/.ready
DEV := $(VENV)/.ready-dev
SIZES := 60m 130m 350m 1b 7b

.DEFAULT_GOAL := help
.PHONY: help setup quickstart $(SIZES:%=c4-%) test test-all test-gpu lint typecheck format bench bench-setup tables docs clean

help:  ## Show this list.
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*  ## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r name text; do printf '  %-12s %s\n' $$name "$$text"; done
	@printf '  %-12s %s\n' "c4-SIZE" "Train the papers' protocol on C4: $(SIZES)."

setup: $(DEV)  ## Make the environment in .venv, with all that development needs.

quickstart: $(RUN)  ## Train about 5M parameters on text that is here already: some minutes on two cores.
	$(BIN)/blockllm pretrain quickstart $(ARGS)

$(SIZES:%=c4-%): c4-%: $(RUN)
	$(BIN)/blockllm pretrain c4/$* $(ARGS)

test: $(DEV)  ## Run the tests, without those marked slow.
	$(BIN)/pytest -m "not slow and not gpu" $(ARGS)

test-all: $(DEV)  ## Run all tests that need no GPU.
	$(BIN)/pytest -m "not gpu" $(ARGS)

test-gpu: $(DEV)  ## Run the tests that need a CUDA device.
	$(BIN)/pytest -m gpu $(ARGS)

lint: $(DEV)  ## Check style, formatting and the direction of imports.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

typecheck: $(DEV)  ## Check types.
	$(BIN)/mypy

format: $(DEV)  ## Put the code into its one format.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench-setup: $(DEV)  ## Make the environments of the peers that `make bench` measures beside this package, in .bench.
	$(BIN)/python bench/setup_peers.py $(PEERS)

bench: $(DEV)  ## Measure speed beside the peers that are set up, about 20 minutes; ARGS="--only dense --minutes 3".
	$(BIN)/python bench/run.py $(if $(DATA),--data "$(DATA)") $(ARGS)

tables: $(DEV)  ## Make the tables in docs/: run missing cells, for at most MINUTES (60). DATA names the shards.
	@test -n "$(DATA)" || { echo "make tables needs real text: make tables DATA=FOLDER (C4-shaped shards), or set BLOCKLLM_SHARED"; exit 2; }
	$(BIN)/python bench/tables.py --data "$(DATA)" --minutes $(MINUTES) $(ARGS)

docs: $(DEV)  ## Write docs/reference from the code, and the tables from the cells that are there; nothing is run.
	$(BIN)/python docs/build.py
	$(BIN)/python bench/tables.py --page-only $(ARGS)
	$(BIN)/python bench/run.py --page

clean:  ## Remove the environment, caches and build output; runs stay.
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment of a user: torch first, so that nothing else decides which build of it comes.
$(RUN): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "$(PYTHON) is `$(PYTHON) --version 2>&1`; Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@$(note-torch)
	$(BIN)/python -m pip install -qq $(TORCH)
	$(BIN)/python -m pip install -qq --editable .
	@touch $@

$(DEV): $(RUN)
	$(BIN)/python -m pip install -qq --editable ".[dev]"
	@touch $@

# Ask pip what it would install, and say so if that is a build for GPUs that nothing here can use.
define note-torch
	if [ "$(origin TORCH)" = file ] && [ "`uname -s`" = Linux ] && [ -z "$(NVIDIA)" ]; then \
		rm -f $(VENV)/torch.json; \
		$(BIN)/python -m pip install -qq --dry-run --report $(VENV)/torch.json $(TORCH) >/dev/null 2>&1; \
		if grep -qi '"name": *"nvidia' $(VENV)/torch.json 2>/dev/null; then \
			echo "note: $(TORCH) comes as the build for NVIDIA GPUs here, several gigabytes, and there is no such GPU."; \
			echo "      To take a CPU build instead, stop now (Ctrl-C) and name it, with the URL of pytorch.org/get-started:"; \
			echo "      make setup TORCH='torch --index-url URL'"; \
		fi; \
	fi
endef
