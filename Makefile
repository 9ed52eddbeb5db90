# make demo   set up and run the main job on what the repository holds
# make test   set up and run the tests; make test-fast those of the units, in less than two minutes
# make docs   the documentation site, in site/
# make bench  the benchmarks: tables in benchmarks/results/
# make bench-flower  what a round on Flower costs, ours against FedAvg tensor by tensor (about twenty minutes): docs/scale.md
# make fuzz   damaged and hostile files into every loader (minutes; ARGS="--cases 20000 --write" for more): fuzz/results/
# make verify what the zoo's records say, measured again
# make lint   style and types
# make paper  the defended federations on real data: tables in paper_repro/ (hours; needs DATA and what make zoo kept; ARGS=--full for every axis)
# make repro-small  some of the committed federations again, compared number by number (under 15 minutes on two cores; needs DATA)
# make smollm2  adapters, studies and probes of SmolLM2-135M-Instruct, taught to refuse (hours; needs DATA)
# make zoo    train the base model, the labelled adapters and the probes anew (hours; needs DATA)

PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13 3.14,$(shell command -v python$(v))) python3)
VENV := .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
JOBS ?= 2
# Where no NVIDIA driver is, torch comes without gigabytes of CUDA libraries; TORCH_INDEX= takes PyPI's.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(PIP) --no-deps --retries 0 --timeout 10 $(TORCH_INDEX:%=--extra-index-url %) torch
# The tests of the units: neither processes nor engines.
FAST := tests/loraprobe tests/fedloop --ignore=tests/loraprobe/serve --ignore=tests/loraprobe/hub \
	--ignore=tests/fedloop/flower --ignore=tests/fedloop/plugins
DEMO := $(VENV)/.demo
STAMP := $(VENV)/.set-up

.PHONY: setup demo test test-fast docs bench bench-flower fuzz verify lint paper repro-small zoo smollm2 clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	$(TORCH)
	$(PIP) -e '.[cli,xgboost,figures,fed]'
	touch $(DEMO)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(TORCH)
	$(PIP) -e '.[dev]'
	touch $(STAMP) $(DEMO)

demo: $(DEMO)
	$(BIN)/python -m zoo.demo
	$(BIN)/python -m zoo.demo_federation

test: setup
	$(BIN)/python -m pytest -n $(JOBS)

test-fast: setup
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(FAST)

docs: setup
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.overhead_8b
	$(BIN)/python -m benchmarks.base_digest

bench-flower: setup
	$(BIN)/python -m benchmarks.flower.cost

fuzz: setup
	$(BIN)/python -m fuzz $(ARGS)

verify: setup
	$(BIN)/python -m zoo.verify $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

zoo: setup
	$(BIN)/python -m zoo.build --data $(DATA)

smollm2: setup
	$(BIN)/python -m zoo.bases smollm2-135m out/smollm2-135m
	$(BIN)/python -m zoo.bases smollm2-135m-safe out/smollm2-135m-safe
	$(BIN)/python -m zoo.smollm2.clients --base out/smollm2-135m-safe --out out/clients/safe --data $(DATA) --count 360
	$(BIN)/python -m zoo.smollm2.clients --base out/smollm2-135m-safe --out out/clients/safe --data $(DATA) --count 360 --manifest safe
	$(BIN)/python -m zoo.smollm2.study out/clients/safe zoo/adapters/smollm2-135m-safe --out zoo/smollm2/records/smollm2-135m-safe.json
	$(BIN)/python -m zoo.smollm2.cohorts out/clients/safe zoo/adapters/smollm2-135m-safe
	$(BIN)/python -m zoo.smollm2.probes safe out/clients/safe
	$(BIN)/python -m zoo.smollm2.page

paper: setup
	$(BIN)/python -m paper_repro.common.held_out --data $(DATA)
	$(BIN)/python -m paper_repro.evidence.record
	$(BIN)/python -m paper_repro.evidence.accumulation
	$(BIN)/python -m paper_repro.grid.run $(ARGS)
	$(BIN)/python -m paper_repro.grid.machines --data $(DATA)
	$(BIN)/python -m paper_repro.grid.overhead
	$(BIN)/python -m paper_repro.initial_adapter --data $(DATA)
	$(BIN)/python -m paper_repro.initial_adapter.probe
	$(BIN)/python -m paper_repro.mixed.labelled --data $(DATA)
	$(BIN)/python -m paper_repro.mixed.federations --data $(DATA)
	$(BIN)/python -m paper_repro.mixed.damage --data $(DATA)
	$(BIN)/python -m paper_repro.mixed.grid
	$(BIN)/python -m paper_repro.mixed.levers
	$(BIN)/python -m paper_repro.mixed.bases
	$(BIN)/python -m paper_repro.mixed.accumulated
	$(BIN)/python -m paper_repro.mixed.federations --draws 1 2 --data $(DATA)
	$(BIN)/python -m paper_repro.mixed.fresh
	$(BIN)/python -m paper_repro.mixed.probes
	$(BIN)/python -m paper_repro.separability.sweeps --data $(DATA)
	$(BIN)/python -m paper_repro.separability.drift --data $(DATA)
	$(BIN)/python -m paper_repro.separability.run --data $(DATA)
	$(BIN)/python -m paper_repro.separability.coordinates
	$(BIN)/python -m paper_repro.attackers.record
	$(BIN)/python -m paper_repro.attackers.run
	$(BIN)/python -m paper_repro.tables

repro-small: setup
	$(BIN)/python -m paper_repro.check --small --data $(DATA) $(ARGS)
	$(BIN)/python -m paper_repro.tables --check

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
