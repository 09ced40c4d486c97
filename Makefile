# `make distill` and `make test` do all set-up on a fresh machine with Python 3.11–3.13.
PYTHON ?= $(firstword $(foreach python,python3.12 python3.11 python3.13 python3,$(shell $(python) -c 'import sys; print("$(python)" * ((3, 11) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= conf/cartpole_1d.yaml

.PHONY: distill test lint install clean

distill: install
	$(BIN)/lightning fit --config $(CONFIG)

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/python -m pip install --quiet "ruff>=0.14,<0.18"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/installed

# Without envpool where there is no wheel of it: everything works, MuJoCo is simulated more slowly.
$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed and not on the PATH (set PYTHON=...)"; exit 1; }
	@echo "installing into $(VENV): some minutes, nothing is printed"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[test,fast]" || $(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV)
