# Every verb sets up what it needs; from nothing but Python >= 3.11 and make.
#
#   make install       environment in .venv with everything for development
#   make check         lint, format, types, imports
#   make test          the whole suite; ARGS="-k law -x" goes to pytest
#   make test-service  the service's tests in an environment without torch
#   make test-redis    the stores' tests and the laws on a server that runs: REDIS_URL=redis://localhost:6379/0
#   make docs          the documentation as a site, in build/site
#   make dist          sdist and wheel in dist/, checked
#   make images        the images of the service and the trainer, by docker
#   make forecasts     the weather model beside its baselines: the tables of docs/forecasts.md
#   make demo          train, serve and replay real weather; TRAIN=0 takes the committed model
#   make serve         the server on models/; ARGS="--port 9000"
#   make bench         the numbers of README; ARGS="--quick" for a look
#   make chaos         kill -9 at random moments, then count; ARGS="--seconds 30 --sessions 200 --seed 1"
#   make chaos-streams   the same with consumers of a stream; ARGS="--entries 1000000 --sessions 1000 --seed 1"
#   make reshard       slots of a Redis Cluster move while sessions step, then count; ARGS="--seconds 60"
#   make fuzz-heads    heads and handshakes that nobody would write; ARGS="--minutes 10 --seed 1"
#   make fuzz          bodies, frames and files that nobody would write, for minutes; ARGS="--minutes 10 --seed 1"
#   make mutants       break training on purpose, see that tests notice; ARGS="--only losses.py"
#   make lock          write constraints.txt anew from the newest versions
#   make clean         remove caches and build output
#   make distclean     remove .venv and .cache too

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
SERVICE_VENV := .cache/service-venv
SERVICE_STAMP := $(SERVICE_VENV)/.installed
LOCK_VENV := .cache/lock-venv

# Python 3.11 and 3.12 first: for these every dependency has a ready-made wheel. `make PYTHON=...` to choose.
PYTHONS := python3.11 python3.12 python3 python3.13 python3.14
PYTHON := $(shell for p in $(PYTHONS); do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& command -v "$$p" && break; done)

# -qq: errors only. A second run of make installs nothing unless one of INPUTS changed.
INPUTS := pyproject.toml constraints.txt
PIP_INSTALL = -m pip install -qq --disable-pip-version-check -c constraints.txt

# Tests that render manifests need kubectl, tests of pages a browser, those of generated clients npm, one perf_analyzer.
# What is not here is left out by its marker, and that is said.
here = $(firstword $(foreach program,$(1),$(shell command -v $(program) 2>/dev/null)))
space := $(subst ,, )
NOT_HERE := $(strip $(if $(call here,kubectl),,kubectl) $(if $(call here,npm),,node) \
	$(if $(call here,chromium chromium-browser google-chrome),,browser) \
	$(if $(call here,perf_analyzer),,perf_analyzer))
NOT_HERE := $(subst $(space), or ,$(NOT_HERE))
SAY_NOT_HERE = $(if $(NOT_HERE),@echo "Tests marked $(NOT_HERE) are left out: what they need is not on the PATH.")
WORKERS ?= 2
# One class, or the functions of one file, on one worker: what they share is made once. The long ones come early.
PYTEST_ARGS = -n $(WORKERS) --dist loadscope --no-loadscope-reorder
PYTEST = $(BIN)/python -m pytest $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help install check test test-service test-redis docs dist images demo forecasts serve bench chaos chaos-streams reshard fuzz fuzz-heads mutants lock clean distclean python

help:
	@sed -n 's/^#   //p' Makefile

python:
	@test -n "$(PYTHON)" || { \
	  echo "No Python >= 3.11 with venv and ensurepip (looked for: $(PYTHONS))."; \
	  echo "Install one (Debian, Ubuntu: python3 python3-venv; macOS: brew install python@3.12),"; \
	  echo "or name one: make PYTHON=/path/to/python3"; exit 1; } >&2

$(STAMP): $(INPUTS) | python
	@echo "Installing into $(VENV) ($(PYTHON)); the first time takes some minutes."
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(SERVICE_STAMP): $(INPUTS) | python
	@echo "Installing into $(SERVICE_VENV) ($(PYTHON)): the service and what its tests need."
	@test -x $(SERVICE_VENV)/bin/pip || "$(PYTHON)" -m venv --clear $(SERVICE_VENV)
	@$(SERVICE_VENV)/bin/python $(PIP_INSTALL) -e '.[service,test]'
	@touch $@

install: $(STAMP)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: $(STAMP)
	$(SAY_NOT_HERE)
	$(PYTEST) $(if $(NOT_HERE),-m 'not ($(NOT_HERE))') $(ARGS)

# Only files that name the marker are collected: others may import torch.
test-service: $(SERVICE_STAMP)
	@$(SERVICE_VENV)/bin/python -c "import importlib.util as u; assert u.find_spec('torch') is None, 'torch is installed'"
	$(SAY_NOT_HERE)
	@files=$$(grep -lw 'mark\.service' tests/test_*.py) || { echo "No test is marked service." >&2; exit 1; }; \
	$(SERVICE_VENV)/bin/python -m pytest $(PYTEST_ARGS) \
	  -m 'service$(if $(NOT_HERE), and not ($(NOT_HERE)))' $(ARGS) $$files

test-redis: $(STAMP)
	@test -n "$(REDIS_URL)" || { echo "Which server? make test-redis REDIS_URL=redis://localhost:6379/0" >&2; exit 1; }
	REDIS_URL=$(REDIS_URL) $(PYTEST) -k given $(ARGS) tests/test_store.py tests/test_laws.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/check-wheel-contents dist/*.whl

images:
	docker build --target service --tag stepcast-service .
	docker build --target training --tag stepcast-training .

demo: $(STAMP)
	$(BIN)/python demo/replay.py $(if $(filter 0,$(TRAIN)),--committed,) $(ARGS)

forecasts: $(STAMP)
	$(BIN)/python -m training backtest training/recipes/weather.yaml --page docs/forecasts.md --json docs/assets/forecasts.json \
	  --keep-peers $(ARGS)

serve: $(STAMP)
	$(BIN)/python -m service serve $(ARGS)

# A peer without a wheel for this machine is left out, and the benchmark says so.
$(BENCH_STAMP): $(STAMP)
	@echo "Installing the peers to measure beside."
	@$(BIN)/python $(PIP_INSTALL) -e '.[bench]' || echo "Some peers cannot be installed here."
	@touch $@

bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

chaos: $(STAMP)
	PYTHONPATH=. $(BIN)/python tests/chaos.py $(ARGS)

chaos-streams: $(STAMP)
	PYTHONPATH=.:tests $(BIN)/python tests/stream_chaos.py $(ARGS)

reshard: $(STAMP)
	PYTHONPATH=. $(BIN)/python tests/resharding.py $(ARGS)

fuzz-heads: $(STAMP)
	PYTHONPATH=.:tests $(BIN)/python tests/fuzz_heads.py $(ARGS)

fuzz: $(STAMP)
	PYTHONPATH=. $(BIN)/python tests/fuzz.py $(ARGS)

mutants: $(STAMP)
	$(BIN)/python tests/mutants.py $(ARGS)

# Versions without a local part (torch's +cpu) and without CUDA's packages, which torch and onnxruntime-gpu pin
# themselves: the file fits machines with and without a GPU.
lock: | python
	"$(PYTHON)" -m venv --clear $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev,bench]'
	{ echo '# Exact versions that the suite passed with; written by `make lock`.'; \
	  $(LOCK_VENV)/bin/python -m pip freeze --exclude-editable \
	    | sed -E 's/\+[A-Za-z0-9.]+$$//' | grep -vE '^(nvidia-|cuda-|triton==)' \
	    | awk -F== '{ print } /^onnxruntime==/ { print "onnxruntime-gpu==" $$2 }'; } > constraints.txt.new
	mv constraints.txt.new constraints.txt

# Sessions (*.db) and training runs are yours: no verb removes them.
clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
	find stepcast service training tests benchmarks demo -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) .cache
