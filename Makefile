# Everything runs in .venv, which the first target to need it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= batchnorm-lab/convergence

.PHONY: demo picture test quick lint format mutants clean

demo: $(VENV)/lab.stamp
	$(BIN)/batchnorm lab run --profile quick --out $(OUT)

# The README's picture and what is behind it, from the demo's own results (without the curves).
picture: demo
	mkdir -p docs/images
	cp $(OUT)/figures/accuracy.svg docs/images/accuracy.svg
	$(BIN)/python -c "import json, sys; results = json.load(sys.stdin); del results['runs']; \
	  print(json.dumps(results, indent=2, ensure_ascii=False))" \
	  < $(OUT)/results.json > docs/images/accuracy.json

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Deletes each line of the mathematics in turn and checks that some test fails. Takes a while.
mutants: $(VENV)/dev.stamp
	$(BIN)/python tests/mutants.py

$(VENV)/bin/python:
	@echo "Creating $(VENV) and installing torch and the rest: a few minutes the first time."
	$(PYTHON) -m venv $(VENV)

$(VENV)/lab.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/lab.stamp

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
