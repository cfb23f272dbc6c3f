# PYTHON: the interpreter that has finetune and its dev extra; the one of the active virtual environment.
PYTHON ?= python
LINT_IMPORTS = $(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

.PHONY: check test faults format generate

check:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(LINT_IMPORTS)
	$(PYTHON) scripts/generate.py --check
	$(PYTHON) scripts/make_demo_data.py --check

test:
	$(PYTHON) -m pytest

# 30 kills for each method, and as many of the other faults; about six minutes on two cores.
faults:
	FAULT_POINTS=30 $(PYTHON) -m pytest -n 0 tests/faults

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

generate:
	$(PYTHON) scripts/generate.py
	$(PYTHON) scripts/make_demo_data.py
