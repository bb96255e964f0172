# Everything runs in a virtual environment. For another interpreter: make check PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMETHEUS_PORT ?= 9090
# For make reproduce: a configuration, and options of python -m bench.reproduce
CONFIG ?= serve_vllm_demo.yaml
ARGS ?=
# One worker per core. tests/conftest.py decides which tests share a worker.
PYTEST := $(BIN)/python -m pytest --numprocesses logical

.PHONY: help setup serve monitoring check unit test test-real test-clients tools lint releases mutants wheel models heads evaluate measure reproduce results docs dashboards lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: $(VENV)/.installed  ## create a virtual environment with the pinned dependencies

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing about 2 GB of packages, which takes some minutes"
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

lint: setup  ## check style, types, import rules and names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_names.py

serve: setup  ## serve the demo pair behind the OpenAI API on port 8000, until Ctrl-C
	$(BIN)/python -m deployments

monitoring: setup  ## run Prometheus, and Grafana if it is installed, beside `make serve`, until Ctrl-C
	$(BIN)/python -m cluster.monitoring --port $(PROMETHEUS_PORT)

tools:  ## install Debian's Prometheus and Chromium for some tests (as root; otherwise lists what is missing)
	@cluster/tools.sh

check: lint unit  ## run lint and the unit tests, for everyday work

unit: setup  ## run the unit tests
	$(PYTEST) -m "not ray and not slow"

test: lint tools  ## run lint, then all tests
	$(PYTEST)

test-real: setup  ## run all tests of the real model SmolLM2-135M-Instruct, also the longer ones (about 4 minutes)
	$(PYTEST) -m "real or exhaustive" tests/parse/test_real_model.py

test-clients: setup  ## test the API with all clients of tests/clients/, and write docs/clients.md (about 10 minutes; needs Node)
	$(BIN)/python -m tests.clients

releases: setup  ## run the tests of the remote engine with each release of vLLM in parse/engines/vllm/locks/ (about 5 minutes each)
	for lock in parse/engines/vllm/locks/*.lock; do \
		VLLM_VERSION=$$(basename $$lock .lock) CI=1 $(BIN)/python -m pytest tests/parse/engines/remote/test_real_vllm.py || exit 1; \
	done

mutants: setup  ## change 200 places of the core modules, and list the changes that no test notices (up to 30 minutes)
	$(BIN)/python tools/mutants.py

wheel: setup  ## build the wheel in dist/; it contains the demo pair
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

models: setup  ## train the demo pair again (about an hour on two cores; continues after an interruption)
	$(BIN)/python -m training.pair

heads: setup  ## train the speculative heads again in all stages (about two hours on one core; continues after an interruption)
	$(BIN)/python -m training.demo_heads

evaluate: setup  ## measure the demo pair and its heads again, and write their model cards (about 25 minutes)
	bench/measure.sh pair eagle3 parallel space draft_parallel

measure: setup  ## run the measurements of bench/results/ that are missing (about 100 minutes on a quiet machine)
	bench/measure.sh

reproduce: setup  ## compare all modes of CONFIG with vLLM alone on equal hardware, and write a report
	$(BIN)/python -m bench.reproduce $(CONFIG) $(ARGS)

results: setup  ## write the figures of bench/results/ and the model cards into the pages
	$(BIN)/python -m bench.report

docs: setup  ## write the pages that are generated from code
	$(BIN)/python -m deployments.reference > docs/configuration.md
	$(BIN)/python -m deployments.engine_reference > docs/engines.md
	$(BIN)/python -m deployments.observability.metrics_reference > docs/metrics.md

dashboards: setup  ## write Grafana's dashboards and Prometheus' rules from cluster/
	$(BIN)/python -m cluster.grafana
	$(BIN)/python -m cluster.prometheus

lock: setup  ## pin the installed versions
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
