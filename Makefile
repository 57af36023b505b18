# Every target works from a fresh clone; `make help` lists them.
PYTHON ?= python3
# Version of torch to install, from the constraints file unless given: make test TORCH=2.11.0
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
CORES := $(shell getconf _NPROCESSORS_ONLN)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu lint format types dist bench crosscheck clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: .venv/torch-$(TORCH) ## create .venv with the package, its extras and tools, at pinned versions

# Another torch than the pinned one brings its own triton; the interpreter of 3.6 fails with numpy 2.4.
.venv/torch-$(TORCH): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	rm -f .venv/torch-*
	sed "s/^torch==.*/torch==$(TORCH)/" constraints.txt > .venv/constraints.txt
	test "$(TORCH)" = "$$(sed -n 's/^torch==//p' constraints.txt)" || sed -i.bak "/^triton==/d; s/^numpy==.*/numpy<2.4/" .venv/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/torch-$(TORCH) ## train, evaluate and sample a small language model on real text, in minutes on a CPU
	test -d corpora/demo || $(BIN)/gdn2 prepare --corpus stdlib --mix-recall 50000 --out corpora/demo
	rm -rf runs/demo
	$(BIN)/gdn2 train examples/demo.yaml --run runs/demo
	$(BIN)/gdn2 eval runs/demo --samples 200
	$(BIN)/gdn2 eval runs/demo --tasks niah_single_1 --length 640 --samples 20
	$(BIN)/gdn2 generate runs/demo --prompt "def " --tokens 300 --seed 1
	$(BIN)/gdn2 plot runs/demo

test: .venv/torch-$(TORCH) lint types ## check style and types, then run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist worksteal

test-gpu: ## run the tests marked gpu, with PYTHON as it is: a torch for CUDA, pytest, pytest-xdist
	OMP_NUM_THREADS=1 PYTHONPATH=src $(PYTHON) -m pytest -m gpu -n $(CORES) --dist worksteal -p no:benchmark $$(grep -rl --include='test_*.py' mark.gpu tests)

lint: .venv/torch-$(TORCH) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/torch-$(TORCH) ## put the code in style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/torch-$(TORCH) ## check types
	$(BIN)/mypy

dist: .venv/torch-$(TORCH) ## build wheel and sdist, install each in a clean environment and try it
	rm -rf dist
	$(BIN)/python -m build --quiet
	for file in dist/*.whl dist/*.tar.gz; do \
		rm -rf .venv/smoke && $(PYTHON) -m venv .venv/smoke && \
		.venv/smoke/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt torch==$(TORCH) $$file && \
		.venv/smoke/bin/python tests/smoke.py && .venv/smoke/bin/gdn2 --version || exit 1; \
	done
	rm -rf .venv/smoke

bench: .venv/torch-$(TORCH) ## time the operator on this machine's CPU, beside fla-core's naive loops
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps fla-core==0.6.0
	$(BIN)/python benchmarks/cpu_operator.py

crosscheck: .venv/torch-$(TORCH) ## hold the mixers to fla-core's naive functions and to the layers of transformers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps fla-core==0.6.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt einops==0.8.2 transformers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/crosschecks

clean: ## remove everything that the other targets made
	rm -rf .venv dist runs corpora .pytest_cache .mypy_cache .ruff_cache
