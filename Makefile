# PageLLM. `make` runs everything on the synthetic shop; `make help` lists the rest.
#
#   make ppo DATASET=toys RAW=path/to/files [RUN=name] [ARGS="--kl_coef 0.02"] [NPROC=2]
#
# A stage makes what it needs first. ARGS reach only the stage asked for.

DATASET ?= synthetic
RUN ?= $(DATASET)
RAW ?=
ARGS ?=
NPROC ?= 1
PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
# NPROC processes share a stage (torchrun); "--" keeps torchrun from reading a stage's options as its own.
STAGE := $(if $(filter-out 1,$(NPROC)),$(VENV)/bin/torchrun --standalone --nproc_per_node $(NPROC) -m --,$(PY) -m)
STAGES := prepare pretrain sft reward ppo evaluate
BASE := --dataset $(DATASET) --run $(RUN)
DONE := runs/$(RUN)
PREPARED := data/$(DATASET)/source.json
RAW_ARG := $(if $(RAW),--raw $(RAW))
# presets/<dataset>/<stage> holds options found to fit a data set and two cores; ARGS override them.
PRESET = $(addprefix @,$(wildcard presets/$(DATASET)/$(1)))

.PHONY: all help install test lint serve recommend report load fuzz export ablation abtest ope judge baselines \
	coldstart bench torture soak clean $(STAGES)
.DEFAULT_GOAL := all
.DELETE_ON_ERROR:

all: evaluate  ## the whole pipeline: prepare, pretrain, sft, reward, ppo, evaluate; prints table and pages

help:  ## this list
	@echo "make [target] [DATASET=synthetic] [RUN=<dataset>] [RAW=directory of raw files] [ARGS=\"--field value\"] [NPROC=1]"
	@awk -F ':.*## ' '/^[a-z][a-z ]*:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  fields of a stage: $(PY) -m pagellm.<stage> --help   (prepare: pagellm.data.prepare)"

install: $(VENV)/installed  ## virtual environment with the base packages

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

# Each stage twice: by name (always asked, with ARGS; it says so if it is already done) and by its `done` file,
# which a later stage needs (made only if missing, with the defaults).
prepare: $(VENV)/installed  ## raw files -> data/<dataset>
	$(PY) -m pagellm.data.prepare --dataset $(DATASET) $(RAW_ARG) $(ARGS)

$(PREPARED): | $(VENV)/installed
	$(PY) -m pagellm.data.prepare --dataset $(DATASET) $(RAW_ARG)

pretrain: $(PREPARED)  ## next token and rating prediction on what the shop knows
	$(STAGE) pagellm.pretrain $(BASE) $(call PRESET,pretrain) $(ARGS)

$(DONE)/pretrain/done: | $(PREPARED)
	$(STAGE) pagellm.pretrain $(BASE) $(call PRESET,pretrain)

sft: $(DONE)/pretrain/done  ## supervised fine-tuning on ground-truth pages
	$(STAGE) pagellm.sft $(BASE) $(call PRESET,sft) $(ARGS)

$(DONE)/sft/done: | $(DONE)/pretrain/done
	$(STAGE) pagellm.sft $(BASE) $(call PRESET,sft)

reward: $(DONE)/sft/done  ## reward model from preference pairs
	$(STAGE) pagellm.reward $(BASE) $(call PRESET,reward) $(ARGS)

$(DONE)/reward/done: | $(DONE)/sft/done
	$(STAGE) pagellm.reward $(BASE) $(call PRESET,reward)

ppo: $(DONE)/reward/done  ## PPO against the reward model
	$(STAGE) pagellm.ppo $(BASE) $(call PRESET,ppo) $(ARGS)

$(DONE)/ppo/done: | $(DONE)/reward/done
	$(STAGE) pagellm.ppo $(BASE) $(call PRESET,ppo)

evaluate: $(DONE)/ppo/done  ## pages and the results table: popularity, SFT, PageLLM
	$(STAGE) pagellm.evaluate $(BASE) $(ARGS)

$(DONE)/evaluate/done: | $(DONE)/ppo/done
	$(STAGE) pagellm.evaluate $(BASE)

serve: $(VENV)/serve $(DONE)/ppo/done  ## the pages in a browser and over HTTP: http://127.0.0.1:8000/
	$(PY) -m pagellm.serve $(BASE) $(ARGS)

load: $(VENV)/load $(DONE)/ppo/done  ## latency and pages a second of serve under 1, 8, 32 clients, cost of each part; ARGS="--soak 10"
	$(PY) -m experiments.load $(BASE) $(ARGS)

fuzz: $(VENV)/load $(DONE)/ppo/done  ## schemathesis against the OpenAPI document of serve
	$(PY) -m experiments.fuzz $(BASE) $(ARGS)

recommend: $(DONE)/ppo/done  ## one page in the terminal: ARGS="--user ID"; everybody's: ARGS="--all --out pages.parquet"
	$(STAGE) pagellm.recommend $(BASE) $(ARGS)

# It shows what is there and names what is missing, so it needs no stage; DATASET only if it is given.
report: $(VENV)/report  ## everything about RUN in one HTML file: runs/<run>/report.html
	$(PY) -m experiments.report --run $(RUN) $(if $(filter file,$(origin DATASET)),,--dataset $(DATASET)) $(ARGS)

export: $(DONE)/ppo/done  ## embeddings of items and users as .npy for a ranker of your own: ARGS="--dtype int8 --pca 32"
	$(PY) -m pagellm.export $(BASE) $(ARGS)

ablation: $(VENV)/installed  ## the paper's Table 5 over several seeds
	$(PY) -m experiments.ablation --dataset $(DATASET) $(ARGS)

baselines: | $(PREPARED)  ## popularity, ItemKNN, EASE, ALS: chosen on validation, refitted, one table
	$(PY) -m experiments.baselines $(BASE) --refit $(ARGS)

coldstart: $(VENV)/installed  ## half of the training interactions; users by how many they have
	$(PY) -m experiments.coldstart --dataset $(DATASET) $(RAW_ARG) $(ARGS)

abtest: $(if $(findstring --log,$(ARGS)),$(VENV)/installed,$(DONE)/evaluate/done)  ## SIMULATED online test of SFT against PPO; your own log: ARGS="--log log.csv --control a"
	$(PY) -m $(if $(findstring --log,$(ARGS)),experiments.abtest,experiments.simulator $(BASE)) $(ARGS)

ope: $(if $(findstring --log,$(ARGS)),$(VENV)/installed,$(DONE)/evaluate/done)  ## what PPO would earn, from SFT's SIMULATED log; ARGS="--log sessions.parquet"
	$(PY) -m experiments.ope $(BASE) $(ARGS)

judge: $(DONE)/evaluate/done  ## SFT's pages against PPO's, judged by rules; ARGS="--backend reward", http, replay
	$(PY) -m experiments.judge $(BASE) $(ARGS)

torture: $(VENV)/installed  ## pull the plug, fill the disk, feed rubbish: about five minutes, ends with counts
	$(PY) -m experiments.torture $(ARGS)

soak: $(VENV)/installed  ## all stages in a loop for half an hour: does anything grow?
	$(PY) -m experiments.torture --suites soak $(ARGS)

bench: $(VENV)/installed  ## kernels: plain against ours
	$(PY) -m kernels.bench $(ARGS)

test: $(VENV)/installed  ## all tests
	$(PY) -m pytest $(ARGS)

lint: $(VENV)/dev  ## ruff
	$(PY) -m ruff check --select E,F,W,I,B,UP --line-length 120 .

$(VENV)/dev: $(VENV)/installed
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/serve: $(VENV)/installed
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[serve]'
	touch $@

$(VENV)/load: $(VENV)/serve
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[serve,load]'
	touch $@

$(VENV)/report: $(VENV)/installed
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[report]'
	touch $@

clean:  ## remove runs of RUN (prepared data and other runs stay)
	rm -rf runs/$(RUN)
