# The only commands that CI calls. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

UV_VERSION := 0.13.9
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
# A uv that is there is used; else one is installed into .uv, inside the checkout.
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
export UV_PYTHON_PREFERENCE := only-system

.PHONY: help setup tools generate fmt check test test-unit test-apiserver chaos test-trainer test-node demo bench images clean

help: ## show the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: .venv/.synced ## install everything that Python needs into .venv

.venv/.synced: pyproject.toml uv.lock | $(if $(filter .uv/bin/uv,$(UV)),.uv/bin/uv)
	@echo "setup: installing the locked dependencies into .venv (torch included, about 5 GB)"
	$(UV) sync --locked --all-extras
	@touch $@

.uv/bin/uv:
	@echo "setup: no uv on PATH, installing uv $(UV_VERSION) into .uv"
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: Python 3.11 or newer is needed, found $$(python3 --version)"; exit 1; }
	@python3 -m venv .uv 2>/dev/null || { echo "setup: python3 -m venv does not work, installing python3-venv"; apt-get install -y -qq python3-venv && python3 -m venv --clear .uv; }
	.uv/bin/pip install --quiet "uv==$(UV_VERSION)"

tools: setup ## build the Kubernetes programs that the lab needs (about 9 minutes, once)
	.venv/bin/taskoffer-lab tools

generate: setup ## write what is generated: CRDs and reference pages
	$(PY) hack/gen_crds.py
	$(PY) hack/gen_reference.py

fmt: setup ## format and sort imports
	.venv/bin/ruff check --fix-only --quiet .
	.venv/bin/ruff format --quiet .

check: setup ## lint, types, layer contracts, drift of generated files
	.venv/bin/ruff check .
	.venv/bin/ruff format --check --quiet .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	$(PY) hack/gen_crds.py --check
	$(PY) hack/gen_reference.py --check

# Trainings are many short programs that wait for files and for each other: two of them fill two cores. What is above and
# below on the ladder brings up clusters, or is about times, and stays in one process. A rung with failures does not keep
# the next one from being climbed; anything else that ends pytest does, an interrupt first of all.
SHARED := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
EARLIER := $(CURDIR)/.earlier-rungs.json

test: check ## everything: check, then every rung that this machine can run
	@rm -f $(EARLIER); export TASKOFFER_EARLIER_RUNGS=$(EARLIER); failed=0; \
	climb() { echo "$(PYTEST) $$*"; $(PYTEST) "$$@" || { code=$$?; [ $$code = 1 ] || exit $$code; failed=1; }; }; \
	climb --ignore=tests/trainer --ignore=tests/node; \
	climb $(SHARED) tests/trainer; \
	climb tests/node; \
	exit $$failed

test-unit: setup ## the quick rungs: unit and kmock
	$(PYTEST) tests/unit tests/kmock

test-apiserver: setup ## against a real API server
	$(PYTEST) tests/apiserver

chaos: setup ## the fault campaigns in full length (hours; TASKOFFER_CHAOS_SEED repeats one)
	TASKOFFER_CHAOS=whole $(PYTEST) tests/chaos

test-trainer: setup ## real training steps on a tiny model
	$(PYTEST) $(SHARED) tests/trainer

test-node: setup ## real nodes, images and pods (root, Linux)
	$(PYTEST) tests/node

demo: setup ## everything on this machine, to trained adapters
	.venv/bin/taskoffer-lab demo $(DEMO_ARGS)

images: setup ## build the two images and push them to the lab's registry
	$(PY) -m taskoffer_lab.images

bench: setup ## the admission benchmark
	$(PY) benchmarks/admission.py --offers 5000 --runs 3

clean: setup ## end the lab's clusters; caches stay (taskoffer-lab prune)
	.venv/bin/taskoffer-lab down --all
