# Two commands do everything: `make demo` and `make test`. Each makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
RUN_DIR ?= runs/demo

.PHONY: demo movielens mmrec test test-slow check bench install clean help

help:            ## show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

demo: $(STAMP)   ## the whole path on a synthetic catalogue, through a local Ray
	$(BIN)/python -m launch run demo --run-dir $(RUN_DIR) $(ARGS)

movielens: $(STAMP) ## the whole path on MovieLens with posters and plots (needs the data)
	$(BIN)/python -m launch run movielens $(ARGS)

mmrec: $(STAMP)  ## stage 2 on a benchmark in MMRec's format (needs the data)
	$(BIN)/python -m launch run mmrec $(ARGS)

test: $(STAMP)   ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(STAMP) ## all tests
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## every benchmark; results go to benchmarks/results
	set -e; for part in "data_prep.py throughput" "data_prep.py incremental" "data_prep.py kills" interactions.py \
	  "loader.py speed" "loader.py waiting" "pretrain.py reference --steps 1 --rounds 14" \
	  "pretrain.py reference --steps 1 --rounds 14 --full-length-reference" "pretrain.py ranks" "pretrain.py zero" \
	  align.py "align.py --negatives" "align.py --recall 0.08 0.085 0.09 0.095 --seconds 330" "knn.py --method exact" "knn.py --method ann --items 1000000 --dim 128" \
	  sampler.py scale.py warm_start.py features.py quality.py; do $(BIN)/python benchmarks/bench_$$part; done

install: $(STAMP) ## the virtual environment with everything in it

# torch goes first: DeepSpeed looks for it while it is being installed. torchscale is the reference
# that the encoder is tested against; its dependencies would bring torchvision.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch wheel "setuptools>=77"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps torchscale
	touch $(STAMP)

clean:           ## remove the virtual environment and caches (runs/ stays)
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache
