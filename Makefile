# Everything here works on a fresh machine with Python 3.11+ and a package index; the environment is made on first use.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST_WORKERS ?= 2
OLDEST ?= build/oldest
FUZZ_INPUTS ?= 100000
FUZZ_OUT ?= build/fuzz

# compiled files are kept, or each of some hundred processes that the tests start would compile what it imports
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test tests test-all test-gpu test-oldest fuzz docs lint types install clean

# uv takes a quarter of pip's time; where it cannot be had, or does not reach the index (it reads none of pip's settings), pip
# installs. Neither compiles the files of libraries beforehand: the few that are imported are compiled then
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev,export]' \
		|| $(PIP) --no-compile --editable '.[dev,export]'
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/clipdistill demo --out demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# types are checked beside the tests: alone they keep one core idle for a minute
test: lint
	$(MAKE) --no-print-directory --jobs 2 types tests

# one thread a worker: two workers with two threads each on two cores wait for each other; by file: what the tests of
# a file or a folder share is made once
tests: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

# the slow tests too, with what they ask (Ray, databases, notebooks, other libraries); the converters for phones are
# installed by hand, and two tests want  npm install @huggingface/transformers azurite
test-all: lint types
	$(PIP) --editable '.[dev,export,docs,slow,notebooks,benchmarks]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m "not gpu"

# on a machine with a GPU, within 8 minutes: tests, recipes, speeds and the objective's table
test-gpu: install
	$(PIP) --editable '.[dev,export,benchmarks]'
	PYTHON=$(BIN)/python sh benchmarks/gpu.sh

# the lowest versions that pyproject.toml allows, in an environment of their own; not of Python's newest versions
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable . pytest pytest-timeout pytest-xdist hypothesis transformers
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(PYTEST_WORKERS)

# nightly: every reader of foreign files against a hundred thousand bad inputs, guided by what they reach
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --inputs $(FUZZ_INPUTS) --seconds 7200 --out $(FUZZ_OUT)

# the book as a site in site/; a link that leads nowhere is an error. The demo's student is a page in it, site/try/
docs: install
	$(PIP) --editable '.[docs]'
	$(BIN)/zensical build --clean --strict
	test -d demo/clip-rd/student || $(BIN)/clipdistill demo --out demo
	$(BIN)/clipdistill export demo/clip-rd --to web --int8 --out site/try
	$(BIN)/python docs/typeset.py site

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
