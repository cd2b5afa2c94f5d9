# Every target sets up what it needs: a fresh Debian with python3 (3.11 or newer) and PyPI is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The real SGLang lives outside the checkout, so that clones share one installation (3.3 GB).
LIVE_DIR ?= $(HOME)/.cache/tokentape/live
ENGINES ?= ../shared/engines

# How long `make soak` lasts.
SOAK_MINUTES ?= 30

# Letta's agent server has pins of its own: a virtual environment for it alone, one a version, and a home for
# what it writes to ~/.letta. Its database is SQLite, whatever the shell says.
LETTA ?= 0.16.8
LETTA_DIR := $(LIVE_DIR)/letta-$(LETTA)
IN_LETTA := HOME=$(LETTA_DIR)/home LETTA_PG_URI= $(LETTA_DIR)/bin

# The trainers' own packages, for tests of what is exported to them; torch is the small CPU build.
TRAINERS_DIR := $(LIVE_DIR)/trainers

.PHONY: demo train-demo test check manual manual-serve live letta trainers trl-demo bench chaos soak scale format clean

demo: $(VENV)/ready
	$(BIN)/tokentape demo

train-demo: $(VENV)/train
	$(BIN)/python examples/grpo.py

# The viewer's tests need a real browser; where there is none and none can be installed they are skipped.
test: $(VENV)/ready
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
		apt-get install -qq -y --no-install-recommends chromium >/dev/null; } || echo "no chromium: skipping what needs it"
	$(BIN)/pytest

check: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/pytest tests/project

# Made of these pages and the docstrings; it needs no network, and neither does who reads it.
manual: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the manual: $(CURDIR)/site/index.html"

manual-serve: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

live: $(VENV)/ready $(LIVE_DIR)/ready $(LIVE_DIR)/router/ready
	PYTHON=$(PYTHON) sh tests/agents/install.sh $(LIVE_DIR)/agents
	TOKENTAPE_LIVE_DIR=$(LIVE_DIR) TOKENTAPE_ENGINES=$(ENGINES) $(BIN)/pytest -m live

letta: $(LETTA_DIR)/ready
	$(LETTA_DIR)/bin/pip install -q --no-deps -e .
	$(IN_LETTA)/pytest -p no:cacheprovider tests/adapters
	$(IN_LETTA)/python tests/adapters/letta_demo.py

trainers: $(TRAINERS_DIR)/ready
	$(TRAINERS_DIR)/bin/pip install -q --no-deps -e .
	$(TRAINERS_DIR)/bin/pytest -p no:cacheprovider tests/export

trl-demo: $(TRAINERS_DIR)/ready
	$(TRAINERS_DIR)/bin/pip install -q --no-deps -e .
	$(TRAINERS_DIR)/bin/python examples/trl_grpo.py

bench: $(VENV)/ready
	$(BIN)/python bench/parse.py
	$(BIN)/python bench/bench.py --plot docs/performance.png
	$(BIN)/python bench/workers.py
	$(BIN)/python bench/scale.py

chaos: $(VENV)/ready
	$(BIN)/python chaos/run.py

soak: $(VENV)/ready
	$(BIN)/python chaos/soak.py --minutes $(SOAK_MINUTES)

scale: $(VENV)/ready
	$(BIN)/python chaos/scale.py
	$(BIN)/pytest tests/scale

format: $(VENV)/ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist runs site

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade 'pip>=25.1'
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,ray]' --group dev
	touch $@

$(VENV)/train: $(VENV)/ready
	$(BIN)/pip install -q -c constraints.txt -e '.[train]'
	touch $@

$(LIVE_DIR)/ready: | $(ENGINES)/setup_sglang_cpu.sh
	mkdir -p $(LIVE_DIR)
	bash $(ENGINES)/setup_sglang_cpu.sh $(LIVE_DIR)/sglang
	rm -rf $(LIVE_DIR)/smollm2
	bash $(ENGINES)/make_smollm2.sh $(LIVE_DIR)/sglang $(LIVE_DIR)/smollm2
	touch $@

$(LIVE_DIR)/router/ready: tests/live/requirements-router.txt
	$(PYTHON) -m venv $(LIVE_DIR)/router
	$(LIVE_DIR)/router/bin/pip install -q --upgrade 'pip>=25.1'
	$(LIVE_DIR)/router/bin/pip install -q -r tests/live/requirements-router.txt
	touch $@

$(LETTA_DIR)/ready: pyproject.toml
	$(PYTHON) -m venv $(LETTA_DIR)
	mkdir -p $(LETTA_DIR)/home
	$(LETTA_DIR)/bin/pip install -q --upgrade 'pip>=25.1'
	grep '^torch==' constraints.txt > $(LETTA_DIR)/constraints.txt
	$(LETTA_DIR)/bin/pip install -q -c $(LETTA_DIR)/constraints.txt 'letta==$(LETTA)' transformers asyncpg pgvector \
		aiosqlite sqlite-vec -e . pytest pytest-asyncio
	touch $@

$(TRAINERS_DIR)/ready: pyproject.toml constraints.txt tests/export/requirements.txt tests/export/requirements-no-deps.txt
	$(PYTHON) -m venv $(TRAINERS_DIR)
	$(TRAINERS_DIR)/bin/pip install -q --upgrade 'pip>=25.1'
	grep '^torch==' constraints.txt > $(TRAINERS_DIR)/constraints.txt
	$(TRAINERS_DIR)/bin/pip install -q -c $(TRAINERS_DIR)/constraints.txt -e . -r tests/export/requirements.txt
	$(TRAINERS_DIR)/bin/pip install -q --no-deps -r tests/export/requirements-no-deps.txt
	touch $@
