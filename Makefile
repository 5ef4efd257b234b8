# `make demo` and `make test` are all that a new machine needs; the rest is for those who change the code.
# Every target makes a virtual environment of its own in $(VENV) first.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PROMPT ?= It was a cold night, and the old man
BIN = $(VENV)/bin

.PHONY: demo test lint format oracle parity native-test clean check-tools

demo: $(VENV)/installed
	$(BIN)/python scripts/generate.py --prompt="$(PROMPT)" --max_tokens=120

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files '*.cc' '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cc' '*.h' | xargs $(BIN)/clang-format -i

# Against PyTorch and transformers: tests (where these are installed, `make test` runs them too), and a table.
oracle: $(VENV)/installed-oracle
	$(BIN)/python -m pytest tests/oracle
	$(MAKE) --no-print-directory parity

# Prints the parity table and writes it to docs/parity.md.
parity: $(VENV)/installed-oracle
	$(BIN)/python -m tests.oracle.table --out=docs/parity.md

# The kernels, store and pool under the sanitizers: of addresses and undefined behaviour, then of threads.
native-test: native-test-address,undefined native-test-thread

native-test-%: $(VENV)/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B "build/sanitized-$*" -G Ninja -DHMOE_BUILD_PYTHON=OFF \
	  -DHMOE_BUILD_TESTS=ON -DHMOE_SANITIZE=$*
	PATH="$(abspath $(BIN)):$$PATH" cmake --build "build/sanitized-$*"
	$(BIN)/ctest --test-dir "build/sanitized-$*" --output-on-failure

clean:
	rm -rf $(VENV) build

SOURCES = pyproject.toml CMakeLists.txt $(shell find ffi -name '*.cc' -o -name '*.h' -o -name CMakeLists.txt)
INSTALL = $(BIN)/python -m pip install --quiet --editable

$(BIN)/python:
	@$(MAKE) --no-print-directory check-tools
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/installed-dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-oracle: $(SOURCES) | $(BIN)/python
	$(INSTALL) '.[dev,oracle]'
	@touch $@ $(VENV)/installed-dev $(VENV)/installed

check-tools:
	@[ "$$(uname -s)" = Linux ] || { echo "hmoe_jax needs Linux, this is $$(uname -s)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or later is needed as '$(PYTHON)' (or name it: make PYTHON=python3.12 ...)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing (Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	  { echo "Python's headers are missing (Debian and Ubuntu: apt-get install python3-dev)"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "a C++ compiler is missing (Debian and Ubuntu: apt-get install g++)"; exit 1; }
