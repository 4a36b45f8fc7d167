# make demo    the comparison on real digits, in one table
# make test    lint, types and tests: what has to pass before a change goes in
# make lint    ruff alone
#
# Each installs Pyrometer into .venv first, once. Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := inference models benchmarks

.PHONY: demo test lint types tests clean

demo: $(INSTALLED)
	@$(BIN)/pyrometer demo

test: lint types tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow editable installs, so it is shown the namespace as a folder of links.
types: $(INSTALLED)
	@mkdir -p build/types/pyrometer
	@for folder in $(PACKAGES); do ln -sfn "$(CURDIR)/$$folder" "build/types/pyrometer/$$folder"; done
	MYPYPATH=build/types $(BIN)/mypy $(foreach folder,$(PACKAGES),-p pyrometer.$(folder))

# Files side by side, one thread each: on few cores a second thread costs more than it gains.
tests: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml
	@command -v "$(PYTHON)" > /dev/null || \
	  { echo "Pyrometer: there is no '$(PYTHON)' here; name a Python >= 3.11: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Pyrometer: needs Python >= 3.11, but '$(PYTHON)' is older; name another: make PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2> /dev/null || \
	  { echo "Pyrometer: '$(PYTHON)' has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@command -v cc > /dev/null || command -v gcc > /dev/null || command -v clang > /dev/null || \
	  echo "Pyrometer: note: no C compiler found; everything runs, but nothing can be compiled for speed" >&2
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@
