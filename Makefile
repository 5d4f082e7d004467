# Each target makes what it needs, on a bare machine: Python 3.10+, make and a way to reach PyPI are enough.
#
#   make demo    the main job on real images; about two minutes after the first installation
#   make test    the default tests, doctests, README and examples included
#   make check   everything that CI runs: format, lint, types, `make test`, slow tests
#   make docs    the documentation as HTML, in docs/_build
#   make venv    .venv with every extra, for development
#
# PYTHON=python3.12 chooses the interpreter; PIP_FLAGS=... goes to every pip line.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check docs venv

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --quiet --disable-pip-version-check install $(PIP_FLAGS) -c constraints.txt

export PYTHONUNBUFFERED := 1

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict safe_lr
	$(MAKE) --no-print-directory test
	$(BIN)/python -m pytest -m slow

docs: $(VENV)/.installed-all
	$(BIN)/sphinx-build --fresh-env --quiet --fail-on-warning --keep-going docs docs/_build
	@echo "open docs/_build/index.html"

venv: $(VENV)/.installed-all

# A stamp says which extra is installed. A changed pyproject.toml or constraints.txt makes it stale. torch goes first and
# by itself: it is most of the download, and it must be the pinned one. W&B's `sweeps` goes last, and alone: it declares
# numpy<2 and runs with ours (its tests say so); the extra `search` names what else it needs.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing safe_lr[$*] into $(VENV) (the first time takes some minutes, most of it is torch)"
	@echo "  torch" && $(INSTALL) torch
	@echo "  safe_lr[$*]" && $(INSTALL) --editable '.[$*]'
	@case $* in all|dev) echo "  W&B's search" && $(INSTALL) --no-deps sweeps;; esac
	@case $* in all) touch $(VENV)/.installed-demo $(VENV)/.installed-dev;; dev) touch $(VENV)/.installed-demo;; esac
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; found: $$($(PYTHON) --version). Choose one with PYTHON=..."; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@touch $@
