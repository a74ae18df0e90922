# make setup   an environment in .venv: the package (editable) with the extras demo, docs and test
# make demo    zero-shot, FLYP and CaRot on real images, offline, side by side
# make test    make lint and the tests
# make lint    ruff, mypy, bandit, and codespell: misspelt words anywhere, in prose American ones, too
# make docs    the site in build/docs
# make test-all  the slow checks: the site, the slow tests, the numerical tests as on other processors, the rehearsal, the
#                Space of the metric, the built package, the lowest and newest versions, the quick report of the tables
# make test-release   what takes minutes and tells little between releases: the benchmarks run, long fuzzing
# make test-cpus      the numerical tests with other kernels and other numbers of threads
# make rehearsal      the main job at full shape, with real names and tokens and few images
# make test-package   the built wheel in an empty environment, used from elsewhere
# make test-versions  the lowest and the newest versions of the libraries underneath, each in an environment of its own
# make newest         write tests/versions/newest.txt anew from the package index, before a release
# make audit          known vulnerabilities of what is installed; needs a network, no part of the others
# make test-space  the Space of the metric in its own environment and each page of the site, in headless Chromium; trackio there, too
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SPACE := .venv-space
LOWEST := .venv-lowest
NEWEST := .venv-newest
REHEARSAL := .venv-rehearsal
# Parts joined by + run at once.
ALL := docs test-cpus rehearsal+test-space+test-package test-versions test-slow report
PIP := -m pip install --quiet --disable-pip-version-check
# Tests run in as many processes as there are cores, eight at most; `make test JOBS=1`: in one.
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(8, os.cpu_count() or 1))")
PYTEST := -m pytest -q -n $(JOBS) --dist worksteal
PROSE := $(wildcard *.md) docs benchmarks/README.md carot_hf/ece/README.md carot_hf/hub/card.md
WRITTEN := $(PROSE) carot_hf examples space benchmarks tests Makefile mkdocs.yml setup.cfg pyproject.toml
# Names in code are as their libraries spell them.
IN_PROSE := --skip '*.py,*.css,*.js,*.png,*.csv' --ignore-regex '`[^`]+`' --ignore-multiline-regex '```.*?```'
# The tests that touch transformers, datasets, accelerate, evaluate, huggingface_hub and Pillow.
VERSION_TESTS := $(foreach name,architecture attacks benchmark_suites benchmark_suites_measured classifier content_hash data data_options \
	ece evaluation evaluator hub choices distinct_captions early_stopping eval_sets folders images imagenet_hard imagenet_suite labels loading \
	log_for_people model_card model_stock prepare processors resume resume_facts security start streaming suite_file suites \
	survey table_files training training_args vrf_sets waits,$(wildcard tests/test_$(name).py tests/*/test_$(name).py))

# One thread: the models of the demo and of the tests are small. Offline: nothing here needs a network.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-all test-slow test-release test-cpus rehearsal report test-space test-package test-versions newest audit docs lint clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,docs,test]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py
	@test -s out/demo/reliability.png -a -s out/demo/carot/metrics.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive carot_hf examples space --configfile pyproject.toml
	$(BIN)/codespell $(WRITTEN)
	$(BIN)/codespell --dictionary tests/style.txt $(IN_PROSE) $(PROSE)

test: lint
	$(BIN)/python $(PYTEST)

# What .ci/run runs after `make demo` and `make test`; each part is a target of its own, its time is printed at the end.
test-all: $(READY)
	$(BIN)/python tests/parts.py $(ALL)

test-slow: $(READY)
	$(BIN)/python $(PYTEST) -m 'slow and not release'

test-release: $(READY)
	$(BIN)/python $(PYTEST) -m release
	FUZZ_EXAMPLES=5000 $(BIN)/python $(PYTEST) -m slow tests/test_fuzz.py

test-cpus: $(READY)
	$(BIN)/python tests/cpus.py

rehearsal: $(READY) $(REHEARSAL)/.ready
	$(BIN)/python -m pytest -q -m rehearsal tests/rehearsal

$(REHEARSAL)/.ready: tests/rehearsal/requirements.txt $(READY)
	$(BIN)/python $(PIP) --no-deps --upgrade --target $(REHEARSAL) --requirement tests/rehearsal/requirements.txt
	touch $@

report: $(READY)
	$(BIN)/python examples/reproduce_tables.py --suite digits --seeds 1 --quick --output_dir out/report-quick
	test -s out/report-quick/README.md -a -s out/report-quick/results.csv -a -s out/report-quick/figure5.png

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-space: $(SPACE)/.ready docs
	test -x /usr/bin/chromium || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)
	$(SPACE)/bin/python -m pytest -q -m space tests/space

# As a Space has it: its requirements.txt; and what the tests need. The package comes from here. trackio is tested there
# as well: it goes with that pillow.
$(SPACE)/.ready: setup.cfg space/requirements.txt tests/space/constraints.txt
	$(PYTHON) -m venv $(SPACE)
	$(SPACE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/space/constraints.txt \
		--editable . --requirement space/requirements.txt pytest playwright trackio
	touch $@

test-package: $(READY)
	$(BIN)/python -m pytest -q -m package tests/package

test-versions: $(LOWEST)/.ready $(NEWEST)/.ready
	$(LOWEST)/bin/python $(PYTEST) $(VERSION_TESTS)
	$(NEWEST)/bin/python $(PYTEST) $(VERSION_TESTS)

.venv-%/.ready: setup.cfg tests/versions/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(PIP) --constraint tests/versions/$*.txt --editable '.[demo]' pytest pytest-xdist hypothesis tensorboard
	touch $@

newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP) torch==2.13.0 --editable '.[demo]' pytest pytest-xdist hypothesis tensorboard
	(grep '^#' tests/versions/newest.txt; echo torch==2.13.0; $(NEWEST)/bin/python -m pip list --format=freeze \
		--exclude carot_hf --exclude torch --exclude pip --exclude setuptools) > $(NEWEST)/newest.txt
	mv $(NEWEST)/newest.txt tests/versions/newest.txt
	touch $(NEWEST)/.ready

audit: $(READY)
	HF_HUB_OFFLINE=0 $(BIN)/pip-audit --local --skip-editable

clean:
	rm -rf .venv $(SPACE) $(LOWEST) $(NEWEST) $(REHEARSAL) out/demo out/report out/report-quick build dist demo report runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
