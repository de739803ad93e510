# Everything runs in .venv, made from setup.cfg with PYTHON (3.11 or newer):
#   make quickstart                          align a small model here, in minutes
#   make test                                lint, types and the tests
#   make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
ARGS ?=
PYTEST_ARGS ?=
CONFIGS := $(filter-out %/__init__.py %/common.py %/models.py,$(wildcard configs/*.py))
SCRATCH = $(shell mktemp -d)

.PHONY: help quickstart test test-fast test-training attacks lint types smoke smoke-all check repro frontier real bench colabs
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

quickstart: $(VENV)/run.stamp  ## SFT, reward model, DPO and evaluation of a small model
	rm -rf runs/quickstart
	$(PY) -m alignax.main --config configs/quickstart.py --workdir runs/quickstart $(ARGS)

test: lint types  ## lint, types and every test but those that train for minutes
	$(PY) -m pytest -n auto -m "not training" $(PYTEST_ARGS)

test-fast: $(VENV)/test.stamp  ## tests that are not marked slow
	$(PY) -m pytest -n auto -m "not slow and not training" $(PYTEST_ARGS)

test-training: $(VENV)/test.stamp  ## what trains for minutes: the quickstart's numbers, states of killed runs
	$(PY) -m pytest -n auto --dist loadfile -m training $(PYTEST_ARGS)

attacks: $(VENV)/test.stamp  ## every state on disk of five runs, ten kills, 5,000 damaged files; an hour
	ALIGNAX_ATTACKS=all ALIGNAX_FUZZ=500 $(PY) -m pytest tests/attacks $(PYTEST_ARGS)

lint: $(VENV)/test.stamp  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/test.stamp  ## mypy on alignax/
	$(PY) -m mypy

check: lint types test-fast  ## before a commit

smoke: $(VENV)/run.stamp  ## two steps of the quickstart
	$(PY) -m alignax.main --config configs/quickstart.py:smoke --workdir $(SCRATCH) $(ARGS)

smoke-all: $(VENV)/run.stamp  ## two steps of every config
	@for config in $(CONFIGS); do \
	  echo "== $$config:smoke"; dir=$$(mktemp -d); \
	  $(PY) -m alignax.main --config $$config:smoke --workdir $$dir $(ARGS) || exit 1; \
	  rm -rf $$dir; \
	done

repro: $(VENV)/test.stamp  ## claims of papers at laptop size; writes launch/results/
	$(PY) tests/reproductions $(ARGS)

frontier: $(VENV)/test.stamp  ## win rate against KL, method by method: InfAlign's claim
	$(PY) tests/reproductions infalign

real: $(VENV)/test.stamp  ## SmolLM2-135M on DATA=pairs.jsonl[.gz], most of an hour
	@test -n "$(DATA)" || { echo "usage: make real DATA=pairs.jsonl.gz"; exit 2; }
	PYTHON=$(PY) launch/local.sh configs/dpo.py runs/dpo --config.data.path=$(DATA) \
	  --config.model.path="$$(PYTHON=$(PY) launch/fetch_smollm2.sh)" $(ARGS)

bench: $(VENV)/test.stamp  ## time and memory, never asserted in a test
	@for file in tests/benchmarks/*.py; do \
	  test -e $$file || { echo "no benchmarks in tests/benchmarks/"; exit 1; }; \
	  echo "== $$file"; $(PY) $$file || exit 1; \
	done

colabs: $(VENV)/test.stamp  ## write each colabs/*.ipynb from its .py
	$(PY) -c "$$NOTEBOOKS"

$(VENV)/test.stamp: setup.cfg pyproject.toml
	$(call install,.[test])
	@touch $(VENV)/run.stamp $@

$(VENV)/run.stamp: setup.cfg pyproject.toml
	$(call install,.)
	@touch $@

define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "alignax needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
       "name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
$(PYTHON) -m venv $(VENV)
$(PY) -m pip install --quiet --editable '$(1)'
endef

# The ids of cells are random by default, and every build would be a difference.
define NOTEBOOKS
import pathlib, jupytext
for path in sorted(pathlib.Path("colabs").glob("*.py")):
    notebook = jupytext.read(path)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    jupytext.write(notebook, path.with_suffix(".ipynb"), fmt="ipynb")
    print(path.with_suffix(".ipynb"))
endef
export NOTEBOOKS
