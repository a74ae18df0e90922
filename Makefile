# make setup   an environment in .venv: the package (editable) with the extras demo, docs and test
# make demo    zero-shot, FLYP and CaRot on real images, offline, side by side
# make test    ruff, mypy and the tests
# make lint    ruff and mypy
# make docs    the site in build/docs
# make test-all  the slow checks: the site, the demo, the slow tests, the Space of the metric, the quick report of the tables
# make test-space  the Space of the metric in its own environment, driven in headless Chromium; trackio there, too
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SPACE := .venv-space

# One thread: the models of the demo and of the tests are small. Offline: nothing here needs a network.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-all test-space docs lint clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,docs,test]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q

# Slow suites, run by .ci/run after `make test`.
test-all: $(READY) docs test-space
	$(BIN)/python examples/demo.py --output_dir build/demo
	test -s build/demo/reliability.png -a -s build/demo/carot/metrics.json
	$(BIN)/python -m pytest -q -m slow
	$(BIN)/python examples/reproduce_tables.py --suite digits --seeds 1 --quick --output_dir build/report
	test -s build/report/README.md -a -s build/report/results.csv -a -s build/report/figure5.png

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-space: $(SPACE)/.ready
	test -x /usr/bin/chromium || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)
	$(SPACE)/bin/python -m pytest -q -m space tests/space

# As a Space has it: its requirements.txt; and what the tests need. The package comes from here. trackio is tested there
# as well: it goes with that pillow.
$(SPACE)/.ready: setup.cfg carot_hf/ece/requirements.txt tests/space/constraints.txt
	$(PYTHON) -m venv $(SPACE)
	$(SPACE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/space/constraints.txt \
		--editable . --requirement carot_hf/ece/requirements.txt pytest playwright trackio
	touch $@

clean:
	rm -rf .venv $(SPACE) build dist demo report runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
