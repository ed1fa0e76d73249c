# make demo | test | test-slow | test-slurm | test-gpu | lint | dashboards | clean. Each first makes .venv if need be (`make setup`), which asks for Python >= 3.11 and nothing else.
#
# PYTHON=python3.12   the interpreter that .venv is made with
# ARGS="-k order"     more arguments for pytest

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# ffcv compiles against OpenCV and libjpeg-turbo; without their headers everything else is still installed.
FFCV := $(shell pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v c++ >/dev/null && echo ffcv)

# The stamp's name changes with what it depends on: the place of the tree (the project is installed as a link to it), the two
# files and the headers. So a second `make` does nothing, and any change sets up again.
STAMP := $(VENV)/.setup-$(shell { pwd; echo $(FFCV); cat pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)

# pip writes no bytecode: compiling every file of every library takes as long as the rest of the setup. The first process that
# imports a module writes it instead, which this variable would forbid.
PIP_INSTALL := $(RUN) -m pip install --quiet --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-slow test-slurm test-gpu lint dashboards clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "setup: Python 3.11 or newer is needed, but \`$(PYTHON)\` is: $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; \
	  echo "setup: name another one, for example: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "setup: installing into $(VENV), one to three minutes on a fast line"
	@test -x $(RUN) && $(RUN) -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $(VENV)/.setup-*
	@$(PIP_INSTALL) pip
	@$(PIP_INSTALL) --build-constraint constraints.txt --editable '.[deepspeed,fp8,parquet,prep,slurm,streaming,webdataset,dev]'
ifdef FFCV
	@echo "setup: building ffcv"
	@$(PIP_INSTALL) --build-constraint constraints.txt ffcv
else
	@echo "setup: ffcv is left out, its headers are missing. To have it: apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++, then make setup"
endif
	@touch $@
	@echo "setup: done"

demo: setup
	@$(RUN) jobs/demo.py

test: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 $(ARGS)

test-slow: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow $(ARGS)

# On a SLURM that the tests start and stop themselves; skipped, with the reason, where it is not installed.
test-slurm: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m slurm $(ARGS)

# On one GPU; skipped where there is none.
test-gpu: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 4 --dist worksteal tests/test_gpu.py tests/test_fused.py $(ARGS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/shellcheck --shell=bash --exclude=SC2034,SC2154 jobs/attempt.sh monitoring/*.sh

# Grafana's dashboards and docs/metrics.md, from the registry.
dashboards: setup
	@$(RUN) -W ignore monitoring/build.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
