# Two commands do all: `make train` and `make test`. Both make .venv first if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: help build train test test-integrations lint bench clean

help:
	@echo "make train   build if needed, train the embedded default model (a few minutes)"
	@echo "make test    build if needed, run the whole test suite"
	@echo "make build   make $(VENV) with the package and its test tools"
	@echo "make test-integrations   TRL, Trainer, Lightning: each supported release in its own venv"
	@echo "make lint    ruff and mypy"
	@echo "make bench   benchmarks beside plain torch"
	@echo "make clean   remove $(VENV) and build products"

# The stamp is newer than what the build depends on; Python files need no rebuild (editable).
STAMP := $(VENV)/.built
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml constraints.txt

$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python has no venv: install it ('apt-get install python3-venv')"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and pinned: left to itself pip takes the newest CUDA build.
	$(PIP) install -q "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -q -c constraints.txt setuptools pybind11 cmake ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[train,test]'
	@touch $(STAMP)

build: $(STAMP)

train: $(STAMP)
	$(BIN)/dpo-kernels train

test: $(STAMP) lint
	$(BIN)/python -m pytest

# Venvs in build/integrations; NAMES="trl-1.16 trl-0.24" runs some of them.
test-integrations: $(STAMP)
	$(BIN)/python tools/test_integrations.py --record $(NAMES)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info dpo_kernels/*.so
