# Two commands matter: `make quickstart` (the whole story) and `make test`. Both set up `.venv` by themselves.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# One thread a process: small models gain nothing from a second, and tests and seeds run processes side by side.
test test-all ablation: export OMP_NUM_THREADS ?= 1
test test-all: export WANDB_MODE ?= disabled
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-all check ablation clean

quickstart: $(READY)
	bash launch/quickstart.sh

test: $(READY)
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

# Also what needs minutes of the compiler first: DeepSpeed's AdamW for engine.offload=optimizer.
test-all: export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions
test-all: $(READY)
	DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c \
	  "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

ablation: $(READY)
	bash launch/ablation.sh

# Installed again only when the requirements change, so later runs need no network.
$(READY): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,serve,notebooks,web]'
	touch $@

.venv: $(READY)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
