# make demo   the whole pipeline on the shipped model: build/demo/report.html and build/demo/summary.json
# make test   ruff, mypy and the tests
# make quick  the same without what is slow: for every save
#
# Both make .venv first, with the versions of constraints.txt. pip's own settings (PIP_INDEX_URL, pip.conf ...) apply.

VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= build/demo

# The first of these that starts and is new enough; the constraints were made with 3.11.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt

.PHONY: demo test quick lint types pytest clean

demo: $(VENV)/.ready-demo
	$(BIN)/python -m ppcl_fx.demo --out $(DEMO_OUT)

test: lint types pytest

quick: lint types
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -q -m "not slow and not kill and not coverage"

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .

types: $(VENV)/.ready-test
	$(BIN)/mypy

pytest: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# torch comes first and alone: it is the largest, and a wrong build of it shows at once.
$(VENV)/.ready-torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

$(VENV)/.ready-demo: $(VENV)/.ready-torch pyproject.toml
	$(INSTALL) -e ".[export,train]"
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready-torch pyproject.toml
	$(INSTALL) -e ".[dev]"
	@touch $@

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache ppcl_fx.egg-info
