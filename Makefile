# Everything for a machine outside NVIDIA's container. `make` lists the targets.
# In the container nothing of this is needed: pip install --no-deps -e .

VENV ?= .venv
PYTHON ?= $(shell tools/find_python.sh)
PYTEST_ARGS ?=
VERSIONS ?= newest
# Slurm's tests mostly wait, so two cores carry three workers (tests/conftest.py groups them).
SIDE_BY_SIDE ?= -n 3 --dist loadscope --no-loadscope-reorder

# Set-up is done once per Python version and again when what it installs changes.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
READY := $(VENV)/.ready-$(PYTHON_VERSION)
# Where PYTHON is not given, tools/find_python.sh finds the one that fits VERSIONS.
LIGHT_PYTHON = $(if $(filter file,$(origin PYTHON)),,$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help setup doctor demo test test-light lint gpu-check clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18
	@echo
	@echo '  PYTHON=python3.12 make test      another Python (3.10 to 3.12)'
	@echo '  PYTEST_ARGS="-k anchor" make test'
	@echo '  SIDE_BY_SIDE= make test          one test after another'
	@echo '  TORCH_INDEX_URL=...              where torch comes from (default: see tools/setup_venv.sh)'

setup: $(READY) ## system packages (where allowed) and a virtual environment in .venv

$(READY): constraints/cpu.txt pyproject.toml tools/setup_system.sh tools/setup_venv.sh
	tools/setup_system.sh "$(PYTHON)"
	tools/setup_venv.sh "$(PYTHON)" "$(VENV)"
	@touch $@

doctor: setup ## what is installed, stood in for, missing
	$(VENV)/bin/nemo-warp doctor

demo: setup ## the whole method, small, on real text: no GPU needed
	$(VENV)/bin/python recipes/tiny/prepare.py
	$(VENV)/bin/nemo-warp run recipes/tiny

test: setup ## every test, with linters as tests
	$(VENV)/bin/python -m pytest --timeout=900 $(SIDE_BY_SIDE) $(PYTEST_ARGS)

# Not after `setup`: it has an environment of its own.
test-light: ## what needs no NeMo, with VERSIONS=oldest, newest or container
	tools/test_light.sh "$(VERSIONS)" "$(LIGHT_PYTHON)" $(SIDE_BY_SIDE) $(PYTEST_ARGS)

lint: setup ## ruff, mypy, import-linter, shellcheck only
	$(VENV)/bin/python -m pytest tests/test_style.py

# Not after `setup`: in the container everything is there, and must not be stood in for.
gpu-check: ## check the GPUs of this machine, ten minutes (GPU_CHECK_ARGS=--help)
	$(or $(wildcard $(VENV)/bin/python),python3) tools/gpu_check.py $(GPU_CHECK_ARGS)

clean: ## remove the virtual environment and caches (not build/ or runs/)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
