# make demo       set up .venv and run the demonstration
# make test       set up .venv and run the tests
# make test-slow  the tests that take longest, which start many processes
# make check      lint, formatting, types, committed notebooks
# make notebooks  run the notebooks again, in place
# make tables     measure the tables of data/results again: hours, but it goes on where it stopped
# make clean      remove .venv and everything built
#
# PYTHON chooses the interpreter (3.11 or newer), VENV the folder, JOBS the number of test workers:
#   make test PYTHON=python3.12 JOBS=4

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# What pip is asked for before anything else; on Linux, where the index's default build of torch
# brings CUDA along, add "--index-url https://download.pytorch.org/whl/cpu" for the small one.
TORCH ?= torch==2.13.0
OUT ?=
MAKEFLAGS += --no-print-directory

EXPERIMENTS ?= tokens labels blocks proxy where learners classes cost failures open-prefix recipe loop
EMPHASIS ?= policies field sources heads composition

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
READY := $(VENV)/.ready-$(or $(VERSION),none)
BIN := $(VENV)/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
# Timings would change the files at every run, and progress bars would be saved.
EXECUTE = TTY_INTERACTIVE=0 TQDM_DISABLE=1 $(BIN)/python -m jupyter nbconvert --to notebook \
	--execute --log-level WARN --ExecutePreprocessor.timeout=600 \
	--ExecutePreprocessor.record_timing=False

.PHONY: demo test test-slow check lint types notebook-check notebooks notebooks-to tables install clean

demo: $(READY)
	$(BIN)/lenskit demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

# What starts many processes: killed workers, Ray, whole commands.
test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests

check: lint types notebook-check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

notebook-check: $(READY)
	$(BIN)/python -m pytest -q tests/test_notebooks.py

notebooks: $(READY)
	$(if $(NOTEBOOKS),$(EXECUTE) --inplace $(NOTEBOOKS),@echo "there are no notebooks")

# The same into the folder OUT, leaving the committed ones alone.
notebooks-to: $(READY)
	@test -n "$(OUT)" || { echo "say where to: make notebooks-to OUT=folder"; exit 2; }
	$(if $(NOTEBOOKS),$(EXECUTE) --output-dir "$(OUT)" $(NOTEBOOKS),@echo "there are no notebooks")

# 21 concepts of each class; whatever is finished is kept under results/. Answers stay there.
tables: $(READY)
	@set -e; export OMP_NUM_THREADS=1; for name in $(EXPERIMENTS); do \
	    $(BIN)/lenskit experiment $$name --concepts 21 --workers $(JOBS) --out results/$$name; done
	$(BIN)/lenskit experiment beyond-text --out results/beyond-text
	$(BIN)/lenskit experiment sizes --concepts 3 --workers $(JOBS) --out results/sizes
	$(BIN)/python -m benchmarks.recipes --workers $(JOBS) --work results/recipes
	$(BIN)/python -m benchmarks.diagnosis
	@set -e; for name in $(EMPHASIS); do $(BIN)/lenskit emphasis $$name --out results/$$name; done
	@for name in $(EXPERIMENTS) beyond-text sizes $(EMPHASIS); do \
	    find results/$$name -maxdepth 1 \( -name '*.md' -o -name '*.csv' ! -name '*-answers.csv' \) \
	        -exec cp {} data/results/ \; ; done
	$(BIN)/lenskit figures

install: $(READY)

$(READY): pyproject.toml
	@test -n "$(VERSION)" || { echo "'$(PYTHON)' is not a Python that runs here."; \
	    echo "Install Python 3.11 or newer and name it: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "lenskit needs Python 3.11 or newer, and '$(PYTHON)' is $(VERSION)."; \
	    echo "Name a newer one: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python$(VERSION) || $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "$(PYTHON) could not make the virtual environment $(VENV)."; \
	    echo "On Debian and Ubuntu the package python$(VERSION)-venv is needed for it."; exit 2; }
	@rm -f $(VENV)/.ready-*
	@echo "Setting up $(VENV): a few minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
