# make demo · make test · make lint: each sets up .venv if it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Without a GPU: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# Workers by tests/conftest.py, whose groups stay together.
PYTEST_ARGS ?=
PYTEST_PARALLEL ?= -n auto --dist loadgroup --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Many containers set it. Each of a run's dozens of processes would then compile what it imports anew, for 20 s.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all golden gpu lint format docs clean

help:
	@echo "make demo      train a small text-to-video model in three stages, generate, evaluate, report (CPU; about 15 minutes on 2 cores)"
	@echo "make test      the tests (CPU)"
	@echo "make test-all  the slow tests too"
	@echo "make golden    rewrite the golden losses in tests/golden/ (after a change that is meant to change them)"
	@echo "make gpu       half an hour on one GPU: tests, attention, parity, speed, recipes; runs/gpu/gpu.json and gpu.md"
	@echo "make lint      ruff and pyright"
	@echo "make format    ruff, rewriting files"
	@echo "make docs      docs/config.md and the editors' schemas, from the code"
	@echo "make clean     remove .venv and caches (runs/ stays)"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"stdit needs Python 3.11 or newer; {sys.executable} is {v.major}.{v.minor}. Try: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV) (about two minutes, 2 GB) ..."
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no ensurepip; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@# Compiling all of 21,000 files takes a core a minute and a half; those imported are compiled then.
	@$(BIN)/python -m pip install --quiet --no-compile $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@# For comparisons in tests. Apart from the packages: it wants torchvision, and brings a package called tests.
	@$(BIN)/python -m pip install --quiet --no-compile --no-deps $(PIP_ARGS) --target $(VENV)/oracles torch-fidelity==0.4.0
	@touch $@

demo: setup
	$(BIN)/python -m pipelines.train_stages --plan configs/plans/demo.yaml

test: setup
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_PARALLEL) $(PYTEST_ARGS)

test-all: setup
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) $(PYTEST_ARGS)

golden: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.golden tests/golden

gpu: setup
	$(BIN)/python benchmarks/gpu.py --out runs/gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m pipelines.config_reference
	$(BIN)/python -m pipelines.scaling

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
