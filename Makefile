# Two commands do everything on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

.PHONY: help serve test check bench chaos lock docs clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.serve: pyproject.toml requirements/serve.txt requirements/torch.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned dependencies (torch is the large one) ..."
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/serve.txt
	@$(BIN)/pip install -q --disable-pip-version-check -r requirements/torch.txt
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.serve requirements/dev.txt
	@echo "installing pinned development tools ..."
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@

serve: $(VENV)/.serve  ## install what is missing, then serve the embedded model (ARGS="--port 9000 ...")
	@exec $(BIN)/isthmus serve $(ARGS)

test: $(VENV)/.dev  ## the tests (ARGS="-k name")
	@$(BIN)/python -m pytest -m "not chaos" $(ARGS)

check: $(VENV)/.dev  ## formatting, lint, types, import rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/.dev  ## the benchmarks (hours; ARGS="serving exactness parity" picks some)
	@$(BIN)/python -m benchmarks $(ARGS)

chaos: $(VENV)/.dev  ## long and destructive tests at release scale; can be resumed, accumulates its counts
	@$(BIN)/python -m scripts.chaos $(ARGS)

docs: $(VENV)/.dev  ## regenerate docs/configuration.md and docs/openapi.json
	@$(BIN)/python -m scripts.generate_docs

lock: $(VENV)/.dev  ## pin the newest versions that pyproject.toml allows
	@$(BIN)/python -m scripts.lock

clean:  ## remove the environment and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
