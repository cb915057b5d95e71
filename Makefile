# make quickstart   the whole loop on the embedded helpdesk, and its result table
# make annotate     open people's round on the quickstart's items in the browser
# make check test   what a change has to pass; make soak for the long proofs
#
# A machine without an NVIDIA GPU can take the smaller build of torch:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart annotate test check soak chromium postgresql

quickstart: $(VENV)/installed
	@$(BIN)/prefloop run configs/quickstart.yaml

annotate: $(VENV)/installed
	@$(BIN)/prefloop annotate configs/quickstart.yaml

# --timeout, in seconds: a test that waits for ever fails and says where; `--durations 5` names the longest.
test: $(VENV)/installed-test chromium postgresql
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --timeout 300

soak: $(VENV)/installed-test chromium postgresql
	$(BIN)/pytest -m soak

check: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prefloop needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV), once; this takes some minutes and the network."
	@$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) -e '.[test]'
	@touch $@

chromium: $(VENV)/installed-test
	@.ci/chromium $(BIN)/python

postgresql:
	@.ci/postgresql
