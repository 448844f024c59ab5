# `make` lists the targets. Everything is installed into $(VENV), which need not be activated.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo browser test test-lowest lint format constraints clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 21

setup: $(READY) ## install system packages, a virtual environment and the pinned versions

$(READY): pyproject.toml constraints.txt tools/setup.sh
	@tools/setup.sh $(VENV)
	@touch $@

demo: setup ## set up, pre-train on a generated data set, write runs/demo/report.html
	@$(PYTHON) -m tools.demo

browser: ## install Debian's chromium, with which the tests look at the report
	@command -v chromium chromium-browser google-chrome >/dev/null || { apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; }

test: setup ## set up and run the tests (PYTEST_ARGS="-k name" chooses); with a GPU, also its tests
	@$(PYTHON) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	@if nvidia-smi -L >/dev/null 2>&1; then $(PYTHON) -m pytest -m cuda $(PYTEST_ARGS); fi

test-lowest: ## run the tests with the lowest versions that pyproject.toml allows (PYTHON3=python3.12)
	@$(or $(PYTHON3),python3) tests/lowest.py > .venv-lowest.txt
	@CONSTRAINTS=.venv-lowest.txt tools/setup.sh .venv-lowest
	@.venv-lowest/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup ## check style, format and types
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: setup ## fix style and format
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

constraints: ## renew constraints.txt with the newest versions that pyproject.toml allows
	@CONSTRAINTS= tools/setup.sh $(VENV)-new
	@sed '/^[^#]/d' constraints.txt > constraints.txt.new
	@$(VENV)-new/bin/python -m pip freeze --all --exclude-editable >> constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@rm -rf $(VENV)-new

clean: ## remove the virtual environment and every cache; data/ and runs/ stay
	@rm -rf .venv .venv-new .venv-lowest .venv-lowest.txt build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
