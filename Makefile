# PYTHON: the interpreter that has finetune and its dev extra; the one of the active virtual environment.
PYTHON ?= python
LINT_IMPORTS = $(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

.PHONY: check test format generate

check:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(LINT_IMPORTS)
	$(PYTHON) scripts/generate.py --check
	$(PYTHON) scripts/make_demo_data.py --check

test:
	$(PYTHON) -m pytest

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

generate:
	$(PYTHON) scripts/generate.py
	$(PYTHON) scripts/make_demo_data.py
