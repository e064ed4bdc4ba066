# Every target sets up what it needs. Variables: PYTHON (3.11 to 3.13), VENV, ARGS (flags for `up` and `bench`),
# TORCH_ARGS (flags for pip when it fetches torch, e.g. --index-url https://download.pytorch.org/whl/cpu).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
ARGS ?=
TORCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help up down test test-deep test-api test-clients test-compose lint check bench links soak load-curve fairness faults clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: $(VENV)/.has-all ## start the whole system on this machine; ARGS="--port 8100 --workers 3"
	@exec $(BIN)/molink up $(ARGS)

down: ## stop what `make up` started; ARGS="--port 8100"
	@test ! -x $(BIN)/molink || exec $(BIN)/molink down $(ARGS)

test: $(VENV)/.has-dev ## run every test; ARGS="tests/unit -k lock"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-deep: $(VENV)/.has-dev ## the property tests with new random examples, ten times; ROUNDS=50
	@for round in $$(seq $(or $(ROUNDS),10)); do \
		echo "round $$round of $(or $(ROUNDS),10)"; \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/property --hypothesis-profile=new $(ARGS) || exit 1; \
	done

test-api: $(VENV)/.has-dev ## schemathesis tries /openapi.json on a real system for five minutes; ARGS="--seconds 60"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.api.run $(ARGS)

test-clients: $(VENV)/.has-dev ## OpenAI clients and frameworks, each in its own environment; ARGS="--only llm,litellm"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.clients.run $(ARGS)

test-compose: ## build the containers, use them, kill one, take them down; ARGS="--no-jaeger --no-build --keep"
	deploy/test-compose.sh $(ARGS)

lint: $(VENV)/.has-dev ## ruff, mypy --strict, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: test lint ## what CI runs

bench: $(VENV)/.has-dev ## tokens a second next to plain transformers
	$(BIN)/python -m bench.throughput $(ARGS)

links: $(VENV)/.has-dev ## weak links, next to LAN and the baselines; needs root; ARGS="--grid --links lan,100m30"
	$(BIN)/python -m bench.links $(or $(ARGS),--case wan30)

soak: $(VENV)/.has-dev ## 200 streaming clients for five minutes, then look for leaks
	$(BIN)/python -m bench.soak $(ARGS)

load-curve: $(VENV)/.has-dev ## rising load: throughput, waiting, refusals; ARGS="--json --plot docs/load-curve.png"
	$(BIN)/python -m bench.overload $(ARGS)

fairness: $(VENV)/.has-dev ## two keys, one of which floods: how long the other one waits
	$(BIN)/python -m bench.fairness $(ARGS)

faults: $(VENV)/.has-dev ## kill, stop and cut parts at random under streaming clients; ARGS="--kills 20 --seed 1"
	$(BIN)/python -m bench.faults $(ARGS)

clean: ## remove the virtual environment and every cache in this folder
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "MoLink needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3"; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

# torch first and by itself: what is installed afterwards then takes it as it is
$(VENV)/.has-torch: $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) $(TORCH)
	@touch $@

$(VENV)/.has-all: $(VENV)/.has-torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]"
	@touch $@

$(VENV)/.has-dev: $(VENV)/.has-torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.has-all
