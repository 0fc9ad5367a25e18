# `make demo` and `make test` work on a fresh clone; the environment they make is .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# The variables, unlike -c, reach the environments that packages are built in; relative, as pip splits them at spaces.
CONSTRAINED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
# Errors only; modules are compiled when they are first imported, which halves the time of an installation.
INSTALL := $(CONSTRAINED) $(BIN)/python -m pip install --disable-pip-version-check -qq --no-compile
# It pins a release of requests from 2020, which would drag others along.
TORCHATTACKS := $(INSTALL) --no-deps torchattacks
MANIFESTS := pyproject.toml requirements.txt constraints.txt $(wildcard plugins/*/pyproject.toml)

.PHONY: demo install dev test test-slow coverage mutation lint format docs bench clean

demo: install
	$(BIN)/advplug eval --model resnet18 --attack ifgsm --defense prune

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("advplug needs Python 3.11 or later: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(MANIFESTS) | $(BIN)/python
	@echo "Installing advplug and its plugins into $(VENV), about a minute ..." >&2
	$(INSTALL) -r requirements.txt
	$(TORCHATTACKS)
	@touch $@

$(VENV)/.installed-dev: $(MANIFESTS) | $(BIN)/python
	@echo "Installing advplug, its plugins and the development tools into $(VENV), about a minute ..." >&2
	$(INSTALL) -r requirements.txt -e '.[dev]'
	$(TORCHATTACKS)
	@touch $@ $(VENV)/.installed

# Ray takes 200 MB, and only the slow tests need it; they build the site of the documentation, too.
$(VENV)/.installed-slow: $(VENV)/.installed-dev
	$(INSTALL) -e '.[docs,ray]'
	@touch $@ $(VENV)/.installed-docs

$(VENV)/.installed-mutation: $(VENV)/.installed-dev
	$(INSTALL) -e '.[mutation]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(INSTALL) -e '.[docs]'
	@touch $@

# The tests' tensors are small: threads would wait for each other most of the time.
coverage mutation test test-slow: export OMP_NUM_THREADS ?= 1

test: dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed-slow
	$(BIN)/python -m pytest -m slow

# The lines of the core that tests run, in processes that they start, too; at least 90 %.
coverage: dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile --timeout 600
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Small changes to the code that tests have to notice: minutes for each part; `make mutation PARTS=ball` is one of them.
mutation: $(VENV)/.installed-mutation
	$(BIN)/python .ci/mutation.py $(PARTS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

# The generated parts of the pages (a test sees to it that they are up to date), then the site, into the folder site.
# The reference is made on the way and kept nowhere else. The variable silences advertising.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/check_links.py site

# Some hours; with ADVPLUG_DATA set on real images. BENCH="engine startup" runs these only.
bench: $(VENV)/.installed-slow
	$(BIN)/python benchmarks/all.py $(BENCH)

clean:
	rm -rf $(VENV) build dist mutants site .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests $(wildcard plugins) -name __pycache__ -prune -exec rm -rf {} + -o -name '*.egg-info' -prune -exec rm -rf {} +
