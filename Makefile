# Everything a contributor needs. The first two work on a fresh machine and set up what they need.
PYTHON ?= python3
PIP_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test mutants hub check reference bench docs format clean

demo: $(READY)  ## the main job on the shipped model: inspect, convert, convert back, compare, run
	@$(BIN)/mtp-convert demo

test: check  ## linters, types and tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m "not reference and not large and not mutants and not hub"

mutants: $(READY)  ## every wrong table of a kind, in every family: all must be seen by the forward passes
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -rP -m mutants

hub: $(READY)  ## every fault of the Hub, over LFS, multipart and Xet: pushes must survive it (minutes)
	$(BIN)/pytest -q -rP -m hub

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

reference: $(READY)  ## tests that install and run the real Megatron-Core
	$(BIN)/pytest -q -m reference

bench: $(READY)  ## speed and memory against cp (needs 40 GB of disk); results go to benchmarks/README.md by hand
	$(BIN)/python benchmarks/throughput.py

docs: $(READY)  ## regenerate the generated pages
	$(BIN)/python docs/generate.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

# An unpinned torch would bring gigabytes of CUDA packages to a machine without a GPU, so the pin comes first.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (a minute or two the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e '.[dev]'
	@touch $@
