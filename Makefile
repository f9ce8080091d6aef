# Two commands do everything: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3.11
PYTHON := $(shell command -v $(PYTHON) || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test check format proto chaos scenarios screenshots clean

help: ## show these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make .venv with pinned requirements (about 2 GB, some minutes, once)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): some minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## several workers train one model together, on this machine, in about four minutes
	$(BIN)/manyhands demo

test: $(READY) ## all tests but the long ones
	$(BIN)/python -m pytest -m "not chaos" --numprocesses 2

check: $(READY) ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(READY) ## regenerate protocol/wire from protocol/coordinator.proto
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protocol/wire=protocol --python_out=. --mypy_out=quiet:. \
	  --mypy_grpc_out=quiet:. --grpc_python_out=. protocol/wire/coordinator.proto

chaos: $(READY) ## long runs that kill and cut
	$(BIN)/python -m pytest -m chaos --timeout 1800 tests/chaos

scenarios: $(READY) ## every scenario of the simulator in its short form, with reports in manyhands-simulations/short
	for file in simulations/scenarios/*.toml; do \
	  name=$$(basename $$file .toml); echo "== $$name"; \
	  $(BIN)/manyhands simulate $$name --short --out manyhands-simulations/short/$$name || exit 1; done

screenshots: $(READY) ## docs/images/dashboard-*.png, from a real run (needs chromium and chromedriver)
	$(BIN)/python -m tests.browser.screenshots

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
