# make setup   an environment in .venv: the package (editable) with the extras demo and test
# make demo    zero-shot, FLYP and CaRot on real images, offline, side by side
# make test    ruff, mypy and the tests
# make lint    ruff and mypy
# make test-all  the slow checks: the demo from end to end
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# One thread: the models of the demo and of the tests are small. Offline: nothing here needs a network.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-all lint clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,test]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q

# Slow suites, run by .ci/run after `make test`: the demo as a newcomer runs it.
test-all: $(READY)
	$(BIN)/python examples/demo.py --output_dir build/demo
	test -s build/demo/reliability.png -a -s build/demo/carot/metrics.json

clean:
	rm -rf .venv build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
