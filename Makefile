# `make run` and `make test` do all their own set-up: the first call builds .venv from requirements.lock.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_VERSION := 0.13.9
RUN_FILE ?= pipeline/runs/digits.yaml
WORKERS ?= 2
PART ?= 12
KILLS ?= 50
BASE ?= HEAD~1

.PHONY: run test test-long test-all test-avx2 chaos golden parts generate docs docs-links picture lint audit dist dist-check sbom pin image-check bench lock help

run: $(STAMP) ## Run the main job (RUN_FILE=path for another run file)
	$(BIN)/secateur run $(RUN_FILE)

test: $(STAMP) ## Run the test suite (WORKERS=2 processes)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25 --durations-min 8 -m "not long"

test-long: $(STAMP) ## Only the long tests: a third of them (PART=1, 2, 3), drawn by the number of commits if not given
	SECATEUR_LONG_PART=$(if $(filter command line,$(origin PART)),$(PART),$$($(BIN)/python tests/tools/third.py)) \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25 --durations-min 30 -m long

test-all: $(STAMP) ## Run every test, the long ones too (lossy networks, published detectors, 20 seeds ...)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-avx2: $(STAMP) ## Tests with AVX2 at most: a part drawn by the commit (PART=N a Nth, PART=all every one)
	@files=$$($(BIN)/python tests/tools/part.py $(PART)) && \
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  -m "$(if $(filter all,$(PART)),not long,not long and not slow)" $$files

chaos: $(STAMP) ## Kill and interrupt real runs at random (KILLS=50 SEED=N; minutes), and count what is lost, doubled, left
	$(BIN)/python -m tests.tools.chaos --kills $(KILLS) $(if $(SEED),--seed $(SEED))

golden: $(STAMP) ## Run small fixed runs with two checkouts, and compare all results (BASE=commit, HEAD~1 unless given)
	$(BIN)/python -m tests.golden.compare --base $(BASE)

parts: $(STAMP) ## Fetch what some tests need, without root: an SSH server, an emulated ARM device, a browser (into .parts/)
	tests/tools/install_sshd.sh
	tests/tools/install_arm.sh
	tests/tools/install_chromium.sh

generate: $(STAMP) ## Write what documentation pages repeat of the code: keys, commands, options, figures
	$(BIN)/python docs/generate.py

picture: ## The picture of a report in README, by the browser of `make parts` (RUN=run directory)
	.parts/chromium/chromium --headless --no-sandbox --hide-scrollbars --window-size=1200,900 \
	  --screenshot=$(CURDIR)/docs/images/report.png file://$(abspath $(RUN))/report.html

docs: $(STAMP) ## The site (docs/_build/html), offline; every warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -j auto -b html docs docs/_build/html

docs-links: $(STAMP) ## Follow the links of the documentation that lead outside (needs a network)
	$(BIN)/sphinx-build -q -b linkcheck docs docs/_build/links

lint: $(STAMP) ## Style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile .devcontainer/Dockerfile

audit: $(STAMP) ## The lock, the environment and licences, offline; known faults too where a service answers
	$(BIN)/python tests/tools/audit.py --online

dist: $(STAMP) ## Wheel (with its bill of materials) and sdist into dist/, checked by twine
	$(BIN)/python docker/dist.py dist
	$(BIN)/twine check --strict dist/*

dist-check: dist ## Install the wheel beside the locked packages in a fresh environment, and run the digits there
	tests/tools/dist.sh $(CURDIR)/dist

sbom: $(STAMP) ## Bill of materials of the environment, CycloneDX JSON (build/sbom.json)
	@mkdir -p build
	$(BIN)/python docker/sbom.py > build/sbom.json

pin: ## Ask the registry for the digests of the images, and write them into the files (needs docker)
	$(PYTHON) docker/pin.py

image-check: $(STAMP) ## Execute the Dockerfile on a bare Debian, without an engine (root; several GB; IMAGE=--reduced)
	tests/tools/image.sh $(IMAGE)

bench: $(STAMP) ## Run every benchmark (hours; SECATEUR_DATA as in the CIFAR run file); tables, and JSON beside each
	@for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script --json $${script%.py}.json || exit 1; done

lock: ## Write requirements.lock anew from pyproject.toml (needs uv)
	uv pip compile --universal --python-version 3.11 --no-annotate --no-header --all-extras -U pyproject.toml -o requirements.lock

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

# uv installs the lock three times faster; where it cannot be used, plain pip does the same work. Wheels only, and the
# project is built by the lock's setuptools: nothing that builds comes from outside the lock.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Secateur needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the locked packages into $(VENV) (several GB; one to five minutes the first time)..."
	( $(BIN)/python -m pip install -q "uv==$(UV_VERSION)" \
	  && VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install -q --compile-bytecode --only-binary :all: -r requirements.lock \
	  && VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install -q --no-deps --no-build-isolation -e . ) \
	|| ( $(BIN)/python -m pip install -q --only-binary :all: -r requirements.lock \
	  && $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e . )
	@touch $(STAMP)
