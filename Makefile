# `make run`: the whole workflow. `make test`: the whole suite. Both build the environment first, if it is missing or old.
.DEFAULT_GOAL := help
SHELL := /bin/bash

CONFIG ?= config/quickstart.yaml
ARGS   ?=
PORT   ?= 3000
NAME   ?= cluster-attention
# Options of the installer, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for torch without CUDA.
PIP_ARGS ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3)

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/installed

# No library reports home. Waiting threads yield the CPU.
export BENTOML_DO_NOT_TRACK := True
export DO_NOT_TRACK := 1
export GX_ANALYTICS_ENABLED := false
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help env run test soak bench serve lint clean

help:  ## these targets
	@grep -E '^[a-z]+: .*##' Makefile | sed -E 's/^([a-z]+): [^#]*## /\1\t/' | expand -t 8
	@echo 'variables: CONFIG=config/quickstart.yaml  ARGS="more options"  PORT=3000  NAME=cluster-attention  PYTHON=python3.11  PIP_ARGS="options of pip"'

env: $(STAMP)  ## only the environment, in .venv

# The tested versions of constraints.txt. Made again when one of the two files changes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else f"error: Python 3.11 or 3.12 is needed, {sys.executable} is {sys.version.split()[0]}; make PYTHON=/path/to/python3.11")'
	@echo "Installing the environment into $(VENV); the first time this takes 3 to 4 minutes ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if command -v uv >/dev/null && UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" uv pip install --quiet --python $(BIN)/python $(PIP_ARGS) -c constraints.txt -e '.[dev]'; \
	then :; else $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'; fi
	@touch $@
	@echo "Environment ready: $$($(BIN)/python --version), $(BIN)/ega"

run: $(STAMP)  ## the whole workflow on CONFIG: logs, features, training, gates, service, A/B test, report
	@$(BIN)/ega run $(CONFIG) $(ARGS)

# One file stays in one worker: its fixtures are made once.
test: export OMP_NUM_THREADS := 1
test: $(STAMP)  ## the ordinary test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: export OMP_NUM_THREADS := 1
soak: $(STAMP)  ## the long proofs that `make test` leaves out; run it alone on the machine
	@$(BIN)/python -m pytest -m soak $(ARGS)
	@EGA_PROPERTY_EXAMPLES=10000 $(BIN)/python -m pytest tests/property/test_auction_laws.py tests/serving/test_serving_http.py --timeout 3600 $(ARGS)

bench: $(STAMP)  ## the speed measurement NAME (`ega bench --help`)
	@$(BIN)/ega bench $(NAME) $(ARGS)

serve: $(STAMP)  ## the newest approved model of CONFIG over HTTP, on 127.0.0.1:PORT
	@$(BIN)/ega serve $(CONFIG) --port $(PORT) $(ARGS)

lint: $(STAMP)  ## ruff, mypy --strict on auction/ and the schema, import rules
	@$(BIN)/ruff check --no-cache .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

clean:  ## remove the environment and caches; runs/ and .ega/ stay
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
