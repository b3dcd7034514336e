# `make help` lists the commands. Everything they create is in .venv/ and .athanor/ of this checkout, or of the folder that
# ATHANOR_HOME names when the checkout is read-only. Recipes get paths from their environment, not from make, because make
# and shells would read spaces, quotes and $ in them. So no rule has a file as target or prerequisite outside the checkout.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: chat serve export verify setup-peers setup-browser setup-eval doctor gc backup restore audit sbom compose-env compose-up compose-down compose-demo help setup up down status logs demo test test-stores test-exact test-alignment test-chaos test-live test-real test-browser bench test-compose check format reference lock screenshots clean

ifeq ($(value ATHANOR_HOME),)
export ATHANOR_VENV := $(CURDIR)/.venv
else
export ATHANOR_VENV := $(value ATHANOR_HOME)/.venv
# caches of the tools that `make check` and `make test` call
export RUFF_CACHE_DIR := $(value ATHANOR_HOME)/.athanor/cache/ruff
export HYPOTHESIS_STORAGE_DIRECTORY := $(value ATHANOR_HOME)/.athanor/cache/hypothesis
export PYTEST_ADDOPTS := -p no:cacheprovider $(value PYTEST_ADDOPTS)
LINT_IMPORTS := --no-cache
endif
export PATH := $(ATHANOR_VENV)/bin:$(value PATH)

PYTHON := "$$ATHANOR_VENV"/bin/python
STATE  := "$${ATHANOR_HOME:-.}"/.athanor
STAMP  := "$$ATHANOR_VENV"/.athanor-setup
# the Python that makes the virtual environment; override with `make setup PYTHON3=python3.12`
PYTHON3 ?= python3
RECIPE  ?= demo
# a JSON object of trigger form fields, such as PARAMS='{"alignment": "dpo"}'
PARAMS  ?= {}
# options of the benchmark: make bench BENCH='--only sft,dpo --rounds 9', or --quick; BENCH=--help lists them
BENCH   ?=
# options of garbage collection
GC      ?=
# folder of backup and restore
BACKUP  ?=
# the model that make export, verify, chat and serve are about: make chat MODEL=models:/athanor-aligned@champion
MODEL   ?=
# where make export exports to, and its other options
TO      ?=
EXPORT  ?=
# other options of make verify
VERIFY  ?=
# the run whose models make serve serves, and the other options of make chat and make serve
RUN     ?=
CHAT    ?=
SERVE   ?=
PEERS   := $(STATE)/bench-venv
CYCLONEDX := cyclonedx-bom==7.5.0
# what `make test` runs; `make test TESTS=tests/unit`
TESTS   ?= tests
# artifacts, leases, garbage collection and the doctor: the tests that run on every kind of store
STORE_TESTS := tests/unit/artifacts/test_manifests.py tests/unit/artifacts/test_s3.py tests/unit/artifacts/test_lease.py tests/unit/artifacts/test_retention.py \
  tests/integration/test_lease_s3.py tests/unit/infra/test_doctor.py
# several tests at once, the tests of a file in one process; most of their time is spent waiting for servers
PYTEST_PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder
# through the environment, so that quotes in JSON survive the shell
export RECIPE PARAMS BACKUP MODEL TO RUN

COMPOSE = ATHANOR_GIT_COMMIT=$$(git rev-parse HEAD 2>/dev/null || echo unknown) docker compose

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## create the virtual environment, from constraints.txt
	@if [ -e $(STAMP) ] && ! [ pyproject.toml -nt $(STAMP) ] && ! [ constraints.txt -nt $(STAMP) ]; then exit 0; fi; \
	set -e; \
	command -v $(PYTHON3) >/dev/null || { \
	  echo "error: $(PYTHON3) is not on PATH; install Python 3.11 or newer, or name it: make setup PYTHON3=/path/to/python3" >&2; exit 1; }; \
	$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON3) --version) is too old; Athanor needs Python 3.11 or newer. Name one: make setup PYTHON3=python3.12" >&2; exit 1; }; \
	[ -x $(PYTHON) ] || $(PYTHON3) -m venv "$$ATHANOR_VENV" || { \
	  echo "error: $(PYTHON3) -m venv failed; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }; \
	$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m ensurepip --upgrade; \
	$(PYTHON) -m pip install --quiet --disable-pip-version-check 'uv>=0.9'; \
	$(PYTHON) -m uv pip install --python $(PYTHON) --compile-bytecode --constraint constraints.txt \
	  $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} --editable '.[airflow,train,deepspeed,stack,dev]'; \
	touch $(STAMP)

up: setup ## start Airflow, Ray and MLflow on this machine; print URLs and login
	@$(PYTHON) -m infra up

down: ## stop exactly what `make up` started
	@if [ -x $(PYTHON) ]; then $(PYTHON) -m infra down; \
	elif [ -e $(STATE)/stack.json ]; then \
	  echo "error: a stack was started here, but $$ATHANOR_VENV is gone; run make setup, then make down" >&2; exit 1; \
	else echo "nothing to stop: there is no $$ATHANOR_VENV"; fi

status: setup ## show what runs, since when, and its memory
	@$(PYTHON) -m infra status

logs: setup ## follow the logs of the stack; `make logs COMPONENT=scheduler` for one
	@$(PYTHON) -m infra logs $(COMPONENT)

doctor: setup ## check object store, Airflow, Ray and MLflow; say what is wrong and what to do
	@$(PYTHON) -m infra doctor

gc: setup ## list what nothing in the store needs any more; GC='--delete --keep-days 14' deletes it
	@$(PYTHON) -m infra gc $(GC)

backup: setup ## copy databases, keys and artifact store to a folder: make backup BACKUP=/folder
	@$(PYTHON) -m infra backup "$${BACKUP:?name a folder: make backup BACKUP=/folder}"

restore: setup ## restore a backup, with the stack stopped: make restore BACKUP=/folder
	@$(PYTHON) -m infra restore "$${BACKUP:?name a folder: make restore BACKUP=/folder}"

demo: setup ## run llm_pipeline from raw text to aligned model, shown live; setup and up if needed
	@$(PYTHON) -m infra demo --recipe "$$RECIPE" --params "$$PARAMS"

export: setup ## export a model: make export MODEL=models:/athanor-aligned@champion TO=/folder EXPORT='--dtype bf16'
	@settings="$$($(PYTHON) -m infra env 2>/dev/null)" && eval "$$settings"; \
	$(PYTHON) -m stages.export "$${MODEL:?name a model: make export MODEL=models:/athanor-aligned@champion TO=/folder}" \
	  $${TO:+--to "$$TO"} $(EXPORT)

verify: setup ## hash a model and all that it was made from: make verify MODEL=models:/athanor-aligned@champion VERIFY='--key signing.pub.pem'
	@settings="$$($(PYTHON) -m infra env 2>/dev/null)" && eval "$$settings"; \
	$(PYTHON) -m stages.lineage verify "$${MODEL:?name a model: make verify MODEL=models:/athanor-aligned@champion}" $(VERIFY)

# Ctrl-c ends an answer and not the chat; make, which gets it too, waits for the chat and then ends as interrupted.
chat: setup ## talk to a model in the terminal: make chat MODEL=models:/athanor-aligned@champion CHAT='--temperature 0.7'
	@settings="$$($(PYTHON) -m infra env 2>/dev/null)" && eval "$$settings"; \
	exec $(PYTHON) -m stages.serve.chat "$${MODEL:?name a model: make chat MODEL=models:/athanor-aligned@champion}" $(CHAT)

serve: setup ## OpenAI's API and a page for a model, or for all models of a run: make serve RUN=<run id> SERVE='--port 8000'
	@settings="$$($(PYTHON) -m infra env 2>/dev/null)" && eval "$$settings"; \
	exec $(PYTHON) -m stages.serve $${MODEL:+"$$MODEL"} $${RUN:+--run "$$RUN"} $(SERVE)

test: setup ## all tests except test-exact, test-alignment, test-chaos, test-live, test-real and test-compose
	$(PYTHON) -m pytest $(PYTEST_PARALLEL) -m 'not exact and not alignment and not chaos and not live and not real and not compose' $(TESTS)

test-stores: setup ## test the artifact store on a folder, on Ceph (if installed) and on Swift; 3 minutes
	$(PYTHON) -m pytest $(STORE_TESTS)

test-exact: setup ## test exact resume of every objective at random kill points (KILLS=4 each), and other world sizes
	$(PYTHON) -m pytest -m exact tests/numerics

test-alignment: setup ## train every method of alignment on a task whose right answer is known, on three seeds; hours
	$(PYTHON) -m pytest -m alignment tests/alignment

test-chaos: setup ## kill parts of a real Airflow and a real Ray: the rows of docs/DRILLS.md; 41 minutes
	$(PYTHON) -m pytest -m chaos tests/chaos

test-live: setup setup-browser ## test a whole live stack: people, retraining, browser, an installed wheel; many minutes
	$(PYTHON) -m pytest -m live tests/browser tests/integration

test-real: setup setup-eval ## train and measure SmolLM2-135M-Instruct, also by lm-evaluation-harness; 12 minutes
	@$(PYTHON) -m infra.real_model || true # without the model its tests are skipped, and say so
	$(PYTHON) -m pytest -n 2 --dist loadfile -m real tests/real

test-browser: setup setup-browser ## of test-live, the user interfaces in headless Chromium (needs chromium)
	$(PYTHON) -m pytest -m browser tests/browser

bench: setup setup-peers ## compare training speed with Trainer and TRL; writes docs/PERFORMANCE.md; half an hour
	$(PYTHON) -m tests.bench $(BENCH)

# Hugging Face's trainers, in a separate environment with the same versions of shared packages
setup-peers: setup
	@if [ -e $(PEERS)/.ready ] && ! [ constraints.txt -nt $(PEERS)/.ready ]; then exit 0; fi; set -e; \
	uv venv --quiet --clear --python $(PYTHON) $(PEERS); \
	uv pip install --quiet --python $(PEERS)/bin/python --constraint constraints.txt \
	  $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} torch transformers accelerate datasets 'trl==1.16.0'; \
	touch $(PEERS)/.ready

setup-browser: setup
	@if [ -e $(STAMP)-browser ] && ! [ $(STAMP) -nt $(STAMP)-browser ]; then exit 0; fi; set -e; \
	uv pip install --quiet --python $(PYTHON) --constraint constraints.txt \
	  $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} playwright; \
	touch $(STAMP)-browser

# lm-evaluation-harness, whose tasks are benchmarks here
setup-eval: setup
	@if [ -e $(STAMP)-eval ] && ! [ $(STAMP) -nt $(STAMP)-eval ]; then exit 0; fi; set -e; \
	uv pip install --quiet --python $(PYTHON) --constraint constraints.txt \
	  $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} lm-eval; \
	touch $(STAMP)-eval

compose-env: ## write secrets and settings of docker-compose.yml to .env; existing values are kept
	@python3 -m infra.deploy.environment write

compose-up: ## build the images, start everything in containers, wait until healthy
	@python3 -m infra.deploy.environment check
	@$(COMPOSE) build
	@$(COMPOSE) up --detach --wait
	@$(COMPOSE) ps

compose-down: ## stop the containers; volumes stay (`docker compose down --volumes` removes them)
	@$(COMPOSE) down

compose-demo: ## run a recipe on the containers, shown live; RECIPE and PARAMS as for make demo
	@$(COMPOSE) --profile demo run --rm --no-deps demo --recipe "$$RECIPE" --params "$$PARAMS"

test-compose: setup ## run recipe tiny on all of docker-compose.yml, on a real Docker engine; ten minutes
	$(PYTHON) -m pytest -s -m compose tests/compose

check: setup ## format, lint, types, import order, fast tests, known vulnerabilities (if online)
	ruff format --check .
	ruff check .
	pyright --threads
	lint-imports $(LINT_IMPORTS)
	$(PYTHON) -m pytest -q $(PYTEST_PARALLEL) -m 'not slow and not integration' tests/unit tests/contracts/test_imports.py
	$(PYTHON) -m infra.audit || [ $$? -eq 2 ] # 2: no advisory service answered, which is not a finding

audit: setup ## look up known vulnerabilities of the installed packages; needs the network
	@$(PYTHON) -m infra.audit

sbom: setup ## list installed packages as CycloneDX: .athanor/sbom.cdx.json
	@mkdir -p -m 700 $(STATE)
	@uv tool run --from $(CYCLONEDX) cyclonedx-py environment --pyproject pyproject.toml --mc-type application \
	  --output-reproducible --of JSON -o $(STATE)/sbom.cdx.json $(PYTHON)
	@echo "wrote "$(STATE)/sbom.cdx.json

format: setup ## format the code
	ruff format .
	ruff check --fix .

reference: setup ## write docs/CONFIGURATION.md from the docstrings of the configuration fields
	$(PYTHON) -m stages.config.reference > docs/CONFIGURATION.md

lock: setup ## resolve constraints.txt again
	{ head -2 constraints.txt; env -u PIP_FIND_LINKS uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --no-annotate --no-header --quiet; } > constraints.txt.new
	mv constraints.txt.new constraints.txt

screenshots: setup setup-browser ## take the pictures in docs/images from the running stack (needs chromium)
	$(PYTHON) -m tests.browser.screenshots

clean: down ## stop the stack and remove .venv and .athanor, including all artifacts
	rm -rf "$$ATHANOR_VENV" $(STATE)
