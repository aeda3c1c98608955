# Every target sets up what it needs; only Python 3.11+, make and a C compiler are assumed.

PYTHON ?= python3
RECIPES ?=
FUZZ_SECONDS ?= 600
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Without a CUDA device the pinned CPU build of torch will do; with one, pip takes the newest.
CONSTRAINTS := $(shell nvidia-smi -L >/dev/null 2>&1 || echo "-c constraints.txt")

# An environment copied from another folder, or whose Python is gone, counts as none.
USABLE := head -n 3 $(BIN)/pip 2>/dev/null | grep -qF "$(CURDIR)/$(BIN)/python" \
	&& $(BIN)/python -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null
ifneq ($(shell $(USABLE) && echo yes),yes)
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test docs fuzz lint format verify bench wheel clean

help:
	@echo "make demo     train a small mixture of experts, sample from it, report who does what"
	@echo "make test     lint, build the site, then the test suite"
	@echo "make docs     build the documentation site into site/; a dead link is an error"
	@echo "make fuzz     damaged files and odd values for FUZZ_SECONDS=600 per suite; counts in results/fuzz"
	@echo "make lint     ruff and mypy"
	@echo "make format   rewrite the sources in the house format"
	@echo "make verify   run the claims of the recipes (RECIPES=\"dit-moe\" for some of them)"
	@echo "make bench    time the expert layers here"
	@echo "make wheel    source archive and wheel into dist/, tried with core dependencies only"
	@echo "make clean    remove the environment and all caches; runs/ stays"

setup: $(STAMP)

# All that pip says is shown but one warning, about package folders a machine does not have.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"error: coterie needs Python 3.11 or newer, this is {v.major}.{v.minor}; say make PYTHON=python3.11" if v < (3, 11) else 0)'
	@if ! ( $(USABLE) ); then rm -rf $(VENV); $(PYTHON) -m venv $(VENV); fi
	@echo "setting up $(VENV): a few minutes the first time"
	@$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[dev]' > $(VENV)/pip.log 2>&1; \
		status=$$?; grep -vF "is ignored: it is neither a file nor" $(VENV)/pip.log >&2; exit $$status
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/coterie demo

test: lint docs
	@$(BIN)/python -m pytest --durations=15 -n auto --maxprocesses 4 --dist loadfile

# Strict: a warning, a dead link, a page that no menu lists or that would fetch something is an error.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Every test file that counts by tests/fuzz_budget.py, one after the other.
fuzz: $(STAMP)
	@COTERIE_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -s \
		$$(grep -rlE --include='test_*.py' '^(from|import) fuzz_budget' tests | grep -v test_fuzz_budget)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

verify: $(STAMP)
	@$(BIN)/coterie verify $(RECIPES)

bench: $(STAMP)
	@$(BIN)/coterie bench experts

wheel: $(STAMP)
	@$(BIN)/python tools/try_wheel.py --out dist

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
