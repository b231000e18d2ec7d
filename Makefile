# natgrad: `make demo` races K-FAC and EigenAdam against Adam and Nesterov SGD, `make test` checks everything.
#
# The first call makes an environment in .venv, with the exact versions of constraints.txt; later calls reuse it.
# Choose the interpreter with `make PYTHON=python3.12 test`, another folder with `make VENV=/path/to/env test`.

VENV ?= .venv
# The first interpreter that answers and can make environments: a version manager leaves commands behind for versions that
# it has not installed, and some systems package venv on its own.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13; do $$p -c 'import venv, ensurepip' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_INTEGRATIONS := $(VENV)/.ready-integrations

# Racing time of one optimiser in `make demo`; there are four of them.
DEMO_SECONDS ?= 41
# Tests run in two workers with one thread each: more threads would fight over the cores.
WORKERS ?= 2
test test-slow test-integrations bench: export OMP_NUM_THREADS ?= 1

.PHONY: help env demo test test-slow test-integrations lint bench docs clean

help:
	@echo "make demo       race K-FAC, EigenAdam, Adam and Nesterov SGD on CURVES (three minutes), then print the report's path"
	@echo "make test       formatting, lint, types and the test suite"
	@echo "make test-slow  the tests that take longer"
	@echo "make test-integrations  Lightning, Accelerate, Trainer and TensorBoard, the real packages (installed first)"
	@echo "make lint       formatting, lint and types alone"
	@echo "make bench      what must be reached, measured at full size (an hour and a half), into docs/benchmarks.md"
	@echo "make docs       the documentation, in docs/_build/html"
	@echo "make clean      remove the environment and everything generated"

env: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "No working python3.11, python3.12 or python3.13 (with its venv module) was found." >&2; \
		echo "Install one, or name yours: make PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
		echo "$(PYTHON) does not run or is older than Python 3.11, which natgrad needs." >&2; \
		echo "Name another: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Making the environment in $(VENV) with $$($(PYTHON) --version) (once; this takes a minute or two)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@PIP_CONSTRAINT="$(CURDIR)/constraints.txt" $(BIN)/python -m pip install -qq --disable-pip-version-check \
		-c constraints.txt -e ".[lab,dev,docs]" || { \
		echo "" >&2; \
		echo "The environment could not be made; pip says why above. If it finds no match for torch, or calls the versions in" >&2; \
		echo "conflict, then torch as pinned in constraints.txt does not exist for $$($(BIN)/python --version) on this machine." >&2; \
		echo "Choose another interpreter (make clean, then make PYTHON=python3.11), or relax that line of constraints.txt:" >&2; \
		echo "natgrad runs with torch 2.11 and later. Without a network, pip takes wheels from a folder: PIP_FIND_LINKS=FOLDER." >&2; \
		exit 2; }
	@touch $(READY)

demo: $(READY)
	$(BIN)/natgrad race curves --optimizers kfac,eigen-adam,adam,nesterov --seconds $(DEMO_SECONDS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -q

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow -q

test-integrations: $(READY_INTEGRATIONS)
	$(BIN)/python -m pytest tests/integrations -q

$(READY_INTEGRATIONS): $(READY)
	@echo "Adding the packages of the extra \"integrations\" to $(VENV) (once)"
	@PIP_CONSTRAINT="$(CURDIR)/constraints.txt" $(BIN)/python -m pip install -qq --disable-pip-version-check \
		-c constraints.txt -e ".[integrations]" || { \
		echo "Lightning, Accelerate, transformers or TensorBoard could not be installed; pip says why above." >&2; exit 2; }
	@touch $(READY_INTEGRATIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --output-format min-text

bench: $(READY)
	$(BIN)/python -m benchmarks all

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf $(VENV) docs/_build build src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
