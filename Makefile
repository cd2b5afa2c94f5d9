# Every target sets up what it needs: a fresh Debian with python3 (3.11 or newer) and PyPI is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The real SGLang lives outside the checkout, so that clones share one installation (3.3 GB).
LIVE_DIR ?= $(HOME)/.cache/tokentape/live
ENGINES ?= ../shared/engines

.PHONY: demo test check live bench format clean

demo: $(VENV)/ready
	$(BIN)/tokentape demo

test: $(VENV)/ready
	$(BIN)/pytest

check: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/pytest tests/project

live: $(VENV)/ready $(LIVE_DIR)/ready
	TOKENTAPE_LIVE_DIR=$(LIVE_DIR) TOKENTAPE_ENGINES=$(ENGINES) $(BIN)/pytest -m live

bench: $(VENV)/ready
	$(BIN)/python bench/bench.py

format: $(VENV)/ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist runs

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade 'pip>=25.1'
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]' --group dev
	touch $@

$(LIVE_DIR)/ready: | $(ENGINES)/setup_sglang_cpu.sh
	mkdir -p $(LIVE_DIR)
	bash $(ENGINES)/setup_sglang_cpu.sh $(LIVE_DIR)/sglang
	rm -rf $(LIVE_DIR)/smollm2
	bash $(ENGINES)/make_smollm2.sh $(LIVE_DIR)/sglang $(LIVE_DIR)/smollm2
	touch $@
