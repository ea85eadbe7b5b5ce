# make demo      train a small Llama on 2 processes, stop, go on with 3, then with 1
# make test      lint, types of the built package, tests: about a quarter of an hour on 2 idle cores
# make thorough  the tests that take longest: whole training runs, compiled and in many combinations
# make compat    the tests that notice moved torch internals, on each torch of TORCHES
# make bench     autodist beside DDP, FSDP2 and (where installed) DeepSpeed
# make clean     remove everything the targets above made
#
# All of it happens in this folder: environments in .venv and .venv-torch-*, caches in .cache, runs in runs.

PYTHON ?= python3
TORCH ?= 2.13.0
TORCHES ?= 2.11.0 2.13.0 newest
STEPS ?= 100

# Seconds matter little, a moved import or signature a lot: one test a private interface, then training
# through all of them, without and with Inductor.
COMPAT_TESTS ?= tests/test_compat.py tests/test_passes.py \
	"tests/test_parity.py::test_two_ranks[llama-llama_tied]" "tests/test_parity.py::test_inductor[resnet]" \
	"tests/test_train_step.py::test_ten_steps[net-2]"

BIN := .venv/bin
CACHE := $(CURDIR)/.cache
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_CONSTRAINT := $(CURDIR)/.ci/constraints.txt
export TMPDIR := $(CACHE)/tmp
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/inductor
export TRITON_CACHE_DIR := $(CACHE)/triton
export HF_HOME := $(CACHE)/huggingface
export HF_HUB_OFFLINE := 1
export RUFF_CACHE_DIR := $(CACHE)/ruff
export MYPY_CACHE_DIR := $(CACHE)/mypy
PYTEST := -m pytest -o cache_dir=$(CACHE)/pytest
_ := $(shell mkdir -p $(TMPDIR))

# Inductor compiles C++ on a CPU. Without a compiler or Python's headers the demo runs the same passes
# and leaves the kernels to eager PyTorch.
CAN_COMPILE = import os, pathlib, shutil, sysconfig; \
	compiler = shutil.which(os.environ.get("CXX", "g++")); \
	header = pathlib.Path(sysconfig.get_path("include"), "Python.h"); \
	print("inductor" if compiler and header.exists() else "eager")

.PHONY: demo test lint types unit thorough compat bench clean
.DELETE_ON_ERROR:

demo: .venv/demo
	@lowering=$$($(BIN)/python -c '$(CAN_COMPILE)'); \
	test $$lowering = inductor || echo "No C++ compiler with Python's headers: lowering to eager PyTorch."; \
	run() { \
		ranks=$$1; shift; echo; echo "== $$ranks ranks: train_llama.py $$*"; \
		OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $$ranks examples/train_llama.py \
			--lowering $$lowering "$$@"; \
	}; \
	rm -rf runs/demo; \
	run 2 --steps $(STEPS) --save runs/demo && \
	run 3 --steps 20 --resume runs/demo --save runs/demo && \
	run 1 --steps 10 --resume runs/demo

test: lint types unit

lint: .venv/test
	$(BIN)/ruff check autodist passes runtime kernels tests benchmarks examples

# The package as users get it: the folders passes/, runtime/ and kernels/ become subpackages only in the wheel.
types: .venv/test
	rm -rf build $(CACHE)/wheel
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target $(CACHE)/wheel .
	cd $(CACHE)/wheel && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p autodist

unit: .venv/test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(PYTEST) -m "not thorough" --durations=30

thorough: .venv/test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(PYTEST) -m thorough --durations=30

compat: $(TORCHES:%=.venv-torch-%/test)
	@for torch in $(TORCHES); do \
		python=.venv-torch-$$torch/bin/python; \
		echo; echo "== torch $$($$python -c 'import torch; print(torch.__version__)')"; \
		TORCHINDUCTOR_CACHE_DIR=$(CACHE)/inductor-$$torch $$python $(PYTEST) -q $(COMPAT_TESTS) || exit 1; \
	done

bench: .venv/test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.compare

clean:
	rm -rf .venv .venv-torch-* .cache build *.egg-info runs
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- environments ------------------------------------------------------------------------------------
# torch first, at an exact version: where an index or folder offers a CPU build of it, pip prefers that
# one, and a bare "torch" would bring the newest, with gigabytes of CUDA libraries.

.venv/demo: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet --no-build-isolation -e '.[demo]'
	@touch $@

.venv/test: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet --no-build-isolation -e '.[test]' ninja
	@touch $@

.venv/torch: .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("autodist needs Python 3.10 or newer; run make PYTHON=..." \
		if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet setuptools numpy torch==$(TORCH)
	@touch $@

.venv-torch-%/test: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/pip install --quiet setuptools numpy torch$(patsubst ==newest,,==$*)
	.venv-torch-$*/bin/pip install --quiet --no-build-isolation -e '.[test]'
	@touch $@
