# One command a task; `make help` lists them. Everything made lies in .venv/ and .athanor/.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: doctor gc backup restore audit sbom compose-env compose-up compose-down compose-demo help setup up down status logs demo test test-stores test-exact test-chaos test-live test-browser bench test-compose check format reference lock screenshots clean

VENV   := .venv
PYTHON := $(CURDIR)/$(VENV)/bin/python
STAMP  := $(VENV)/.athanor-setup
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
PEERS   := .athanor/bench-venv
CYCLONEDX := cyclonedx-bom==7.5.0
# what `make test` runs; `make test TESTS=tests/unit`
TESTS   ?= tests
# artifacts, leases, garbage collection and the doctor: the same tests on every kind of store
STORE_TESTS := tests/unit/artifacts/test_manifests.py tests/unit/artifacts/test_s3.py tests/unit/artifacts/test_lease.py tests/unit/artifacts/test_retention.py \
  tests/integration/test_lease_s3.py tests/unit/infra/test_doctor.py
# several tests at once, those of a file in one process; much of what they do is waiting for servers
PYTEST_PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder
# through the environment, so that quotes in JSON survive the shell
export RECIPE PARAMS BACKUP
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

COMPOSE = ATHANOR_GIT_COMMIT=$$(git rev-parse HEAD 2>/dev/null || echo unknown) docker compose

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## virtual environment with everything, from constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON3) >/dev/null || { \
	  echo "error: $(PYTHON3) is not on PATH; install Python 3.11 or newer, or say which: make setup PYTHON3=/path/to/python3" >&2; exit 1; }
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON3) --version) is too old; Athanor needs Python 3.11 or newer. Say which to use: make setup PYTHON3=python3.12" >&2; exit 1; }
	@[ -x $(VENV)/bin/python ] || $(PYTHON3) -m venv $(VENV) || { \
	  echo "error: $(PYTHON3) -m venv failed; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(VENV)/bin/python -m ensurepip --upgrade
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
	$(VENV)/bin/uv pip install --python $(VENV)/bin/python --compile-bytecode --constraint constraints.txt $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} \
	  --editable '.[airflow,train,deepspeed,stack,dev]'
	@touch $(STAMP)

up: $(STAMP) ## start Airflow, Ray and MLflow on this machine; prints URLs and login
	@$(PYTHON) -m infra up

down: ## stop exactly what `make up` started
	@if [ -x $(PYTHON) ]; then $(PYTHON) -m infra down; else echo "nothing to stop: there is no $(VENV)"; fi

status: $(STAMP) ## what runs, since when, with how much memory
	@$(PYTHON) -m infra status

logs: $(STAMP) ## follow the logs of the stack; `make logs COMPONENT=scheduler` for one
	@$(PYTHON) -m infra logs $(COMPONENT)

doctor: $(STAMP) ## tries object store, Airflow, Ray and MLflow; says what is wrong and what to do
	@$(PYTHON) -m infra doctor

gc: $(STAMP) ## lists what nothing in the store needs any more; make gc GC='--delete --keep-days 14' deletes it
	@$(PYTHON) -m infra gc $(GC)

backup: $(STAMP) ## databases, keys and artifact store into a folder: make backup BACKUP=/folder
	@$(PYTHON) -m infra backup "$${BACKUP:?say where: make backup BACKUP=/folder}"

restore: $(STAMP) ## puts a backup back, the stack being down: make restore BACKUP=/folder
	@$(PYTHON) -m infra restore "$${BACKUP:?say from where: make restore BACKUP=/folder}"

demo: $(STAMP) ## raw text to aligned model: setup and up if needed, run llm_pipeline, show it live
	@$(PYTHON) -m infra demo --recipe "$$RECIPE" --params "$$PARAMS"

test: $(STAMP) ## all tests but those of `make test-exact`, `test-chaos`, `test-live` and `test-compose`
	$(PYTHON) -m pytest $(PYTEST_PARALLEL) -m 'not exact and not chaos and not live and not compose' $(TESTS)

test-stores: $(STAMP) ## the artifact store on a folder, on Ceph's gateway (if installed) and on Swift; two to three minutes
	$(PYTHON) -m pytest $(STORE_TESTS)

test-exact: $(STAMP) ## every objective at random kill points (KILLS=4 each) and at another world size
	$(PYTHON) -m pytest -m exact tests/numerics

test-chaos: $(STAMP) ## kills parts of a real Airflow and a real Ray head, minutes on end: the rows of docs/DRILLS.md
	$(PYTHON) -m pytest -m chaos tests/chaos

test-live: $(STAMP) $(STAMP)-browser ## a whole live stack: people, retraining, browser, a wheel installed elsewhere; minutes
	$(PYTHON) -m pytest -m live tests/browser tests/integration

test-browser: $(STAMP) $(STAMP)-browser ## of these, the user interfaces in headless Chromium (needs chromium)
	$(PYTHON) -m pytest -m browser tests/browser

bench: $(STAMP) $(PEERS)/.ready ## our training against Trainer and TRL, rounds in turn, half an hour; writes docs/PERFORMANCE.md
	$(PYTHON) -m tests.bench $(BENCH)

# Hugging Face's trainers, in an environment of their own and with our versions of what both use
$(PEERS)/.ready: constraints.txt | $(STAMP)
	uv venv --quiet --clear --python $(PYTHON) $(PEERS)
	uv pip install --quiet --python $(PEERS)/bin/python --constraint constraints.txt \
	  $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} torch transformers accelerate datasets 'trl==1.16.0'
	@touch $@

$(STAMP)-browser: $(STAMP)
	@$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --constraint constraints.txt $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} playwright
	@touch $@

compose-env: ## secrets and settings of docker-compose.yml, into .env; keeps what is there
	@python3 -m infra.deploy.environment write

compose-up: ## the server edition: build the images, start everything in containers, wait until healthy
	@python3 -m infra.deploy.environment check
	@$(COMPOSE) build
	@$(COMPOSE) up --detach --wait
	@$(COMPOSE) ps

compose-down: ## stop the containers; volumes stay (`docker compose down --volumes` removes them)
	@$(COMPOSE) down

compose-demo: ## run a recipe on the containers, shown live; RECIPE and PARAMS as for `make demo`
	@$(COMPOSE) --profile demo run --rm --no-deps demo --recipe "$$RECIPE" --params "$$PARAMS"

test-compose: $(STAMP) ## the whole of docker-compose.yml on a real Docker engine, `tiny` through it; about ten minutes
	$(PYTHON) -m pytest -s -m compose tests/compose

check: $(STAMP) ## format, lint, types, floors, fast tests and, where an advisory service answers, known vulnerabilities
	ruff format --check .
	ruff check .
	pyright --threads
	lint-imports
	$(PYTHON) -m pytest -q $(PYTEST_PARALLEL) -m 'not slow and not integration' tests/unit tests/contracts/test_imports.py
	$(PYTHON) -m infra.audit || [ $$? -eq 2 ] # 2: said that nobody could be asked, which is no finding

audit: $(STAMP) ## known vulnerabilities of the installed packages; needs the network, says so when it has none
	@$(PYTHON) -m infra.audit

sbom: $(STAMP) ## what is installed here, as CycloneDX: .athanor/sbom.cdx.json
	@mkdir -p .athanor
	@uv tool run --from $(CYCLONEDX) cyclonedx-py environment --pyproject pyproject.toml --mc-type application \
	  --output-reproducible --of JSON -o .athanor/sbom.cdx.json $(PYTHON)
	@echo "made .athanor/sbom.cdx.json"

format: $(STAMP) ## rewrite the code in the project's format
	ruff format .
	ruff check --fix .

reference: $(STAMP) ## write docs/CONFIGURATION.md from the docstrings of the configuration fields
	$(PYTHON) -m stages.config.reference > docs/CONFIGURATION.md

lock: $(STAMP) ## resolve constraints.txt anew
	{ head -2 constraints.txt; env -u PIP_FIND_LINKS uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --no-annotate --no-header --quiet; } > constraints.txt.new
	mv constraints.txt.new constraints.txt

screenshots: $(STAMP) $(STAMP)-browser ## pictures for docs/images, of the running stack (needs chromium)
	$(PYTHON) -m tests.browser.screenshots

clean: down ## stop the stack and remove .venv and .athanor, artifacts and all
	rm -rf $(VENV) .athanor
