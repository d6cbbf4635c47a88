# PageLLM. `make` runs everything on the synthetic shop; `make help` lists the rest.
#
#   make ppo DATASET=toys RAW=path/to/files [RUN=name] [ARGS="--kl_coef 0.02"] [NPROC=2]
#
# A target makes what it needs first, then runs `pagellm <command>`. ARGS reach only the command asked for.
DATASET ?= synthetic
RUN ?= $(DATASET)
# Raw files: where RAW says; else data/raw/<dataset>, else a neighbour's, else fetched.
RAW ?= $(if $(wildcard data/raw/$(DATASET)),,$(wildcard ../shared/data/$(DATASET)))
ARGS ?=
NPROC ?= 1
SEED ?=
SEEDS ?= 0 1 2 3 4
# What `pagellm tune` kept of this run, where it was tuned.
TUNED := $(shell sed -n 's/.*--policies \([^ ]*\).*/\1/p' runs/$(RUN)/preset/evaluate 2>/dev/null)
ifeq ($(TUNED),)
POLICIES ?= popularity,sft,ppo,compose
else
POLICIES ?= $(TUNED)
endif
PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
ONE := $(PY) -m pagellm
# NPROC processes share a stage (torchrun); "--" keeps torchrun from reading a stage's options as its own.
ALL := $(if $(filter-out 1,$(NPROC)),$(VENV)/bin/torchrun --standalone --nproc_per_node $(NPROC) -m -- pagellm,$(ONE))
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# An option that is passed on only where its variable was given.
given = $(if $(filter file,$(origin $(1))),,$(2))
COMMON := --dataset $(DATASET) --run $(RUN) $(if $(SEED),--seed $(SEED))
RAW_ARG := $(if $(RAW),--raw $(RAW))
POLICIES_ARG := $(call given,POLICIES,--policies $(POLICIES))
comma := ,
WRITERS := $(subst $(comma), ,$(POLICIES))
$(if $(filter-out popularity sft ppo compose,$(WRITERS)),$(error POLICIES=$(POLICIES): want some of popularity,sft,ppo,compose))

PREPARED := data/$(DATASET)/source.json
JOURNEY := data/complete_journey/orders.parquet
ORDERED = $(if $(filter complete_journey,$(DATASET)),$(JOURNEY),$(PREPARED))
DONE := runs/$(RUN)
ROWS := $(DONE)/storefront/build/done
LAST := $(patsubst %,$(DONE)/%/done,$(filter sft ppo compose,sft $(WRITERS)))
# A log of one's own needs no run; --logging and its like name no log.
OWN_LOG := $(filter --log --log=%,$(ARGS))
SHOWN := $(if $(OWN_LOG),$(VENV)/installed,$(DONE)/evaluate/done)
STAGES := pretrain sft reward ppo compose evaluate
STEPS := storefront-build storefront-tune storefront-evaluate storefront-page
VERBS := recommend serve export features search baselines storefront $(STEPS) judge ope
STUDIES := ablation backbones coldstart crossdomain drift leaveout
OF_A_RUN := ranker caches load fuzz
.PHONY: all fit tune help install check test docs clean prepare $(STAGES) $(VERBS) abtest casestudy report $(STUDIES) seeds \
	$(OF_A_RUN) torture soak scaling bench gpu-check
.DEFAULT_GOAL := all
.DELETE_ON_ERROR:

PRESET := $(wildcard $(patsubst %,%/$(DATASET)/pretrain,presets pagellm/presets) $(patsubst %,%/$(DATASET)/sft,presets pagellm/presets))
all: $(if $(PRESET),$(DONE)/baselines/done evaluate,fit)  ## the whole pipeline; prints table and pages. A data set without a preset is tuned first: see fit
fit: | $(VENV)/installed  ## prepare, tune where there is no preset, the stages that pay, one table: ARGS="--minutes 15"
	$(ONE) fit $(COMMON) $(RAW_ARG) $(ARGS)
tune: | $(PREPARED)  ## choose stages and options on validation, within some minutes: ARGS="--minutes 15"
	$(ONE) tune $(COMMON) $(ARGS)
help:  ## this list
	@echo "make [target] [DATASET=synthetic] [RUN=<dataset>] [RAW=directory of raw files] [ARGS=\"--option value\"] [NPROC=1] [SEED=0]"
	@awk -F ':.*## ' '/^[a-z].*:.*## /{split($$1, name, " "); printf "  make %-11s %s\n", name[1], $$2}' $(MAKEFILE_LIST)
	@echo "  options of a command: $(VENV)/bin/pagellm <command> --help"
install: $(VENV)/installed  ## virtual environment with the base packages
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) . && touch $@
# Extra [%] of setup.cfg; a comma joins several.
$(VENV)/extra-%: $(VENV)/installed
	$(PIP) '.[$*]' && touch $@

# By name a stage is always asked, with ARGS; it says so if it is already done. Its `done` file, which a
# later stage needs, is made only if missing, with the defaults. So both stand before each colon.
prepare $(PREPARED): | $(VENV)/installed  ## raw files -> data/<dataset>
	$(ONE) prepare --dataset $(DATASET) $(RAW_ARG) $(if $(filter prepare,$@),$(ARGS))
pretrain $(DONE)/pretrain/done: | $(PREPARED)  ## next token and rating prediction on what the shop knows
sft $(DONE)/sft/done: | $(DONE)/pretrain/done  ## supervised fine-tuning on ground-truth pages
reward $(DONE)/reward/done: | $(DONE)/sft/done  ## reward model from preference pairs
ppo $(DONE)/ppo/done: | $(DONE)/reward/done  ## PPO against the reward model
compose $(DONE)/compose/done: | $(DONE)/sft/done  ## what will be picked, and how a page is made of it, chosen on validation
evaluate $(DONE)/evaluate/done: | $(LAST)  ## pages and the results table: popularity, SFT, PPO, composed pages; POLICIES=sft stops at SFT
baselines $(DONE)/baselines/done: | $(PREPARED)  ## plain recommenders, re-ranked too: settings chosen on validation (ARGS="--settings none": anew; --refit)
recommend: $(LAST)  ## one page in the terminal: ARGS="--user ID"; everybody's: ARGS="--all --out pages.parquet"
serve: $(VENV)/extra-serve $(LAST)  ## the pages in a browser and over HTTP: http://127.0.0.1:8000/
$(DONE)/export-ppo/done: | $(DONE)/ppo/done
export: $(DONE)/ppo/done  ## embeddings of items and users as .npy for a ranker of your own: ARGS="--dtype int8 --pca 32 --out export-small"
features: $(DONE)/ppo/done  ## dot(h_u, e_i) and the marginal page reward of (user, item) pairs: ARGS="--pairs pairs.parquet --out features.parquet"
search: $(VENV)/extra-search $(DONE)/export-ppo/done  ## item rows searched: queries a second, size; ARGS="--index hnsw --copies 30": by a graph too, its recall
storefront: | $(ORDERED)  ## a page of themed rows: built, tuned, scored; DATASET=complete_journey
storefront-build $(ROWS): | $(ORDERED)  ## its steps one by one: keywords, missions, factors, the scorer
storefront-tune: | $(ROWS)  ## weights of the score, chosen on validation rows
storefront-evaluate: | $(ROWS)  ## everybody's page of rows, scored beside rows without themes
storefront-page: | $(ROWS)  ## one page of rows in the terminal: ARGS="--user ID"
judge: $(DONE)/evaluate/done  ## SFT's pages against composed ones or PPO's, judged by rules; ARGS="--backend reward", http, replay
ope: $(SHOWN)  ## what PPO would earn, from SFT's SIMULATED log; ARGS="--log sessions.parquet"
command = $(if $(filter $(STAGES) recommend,$(1)),$(ALL),$(ONE)) $(subst -, ,$(1)) $(COMMON) $(if $(filter evaluate,$(1)),$(POLICIES_ARG))
$(STAGES) $(VERBS):
	$(call command,$@) $(ARGS)
$(patsubst %,$(DONE)/%/done,$(STAGES) baselines export-ppo): $(DONE)/%/done:
	$(call command,$(*:-ppo=))
$(ROWS):
	$(call command,storefront-build)
$(JOURNEY): | $(VENV)/installed
	$(ONE) journey $(RAW_ARG)
abtest: $(SHOWN)  ## SIMULATED online test of SFT against composed pages or PPO; your own log: ARGS="--log log.csv --control a"
	$(ONE) $(if $(OWN_LOG),abtest,simulator $(COMMON)) $(ARGS)
casestudy: $(DONE)/evaluate/done  ## prompt, true page, pages, hits and rewards slot by slot: ARGS="--user ID" (appendix H)
report: $(VENV)/extra-report  ## everything that RUN has left on disk in one HTML file: runs/<run>/report.html
casestudy report:
	$(ONE) $@ --run $(RUN) $(call given,DATASET,--dataset $(DATASET)) $(ARGS)

# A study has several runs: RUN, where it is given, names the study.
ablation:  ## the paper's Table 5 over several seeds
backbones:  ## GPT-2, Llama and Llama with adapters side by side: the paper's Table 3
coldstart:  ## half of the training interactions; users by how many they have
crossdomain:  ## trained on half of the departments, tested on the others through rows made of words
drift:  ## trained on the past, tested on what came after; with and without a time token
leaveout:  ## what the reward knows untaught: a kind of pair left out; its scores against held-out truth
$(STUDIES): | $(PREPARED)
seeds: | $(PREPARED)  ## the whole pipeline once for each of SEEDS, and one table with the baselines
	for seed in $(SEEDS); do $(MAKE) $(DONE)-s$$seed/evaluate/done RUN=$(RUN)-s$$seed SEED=$$seed || exit; done
	$(PY) -m experiments.seeds --dataset $(DATASET) --run $(RUN) --seeds $(subst $(eval) ,$(comma),$(SEEDS)) $(POLICIES_ARG) $(ARGS)
ranker: $(VENV)/extra-ranker  ## what dot(h_u, e_i) and the marginal page reward add to LightGBM, on held-out rows
caches:  ## requests that come back: hits of the prompt and user caches, seconds with and without
load: $(VENV)/extra-serve,load  ## latency and pages a second of serve under 1, 8, 32 clients, cost of each part; ARGS="--soak 10"
fuzz: $(VENV)/extra-serve,load  ## schemathesis against the OpenAPI document of serve
$(OF_A_RUN): $(DONE)/ppo/done
torture: $(VENV)/installed  ## pull the plug, fill the disk, feed rubbish: about five minutes, ends with counts
soak: $(VENV)/installed  ## all stages in a loop for half an hour: does anything grow?
	$(PY) -m experiments.stress.torture --suites soak $(ARGS)
gpu-check: $(VENV)/extra-dev  ## what wants a GPU, in 8 minutes: its tests, kernels, a training step, rollouts, PPO's waits; ends in JSON
	$(PY) -m experiments.cost.gpu_check $(ARGS)
scaling: $(VENV)/extra-report  ## time and memory of every stage as users, items, pages, histories grow: table, figure
module = $(subst /,.,$(basename $(wildcard experiments/$@.py experiments/*/$@.py)))
study = --dataset $(DATASET) $(call given,RUN,--study $(RUN)) $(RAW_ARG)
$(STUDIES) $(OF_A_RUN) torture scaling:
	$(PY) -m $(module) $(if $(filter $(STUDIES),$@),$(study)) $(if $(filter $(OF_A_RUN),$@),$(COMMON)) $(ARGS)
# Rows chosen by --only, and --profile, are of experiments.cost.bench alone.
bench: $(VENV)/extra-dev  ## every hot path beside a peer; BASE=<commit>: this commit against another, by turns; ARGS=--profile: parts
	$(if $(BASE)$(filter --only% --profile,$(ARGS)),,$(PY) -m kernels.bench $(filter --quick,$(ARGS)) \
		$(if $(filter cuda --device=cuda,$(ARGS)),--device cuda))
	$(PY) -m experiments.cost.bench $(if $(BASE),--base $(BASE)) $(ARGS)

check: $(VENV)/extra-dev  ## rules, format, types and the quick tests, before a commit
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	$(RUN_TESTS) -q -m quick $(ARGS)
test: $(VENV)/installed  ## all tests
	$(RUN_TESTS) $(ARGS)
# Where pytest-xdist is installed (the extra dev), two processes share the tests.
XDIST = $(if $(wildcard $(VENV)/lib/python*/site-packages/xdist),-n 2 --dist loadfile --no-loadscope-reorder)
RUN_TESTS = $(if $(XDIST),OMP_NUM_THREADS=1) $(PY) -m pytest $(XDIST)
docs: $(VENV)/extra-docs,serve  ## the documentation as a site: site/index.html
	$(PY) docs/generate.py && $(PY) -m mkdocs build --strict
	$(PY) -m pdoc --output-directory site/api pagellm '!pagellm.baselines.outside'
clean:  ## remove runs of RUN (prepared data and other runs stay)
	rm -rf runs/$(RUN)
