# Two commands do everything: `make reproduce` and `make test`. Each builds .venv once.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BENCH  := .venv-bench
ONE    := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
INTEGRATIONS := .venv-integrations

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,dev]'
	@touch $@

setup: $(READY)  ## build .venv (done once)

reproduce: $(READY)  ## the quick reproduction: verdict table, figures, HTML page
	$(BIN)/twofold reproduce --scale quick --out reproduction

test: $(READY)  ## the whole test suite
	$(ONE) $(BIN)/python -m pytest -q -n 2 --dist loadgroup

docs: $(READY)  ## the documentation site, in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html docs docs/_build/html

$(INTEGRATIONS)/.ready: pyproject.toml constraints.txt constraints-integrations.txt
	@test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-integrations.txt \
	  -e '.[lab,lightning,transformers,tensorboard,wandb,datasets]' pytest pytest-xdist
	@touch $@

test-integrations: $(INTEGRATIONS)/.ready  ## Lightning, transformers, datasets, TensorBoard and W&B, in an environment of their own
	$(ONE) $(INTEGRATIONS)/bin/python -m pytest -q -n 2 tests/integrations

check: $(READY)  ## lint, format, types, layers
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

$(BENCH)/.ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	@test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	@touch $@

oracles: $(BENCH)/.ready  ## hold every matrix against brute force and other libraries
	$(ONE) $(BENCH)/bin/python -W ignore benchmarks/oracles.py
	$(ONE) $(BENCH)/bin/python -W ignore benchmarks/parity.py

bench: $(BENCH)/.ready  ## make docs/benchmarks.md anew; the machine should be idle
	$(ONE) $(BENCH)/bin/python -W ignore benchmarks/publish.py

clean:  ## remove the environments and what the tools left
	rm -rf $(VENV) $(BENCH) $(INTEGRATIONS) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

.PHONY: help setup reproduce test test-integrations docs check oracles bench clean
