# `make demo` and `make test` need Python 3.11 or 3.12. Each makes .venv on first use, which needs a network.
PYTHON ?= python3
BIN := .venv/bin

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[eval,report,qlora,test,check]"
	touch $@

.PHONY: demo test check versions real peers
VERSIONED := tests/training/test_trainer.py tests/training/test_stage_one.py tests/pipeline/test_recipe.py
demo: .venv/ready
	$(BIN)/caftune demo

test: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The whole path on a real language model of 135 million parameters. REAL: overrides of recipes/real.yaml.
real: .venv/ready
	$(BIN)/python scripts/real.py runs/real
	$(BIN)/caftune label recipes/real.yaml $(REAL)
	$(BIN)/caftune pretrain-heads recipes/real.yaml $(REAL)
	$(BIN)/caftune compare recipes/real.yaml $(REAL)
	$(BIN)/caftune report $(or $(patsubst output=%,%,$(filter output=%,$(REAL))),runs/real)

# The trainer's tests once more, with the oldest and with the newest versions of the libraries around it. Each set has an
# environment that finds in .venv what it does not name, torch above all.
versions: .venv/ready
	for set in oldest newest; do \
	  $(PYTHON) -m venv --clear build/$$set && \
	  site=$$(build/$$set/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	  $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$site/venv.pth && \
	  build/$$set/bin/pip install --quiet --disable-pip-version-check -r constraints/$$set.txt && \
	  build/$$set/bin/python -m pytest $(VERSIONED) || exit 1; \
	done

# caftune with other tools: docs/peers.md. PEERS: only these environments. A missing one skips its tests.
peers: .venv/ready
	$(BIN)/python scripts/peers.py $(PEERS); created=$$?; $(BIN)/python -m pytest -n 0 -rs tests/peers && exit $$created
