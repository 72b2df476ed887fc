# `make demo` and `make test` need nothing but Python 3.11 and make: the first call sets up .venv, later ones reuse it.
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/ready
UNFINISHED := $(VENV)/unfinished

.PHONY: demo test style quality clean

demo: $(READY)  ## the main job on packaged weights and data: make demo ARGS="--help"
	$(BIN)/hf-compress demo $(ARGS)

test: quality  ## make test ARGS="tests/pruning -x" WORKERS=4
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

style: $(READY)  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(READY)  ## the same rules, checked only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

# The mark "unfinished" becomes "ready" only after the last line. If it is found at the start, the previous install was
# interrupted and may have left half-written packages, which pip takes for whole ones: begin anew.
$(READY): pyproject.toml constraints.txt $(wildcard hf_compress/formats/csrc/*)
	if [ -e $(UNFINISHED) ]; then rm -rf $(VENV); fi
	$(PYTHON) -m venv $(VENV)
	touch $(UNFINISHED)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[dev]"
	mv $(UNFINISHED) $(READY)
