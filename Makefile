# Two commands: `make demo` and `make test`. Each sets up .venv first; the second call starts at once.
# `make tiny` trains the models in thinkfast/ again, `make tiny-study` measures what their recipes pay,
# `make paper` compares them under a time budget.
#
# PYTHON    interpreter for .venv (3.11 or newer, with a CUDA device also 3.10; the resolved package
#           list is for 3.11)
# PIP_ARGS  options for pip. Where pip does not find the CPU build of torch by itself:
#           PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# DATA      jsonl of word problems for the demo, in GSM8K's field layout
# TESTS     what `make test` runs
# JOBS      processes that `make test` runs; each takes a core and up to 7 GB of memory

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
DATA ?=
TESTS ?= tests
JOBS ?= 2
export PIP_ARGS

PACKAGES := vllm_thinkfast lm_eval_tasks thinkfast_distill
SOURCES := vllm_thinkfast lm_eval_tasks distill tests scripts demo integrations
BIN := .venv/bin
PARALLEL := $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile)

.PHONY: install demo test check format lock clean tiny tiny-study paper

install:
	@$(PYTHON) scripts/install.py

demo: install
	$(BIN)/python -m demo.run $(if $(DATA),--data $(DATA))

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not gpu and not extra" $(PARALLEL) $(TESTS)

check: install
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy $(PACKAGES:%=-p %)
	$(BIN)/lint-imports
	$(BIN)/codespell

tiny: install
	$(BIN)/python -m scripts.tiny_models

tiny-study: install
	$(BIN)/python -m scripts.tiny_study

paper: install
	$(BIN)/python -m scripts.paper

format: install
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

lock:
	$(PYTHON) scripts/install.py --lock

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf distill/build distill/*.egg-info integrations/*/build integrations/*/*.egg-info
