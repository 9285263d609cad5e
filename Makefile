# make demo    register a real pair and a pair with known truth; the pictures lie in demo/
# make test    the test suite
# make check   ruff, pyright and the test suite
#
# Each target makes .venv where it is absent and installs only when pyproject.toml or constraints.txt have changed.
# On Linux with no GPU, PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" spares the download of CUDA.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# one process a core with one thread each: small tensors gain nothing from more threads, and lose where the machine is busy
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: demo test check clean

demo: $(VENV)/.installed-demo
	$(BIN)/regkit demo -o demo --overwrite

test: $(VENV)/.installed-test
	$(PYTEST)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(PYTEST)

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "regkit needs Python 3.11 or later; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[$*]"
	@touch $@
