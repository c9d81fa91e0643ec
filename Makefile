# `make demo` and `make test` need Python 3.11 or newer and, the first time, a package index.
# An existing .venv is used as it is; remove it to start afresh.

EXTRAS := dev,eval,ui
DEMO := character_1,clothing_1,style_1,background_1,object_1
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.cmlora-ready
FIND_PYTHON := for p in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/cmlora compare --model emoji --loras $(DEMO) --seeds 0-3 --execution fused --out demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal --durations 25 --durations-min 3
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; \
	  then OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser; \
	  else echo "no chromium and chromedriver: the browser tests are left out"; fi

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(READY): pyproject.toml
	@$(BIN)/python -c 'import pip' 2>/dev/null || { \
	  python=$$($(FIND_PYTHON)); \
	  test -n "$$python" || { echo "cmlora needs Python 3.11 or newer: make $@ PYTHON=/path/to/python" >&2; exit 1; }; \
	  "$$python" -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRAS)]'
	@touch $@
