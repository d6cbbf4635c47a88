# PageLLM. `make` runs everything on the synthetic shop; `make help` lists the rest.
#
#   make ppo DATASET=toys RAW=path/to/files [RUN=name] [ARGS="--kl_coef 0.02"] [NPROC=2]
#
# A stage makes what it needs first. ARGS reach only the stage asked for.

DATASET ?= synthetic
RUN ?= $(DATASET)
# Raw files: where RAW says; else data/raw/<dataset>, else a neighbour's, else fetched.
RAW ?= $(if $(wildcard data/raw/$(DATASET)),,$(wildcard ../shared/data/$(DATASET)))
ARGS ?=
NPROC ?= 1
SEED ?=
SEEDS ?= 0 1 2 3 4
POLICIES ?= popularity,sft,ppo
PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
comma := ,
# NPROC processes share a stage (torchrun); "--" keeps torchrun from reading a stage's options as its own.
STAGE := $(if $(filter-out 1,$(NPROC)),$(VENV)/bin/torchrun --standalone --nproc_per_node $(NPROC) -m --,$(PY) -m)
STAGES := prepare pretrain sft reward ppo evaluate
COMMON := --dataset $(DATASET) --run $(RUN) $(if $(SEED),--seed $(SEED))
DONE := runs/$(RUN)
PREPARED := data/$(DATASET)/source.json
RAW_ARG := $(if $(RAW),--raw $(RAW))
# A study has several runs: RUN, where it is given, names the study.
STUDY := $(if $(filter file,$(origin RUN)),,--study $(RUN))
# pagellm/presets/<dataset>/<stage> holds options found to fit a data set and two cores; ARGS override them. A study hands
# them to its stages: $(call PRESETS,pretrain sft) is --pretrain=@pagellm/presets/toys/pretrain --sft=@pagellm/presets/toys/sft. All
# rows of backbones begin from a published trunk, where other options fit: pagellm/presets/<dataset>/backbones/<stage>.
PRESET = $(addprefix @,$(wildcard pagellm/presets/$(DATASET)/$(1)))
PRESETS = $(foreach stage,$(1),$(addprefix --$(stage)=,$(call PRESET,$(2)$(stage))))

.PHONY: all help install test lint serve recommend report load fuzz export ablation abtest ope judge backbones baselines seeds \
	coldstart leaveout casestudy features ranker search caches crossdomain drift bench scaling torture soak clean $(STAGES)
.DEFAULT_GOAL := all
.DELETE_ON_ERROR:

all: evaluate  ## the whole pipeline: prepare, pretrain, sft, reward, ppo, evaluate; prints table and pages

help:  ## this list
	@echo "make [target] [DATASET=synthetic] [RUN=<dataset>] [RAW=directory of raw files] [ARGS=\"--field value\"] [NPROC=1] [SEED=0]"
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
	$(PY) -m pagellm.data.prepare --dataset $(DATASET) $(RAW_ARG) $(call PRESET,prepare) $(ARGS)

$(PREPARED): | $(VENV)/installed
	$(PY) -m pagellm.data.prepare --dataset $(DATASET) $(RAW_ARG) $(call PRESET,prepare)

pretrain: $(PREPARED)  ## next token and rating prediction on what the shop knows
	$(STAGE) pagellm.pretrain $(COMMON) $(call PRESET,pretrain) $(ARGS)

$(DONE)/pretrain/done: | $(PREPARED)
	$(STAGE) pagellm.pretrain $(COMMON) $(call PRESET,pretrain)

sft: $(DONE)/pretrain/done  ## supervised fine-tuning on ground-truth pages
	$(STAGE) pagellm.sft $(COMMON) $(call PRESET,sft) $(ARGS)

$(DONE)/sft/done: | $(DONE)/pretrain/done
	$(STAGE) pagellm.sft $(COMMON) $(call PRESET,sft)

reward: $(DONE)/sft/done  ## reward model from preference pairs
	$(STAGE) pagellm.reward $(COMMON) $(call PRESET,reward) $(ARGS)

$(DONE)/reward/done: | $(DONE)/sft/done
	$(STAGE) pagellm.reward $(COMMON) $(call PRESET,reward)

ppo: $(DONE)/reward/done  ## PPO against the reward model
	$(STAGE) pagellm.ppo $(COMMON) $(call PRESET,ppo) $(ARGS)

$(DONE)/ppo/done: | $(DONE)/reward/done
	$(STAGE) pagellm.ppo $(COMMON) $(call PRESET,ppo)

# POLICIES=sft stops at SFT.
POLICIES_ARG = $(if $(filter file,$(origin POLICIES)),,--policies $(POLICIES))
$(if $(filter-out popularity sft ppo,$(subst $(comma), ,$(POLICIES))),$(error POLICIES=$(POLICIES): want some of \
popularity,sft,ppo))
FIRST := $(DONE)/$(if $(filter ppo,$(subst $(comma), ,$(POLICIES))),ppo,sft)/done
evaluate: $(FIRST)  ## pages and the results table: popularity, SFT, PageLLM
	$(STAGE) pagellm.evaluate $(COMMON) $(POLICIES_ARG) $(ARGS)

$(DONE)/evaluate/done: | $(FIRST)
	$(STAGE) pagellm.evaluate $(COMMON) $(POLICIES_ARG)

serve: $(VENV)/serve $(DONE)/ppo/done  ## the pages in a browser and over HTTP: http://127.0.0.1:8000/
	$(PY) -m pagellm.serving.serve $(COMMON) $(ARGS)

load: $(VENV)/load $(DONE)/ppo/done  ## latency and pages a second of serve under 1, 8, 32 clients, cost of each part; ARGS="--soak 10"
	$(PY) -m experiments.stress.load $(COMMON) $(ARGS)

fuzz: $(VENV)/load $(DONE)/ppo/done  ## schemathesis against the OpenAPI document of serve
	$(PY) -m experiments.stress.fuzz $(COMMON) $(ARGS)

recommend: $(DONE)/ppo/done  ## one page in the terminal: ARGS="--user ID"; everybody's: ARGS="--all --out pages.parquet"
	$(STAGE) pagellm.serving.recommend $(COMMON) $(ARGS)

# It shows what is there and names what is missing, so it needs no stage; DATASET only if it is given.
report: $(VENV)/report  ## everything about RUN in one HTML file: runs/<run>/report.html
	$(PY) -m pagellm.report.report --run $(RUN) $(if $(filter file,$(origin DATASET)),,--dataset $(DATASET)) $(ARGS)

export: $(DONE)/ppo/done  ## embeddings of items and users as .npy for a ranker of your own: ARGS="--dtype int8 --pca 32 --out export-small"
	$(PY) -m pagellm.serving.export $(COMMON) $(ARGS)

ablation: | $(PREPARED)  ## the paper's Table 5 over several seeds
	$(PY) -m experiments.ablation --dataset $(DATASET) $(STUDY) $(RAW_ARG) $(call PRESETS,pretrain sft reward ppo) $(ARGS)

backbones: | $(PREPARED)  ## GPT-2, Llama and Llama with adapters side by side: the paper's Table 3
	$(PY) -m experiments.backbones --dataset $(DATASET) $(STUDY) $(RAW_ARG) $(call PRESETS,pretrain sft reward ppo,backbones/) $(ARGS)

# Settings that an earlier search found are in pagellm/presets/; ARGS="--settings=" searches anew.
SETTINGS := $(if $(findstring --settings,$(ARGS)),,$(addprefix --settings ,$(wildcard pagellm/presets/$(DATASET)/baselines.json)))
baselines: | $(PREPARED)  ## popularity, ItemKNN, EASE, ALS: settings chosen on validation, refitted, one table
	$(PY) -m pagellm.baselines.compare $(COMMON) --refit $(SETTINGS) $(ARGS)

seeds: | $(PREPARED)  ## the whole pipeline once for each of SEEDS, and one table with the baselines
	for seed in $(SEEDS); do $(MAKE) $(DONE)-s$$seed/evaluate/done RUN=$(RUN)-s$$seed SEED=$$seed || exit; done
	$(PY) -m experiments.seeds --dataset $(DATASET) --run $(RUN) --seeds $(subst $(eval) ,$(comma),$(SEEDS)) \
		$(POLICIES_ARG) $(ARGS)

coldstart: | $(PREPARED)  ## half of the training interactions; users by how many they have
	$(PY) -m experiments.coldstart --dataset $(DATASET) $(STUDY) $(RAW_ARG) $(call PRESETS,pretrain sft reward ppo) $(ARGS)

leaveout: | $(PREPARED)  ## what the reward knows untaught: a kind of pair left out; its scores against held-out truth
	$(PY) -m experiments.leaveout --dataset $(DATASET) $(STUDY) $(RAW_ARG) $(call PRESETS,pretrain sft reward) $(ARGS)

# A log of one's own needs no run; --logging and its like name no log.
OWN_LOG = $(filter --log --log=%,$(ARGS))
abtest: $(if $(OWN_LOG),$(VENV)/installed,$(DONE)/evaluate/done)  ## SIMULATED online test of SFT against PPO; your own log: ARGS="--log log.csv --control a"
	$(PY) -m $(if $(OWN_LOG),pagellm.online.abtest,pagellm.online.simulator $(COMMON)) $(ARGS)

ope: $(if $(OWN_LOG),$(VENV)/installed,$(DONE)/evaluate/done)  ## what PPO would earn, from SFT's SIMULATED log; ARGS="--log sessions.parquet"
	$(PY) -m pagellm.online.ope $(COMMON) $(ARGS)

judge: $(DONE)/evaluate/done  ## SFT's pages against PPO's, judged by rules; ARGS="--backend reward", http, replay
	$(PY) -m pagellm.online.judge $(COMMON) $(ARGS)

casestudy: $(DONE)/evaluate/done  ## prompt, true page, pages, hits and rewards slot by slot: ARGS="--user ID" (appendix H)
	$(PY) -m pagellm.report.casestudy --run $(RUN) $(ARGS)

features: $(DONE)/ppo/done  ## dot(h_u, e_i) and the marginal page reward of (user, item) pairs: ARGS="--pairs pairs.parquet --out features.parquet"
	$(PY) -m pagellm.serving.features $(COMMON) $(ARGS)

ranker: $(VENV)/ranker $(DONE)/ppo/done  ## what dot(h_u, e_i) and the marginal page reward add to LightGBM, on held-out rows
	$(PY) -m experiments.ranker $(COMMON) $(ARGS)

search: $(VENV)/search $(DONE)/export-ppo/done  ## HNSW over the item rows: recall, queries a second, size; ARGS="--copies 30"
	$(PY) -m pagellm.serving.search $(COMMON) $(ARGS)

$(DONE)/export-ppo/done: | $(DONE)/ppo/done
	$(PY) -m pagellm.serving.export $(COMMON)

caches: $(DONE)/ppo/done  ## requests that come back: hits of the prompt and user caches, seconds with and without
	$(PY) -m experiments.cost.caches $(COMMON) $(ARGS)

crossdomain: | $(PREPARED)  ## trained on half of the departments, tested on the others through rows made of words
	$(PY) -m experiments.crossdomain --dataset $(DATASET) $(STUDY) $(RAW_ARG) $(call PRESETS,pretrain sft) $(ARGS)

drift: | $(PREPARED)  ## trained on the past, tested on what came after; with and without a time token
	$(PY) -m experiments.drift --dataset $(DATASET) $(STUDY) $(RAW_ARG) $(call PRESETS,prepare pretrain sft) $(ARGS)

torture: $(VENV)/installed  ## pull the plug, fill the disk, feed rubbish: about five minutes, ends with counts
	$(PY) -m experiments.stress.torture $(ARGS)

soak: $(VENV)/installed  ## all stages in a loop for half an hour: does anything grow?
	$(PY) -m experiments.stress.torture --suites soak $(ARGS)

# Rows chosen by --only, and --profile, are of experiments.cost.bench alone.
bench: $(VENV)/dev  ## every hot path beside a peer; BASE=<commit>: this commit against another, by turns; ARGS=--profile: parts
	$(if $(BASE)$(filter --only% --profile,$(ARGS)),,$(PY) -m kernels.bench $(filter --quick,$(ARGS)) \
		$(if $(filter cuda --device=cuda,$(ARGS)),--device cuda))
	$(PY) -m experiments.cost.bench $(if $(BASE),--base $(BASE)) $(ARGS)

scaling: $(VENV)/report  ## time and memory of every stage as users, items, pages, histories grow: table, figure
	$(PY) -m experiments.cost.scaling $(ARGS)

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

$(VENV)/ranker: $(VENV)/installed
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ranker]'
	touch $@

$(VENV)/search: $(VENV)/installed
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[search]'
	touch $@

clean:  ## remove runs of RUN (prepared data and other runs stay)
	rm -rf runs/$(RUN)
