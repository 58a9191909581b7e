# Two commands on a fresh machine: `make demo` and `make test`. Both make the environment in .venv first and use it
# again the next time. PYTHON=... chooses another python 3.11 or 3.12.

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo-out
STAMP := $(VENV)/.installed
# Two tests at a time, those of a file one after the other: much of a test is waiting for a process to start.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile
REQUIREMENTS := pyproject.toml constraints.txt requirements-demo.txt

.PHONY: demo test test-quick check env clean help

help:
	@echo "make demo         install, then the whole chain on synthetic faces (about 4 minutes after the install)"
	@echo "make test         install, then all tests      make test-quick   those that take about 3 minutes"
	@echo "make check        lint, types, imports, quick tests with coverage"
	@echo "make env          install only                 make clean        remove the environment and demo-out"

demo: $(STAMP)
	@$(BIN)/micacl demo --out "$(DEMO_OUT)"

test: $(STAMP)
	@$(PYTEST)

test-quick: $(STAMP)
	@$(PYTEST) -m "not slow"

check: $(STAMP)
	@$(BIN)/pre-commit run --all-files --show-diff-on-failure
	@$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered

env: $(STAMP)

$(STAMP): $(REQUIREMENTS) tools/install.sh
	@VENV="$(VENV)" PYTHON="$(PYTHON)" bash tools/install.sh
	@touch $(STAMP)

clean:
	rm -rf $(VENV) $(DEMO_OUT)
