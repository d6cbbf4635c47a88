# PageLLM. `make` runs everything on the synthetic shop; `make help` lists the rest.
#   make ppo DATASET=toys RAW=path/to/files [RUN=name] [ARGS="--kl_coef 0.02"] [NPROC=2]
# A target makes what it needs first, then runs `pagellm <command>`. ARGS reach only the command asked for.
DATASET ?= synthetic
RUN ?= $(DATASET)
# Raw files: where RAW says; else data/raw/<dataset>, else a neighbour's, else fetched.
RAW ?= $(if $(wildcard data/raw/$(DATASET)),,$(wildcard ../shared/data/$(DATASET)))
ARGS ?=
NPROC ?= 1
SEED ?=
SEEDS ?= 0 1 2 3 4
PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
ONE := $(PY) -m pagellm
# NPROC processes share a stage (torchrun); "--" keeps torchrun from reading a stage's options as its own.
TORCHRUN := $(VENV)/bin/torchrun --standalone --nproc_per_node $(NPROC) -m -- pagellm
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# An option that is passed on only where its variable was given.
given = $(if $(filter file,$(origin $(1))),,$(2))
COMMON := --dataset $(DATASET) --run $(RUN) $(if $(SEED),--seed $(SEED))
fit_options := $(if $(RAW),--raw $(RAW))
evaluate_options := $(if $(POLICIES),--policies $(POLICIES))
# What evaluate reads: POLICIES; else what `pagellm tune` kept of this run; else all.
TUNED := $(shell sed -n 's/.*--policies \([^ ]*\).*/\1/p' runs/$(RUN)/preset/evaluate 2>/dev/null)
READ := sft $(shell echo $(or $(POLICIES),$(TUNED),ppo compose) | tr , ' ')
$(if $(filter-out popularity sft ppo compose,$(READ)),$(error POLICIES: want some of popularity,sft,ppo,compose))
DONE := runs/$(RUN)
LAST := $(patsubst %,$(DONE)/%/done,$(filter $(READ),sft ppo compose))
PREPARED := data/$(DATASET)/source.json
# What PPO is paid by: pairs need the stage reward; --item_reward outcome needs compose, and with
# --w_page 0 no reward. Options count of the run's preset, else the data set's, and of ARGS.
PAID := $(firstword $(wildcard $(foreach at,$(DONE)/preset presets/$(DATASET) pagellm/presets/$(DATASET),$(at)/ppo)))
PAID := $(shell cat $(PAID) /dev/null | sed 's/\#.*//' | tr '=' ' ') $(if $(filter ppo,$(MAKECMDGOALS)),$(subst =, ,$(ARGS)))
PAID := $(subst --w_page 0.0 ,--w_page 0 ,$(subst --, --,$(PAID)) )
OUTCOME := $(findstring --item_reward outcome ,$(PAID))
PAYS := $(if $(OUTCOME),compose) $(if $(and $(OUTCOME),$(findstring --w_page 0 ,$(PAID))),,reward)
JOURNEY := data/complete_journey/orders.parquet
ORDERED = $(if $(filter complete_journey,$(DATASET)),$(JOURNEY),$(PREPARED))
ROWS := $(DONE)/storefront/build/done
# A log of one's own needs no run; --logging and its like name no log.
OWN_LOG := $(filter --log --log=%,$(ARGS))
SHOWN := $(if $(OWN_LOG),$(VENV)/installed,$(DONE)/evaluate/done)
STAGES := pretrain sft reward ppo compose evaluate
STEPS := $(addprefix storefront-,build trees tune evaluate cache page label judge)
VERBS := fit tune recommend serve export features search baselines storefront $(STEPS) judge ope
STUDIES := ablation backbones coldstart crossdomain drift leaveout repeats stages updates
OF_A_RUN := ranker caches load fuzz
MEASURES := torture gpu-check scaling bench seeds
.PHONY: $(STUDIES) $(OF_A_RUN) $(MEASURES) $(shell sed -n 's/^\([a-z-]*\)[ :].*  ##.*/\1/p' Makefile)
.DELETE_ON_ERROR:

PRESET := $(wildcard $(foreach at,presets pagellm/presets,$(at)/$(DATASET)/pretrain $(at)/$(DATASET)/sft))
all: $(if $(PRESET),$(DONE)/baselines/done evaluate,fit)  ## prepare to evaluate; without a preset: fit
help:  ## this list
	@echo 'make [target] [DATASET=name] [RUN=name] [RAW=files] [NPROC=1] [ARGS="--option value"]'
	@sed -n 's/^\([a-z-]*\)[ :].*  ## \(.*\)/  \1\t\2/p' Makefile | expand -t 23
	@for it in $(STUDIES) $(OF_A_RUN) $(MEASURES); do printf '  %-21s' $$it; \
		cat experiments/$${it%-*}*.py experiments/*/$${it%-*}*.py 2>/dev/null | sed -n '1s/"""//p'; done
install: $(VENV)/installed  ## virtual environment with the base packages
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) . && touch $@
$(VENV)/extra-%: $(VENV)/installed  # extra [%] of setup.cfg; a comma joins several
	$(PIP) '.[$*]' && touch $@

# By name a stage is always asked, with ARGS; it says so if it is already done. Its `done` file, which a
# later stage needs, is made only if missing, with the defaults. So both stand before each colon.
prepare $(PREPARED): | $(VENV)/installed  ## raw files -> data/<dataset>
	$(ONE) prepare --dataset $(DATASET) $(fit_options) $(if $(filter prepare,$@),$(ARGS))
pretrain $(DONE)/pretrain/done: | $(PREPARED)  ## next token and rating prediction on what the shop knows
sft $(DONE)/sft/done: | $(DONE)/pretrain/done  ## supervised fine-tuning on ground-truth pages
reward $(DONE)/reward/done: | $(DONE)/sft/done  ## reward model from preference pairs
ppo $(DONE)/ppo/done: | $(patsubst %,$(DONE)/%/done,$(PAYS))  ## PPO against the reward model
compose $(DONE)/compose/done: | $(DONE)/sft/done  ## what will be picked, and how a page is made of it
evaluate $(DONE)/evaluate/done: | $(LAST)  ## pages and the table of results; POLICIES=sft stops at SFT
baselines $(DONE)/baselines/done: | $(PREPARED)  ## plain recommenders; ARGS="--settings none": tuned anew
fit: | $(VENV)/installed  ## prepare, tune, the stages that pay, one table: ARGS="--minutes 15"
tune: | $(PREPARED)  ## choose stages and options on validation: ARGS="--minutes 15"
recommend: $(LAST)  ## one page: ARGS="--user ID"; everybody's: ARGS="--all --out pages.parquet"
serve: $(VENV)/extra-serve $(LAST)  ## the pages in a browser and over HTTP: http://127.0.0.1:8000/
$(DONE)/export-ppo/done: | $(DONE)/ppo/done
export: $(DONE)/ppo/done  ## embeddings of items and users as .npy: ARGS="--dtype int8 --pca 32"
features: $(DONE)/ppo/done  ## two scores of (user, item) pairs: ARGS="--pairs in.parquet --out out.parquet"
search: $(VENV)/extra-search $(DONE)/export-ppo/done  ## item rows searched; by a graph: ARGS="--index hnsw"
storefront: | $(ORDERED)  ## a page of themed rows: built, tuned, scored; DATASET=complete_journey
storefront-build $(ROWS): | $(ORDERED)  ## its steps one by one: keywords, missions, factors, the scorer
storefront-trees: $(VENV)/extra-ranker | $(ROWS)  ## LightGBM as their ranker: then --ranker lightgbm
storefront-tune: | $(ROWS)  ## weights of the score, chosen on validation rows
storefront-evaluate: | $(ROWS)  ## everybody's page of rows, scored beside rows without themes
storefront-cache: | $(ROWS)  ## rows and pages of everybody, made ahead into a SQLite file
storefront-serve: $(VENV)/extra-serve | $(ROWS)  ## rows in a browser and over HTTP: port 8000
	$(ONE) storefront cache $(COMMON)
	$(call command,$@) $(ARGS)
storefront-page: | $(ROWS)  ## one page of rows in the terminal: ARGS="--user ID"
storefront-label: | $(ROWS)  ## pairs of a row and an item for people to judge: ARGS="--labels FILE" reads
storefront-judge: | $(ROWS)  ## do rows hold what their titles say? rules, or a model: ARGS="--backend http"
storefront-distil: | $(ROWS)  ## a small model taught what a search finds; table of all writers
	$(ONE) storefront tune $(COMMON)
	$(ONE) storefront teach $(COMMON)
	for swapped in 0 .15; do for labels in clean raw; do \
		$(ONE) storefront student $(COMMON) --labels $$labels --swapped $$swapped || exit; done; done
	$(ONE) storefront prefer $(COMMON)
	$(PY) -m experiments.storefront_distil $(COMMON) $(ARGS)
storefront-server: | $(ROWS)  ## rows written by a real llama.cpp server on this machine (wheel xllamacpp)
	$(PY) -m experiments.storefront_server $(COMMON) $(ARGS)
storefront-study: | $(ROWS)  ## what each part of the page is worth: one part changed at a time
	$(PY) -m experiments.storefront_study $(COMMON) $(ARGS)
storefront-bench: | $(ROWS)  ## times of its parts, and of pages in shops of up to a million items
	$(PY) -m experiments.storefront_bench $(COMMON) $(ARGS)
storefront-sim: $(DONE)/evaluate/done | $(ROWS) $(DONE)/baselines/done  ## rows beside flat pages, tested
	$(PY) -m experiments.storefront $(COMMON) $(ARGS)
storefront-fuzz: $(VENV)/extra-serve,load | $(ROWS)  ## its service fuzzed with schemathesis: no 5xx
	$(PY) -m experiments.stress.fuzz --rows $(COMMON) $(ARGS)
storefront-load: $(VENV)/extra-serve,load | $(ROWS)  ## its service under load: ARGS="--soak 10"
	$(ONE) storefront cache $(COMMON)
	$(PY) -m experiments.stress.load --rows $(COMMON) $(ARGS)
$(if $(findstring backend reward,$(subst =, ,$(ARGS))),judge: $(DONE)/reward/done)
judge: $(DONE)/evaluate/done  ## SFT's pages against composed ones or PPO's: ARGS="--backend reward"
ope: $(SHOWN)  ## what PPO would earn, from SFT's SIMULATED log; your own: ARGS="--log sessions.parquet"
shared = $(and $(filter-out 1,$(NPROC)),$(filter $(STAGES) recommend,$(1)))
command = $(if $(shared),$(TORCHRUN),$(ONE)) $(subst -, ,$(1)) $(COMMON) $($(1)_options)
$(STAGES) $(VERBS):
	$(call command,$@) $(ARGS)
$(patsubst %,$(DONE)/%/done,$(STAGES) baselines export-ppo storefront/build): $(DONE)/%/done:
	$(call command,$(subst /,-,$(*:-ppo=)))
$(JOURNEY): | $(VENV)/installed
	$(ONE) journey $(fit_options)
abtest: $(SHOWN)  ## SIMULATED online test of composed pages or PPO; your own: ARGS="--log log.csv"
	$(ONE) $(if $(OWN_LOG),abtest,simulator $(COMMON)) $(ARGS)
casestudy: $(DONE)/evaluate/done  ## a user's pages, hits and rewards, slot by slot: ARGS="--user ID"
report: | $(VENV)/installed  ## everything that RUN has left on disk in one HTML file: runs/<run>/report.html
casestudy report:
	$(ONE) $@ --run $(RUN) $(call given,DATASET,--dataset $(DATASET)) $(ARGS)

# A study has several runs: RUN, where it is given, names the study.
$(filter-out repeats updates,$(STUDIES)): | $(PREPARED)
$(STUDIES): | $(VENV)/installed
	$(PY) -m experiments.$@ --dataset $(DATASET) $(call given,RUN,--study $(RUN)) $(fit_options) $(ARGS)
ranker: $(VENV)/extra-ranker
fuzz load: $(VENV)/extra-serve,load
$(OF_A_RUN): options = $(COMMON)
$(OF_A_RUN): $(DONE)/ppo/done $(DONE)/reward/done
torture: $(VENV)/installed
gpu-check: $(VENV)/extra-dev
scaling: $(VENV)/extra-report
file = $(wildcard $(addsuffix /$(subst -,_,$@).py,experiments experiments/*))
$(OF_A_RUN) torture gpu-check scaling:
	$(PY) -m $(subst /,.,$(file:.py=)) $(options) $(ARGS)
soak: $(VENV)/installed  ## all stages in a loop for half an hour: does anything grow?
	$(PY) -m experiments.stress.torture --suites soak $(ARGS)
seeds: | $(DONE)/baselines/done
	for seed in $(SEEDS); do $(MAKE) $(DONE)-s$$seed/evaluate/done RUN=$(RUN)-s$$seed SEED=$$seed || exit; done
	$(PY) -m experiments.seeds --dataset $(DATASET) --run $(RUN) --baselines $(RUN) --seeds "$(SEEDS)" \
		$(evaluate_options) $(ARGS)
bench: $(VENV)/extra-dev
	$(if $(BASE)$(filter --only% --profile,$(ARGS)),,$(PY) -m kernels.bench $(filter --quick,$(ARGS)) \
		$(if $(filter cuda --device=cuda,$(ARGS)),--device cuda))
	$(PY) -m experiments.cost.bench $(if $(BASE),--base $(BASE)) $(ARGS)

# Where pytest-xdist is installed (the extra dev), two processes share the tests.
XDIST = $(if $(wildcard $(VENV)/lib/python*/site-packages/xdist),-n 2 --dist loadfile --no-loadscope-reorder)
RUN_TESTS = $(if $(XDIST),OMP_NUM_THREADS=1) $(PY) -m pytest $(XDIST)
check: $(VENV)/extra-dev  ## rules, format, types and the quick tests, before a commit
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	$(RUN_TESTS) -q -m quick $(ARGS)
test: $(VENV)/installed  ## all tests but those of `make stress`; some: ARGS=tests/test_ppo.py
	$(RUN_TESTS) $(if $(findstring tests/,$(ARGS)),,-m "not stress") $(ARGS)
stress: $(VENV)/installed  ## tests that start many processes: kills, load, two ranks, a wheel, libraries
	$(RUN_TESTS) -m stress $(ARGS)
docs: $(VENV)/extra-docs,serve  ## the documentation as a site: site/index.html
	$(PY) docs/generate.py && $(PY) -m mkdocs build --strict
	$(PY) -m pdoc --output-directory site/api pagellm '!pagellm.baselines.outside'
clean:  ## remove runs of RUN (prepared data and other runs stay)
	rm -rf runs/$(RUN)
