# make demo: two drawn figures become a video, offline, by the tiny model that comes along. make test: every test.
# Both make .venv on a fresh machine; later runs find it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint docs chromium clean

demo: $(VENV)/installed
	$(BIN)/refalign demo --output demo

test: $(VENV)/installed chromium
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,background,ray]" bitsandbytes
	$(BIN)/python -m pytest -q -m slow

chromium:  # for the tests of the app, which are skipped where there is none, but not in CI
	@command -v chromium chromium-browser google-chrome >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null 2>&1; } \
		|| echo "There is no Chromium, and it cannot be installed here: the app is not tested in a browser." >&2

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/lint-imports
	$(BIN)/pyright

docs: $(VENV)/installed  # pages in site/. Not --quiet, with which --strict passes over warnings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[test]"
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true  # by all cores, unlike pip; some files are no Python 3
	touch $@

clean:
	rm -rf $(VENV) demo build dist site
