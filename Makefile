# `make run` and `make test` need GNU make and Python 3.11 or newer. The first call sets up .venv:
# with uv, or else pip, or else python3-venv. ARGS passes arguments on: make test ARGS='-k radix'.
BIN := .venv/bin
NEW := import sys; sys.exit(sys.version_info < (3, 11))
FIND := for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(NEW)' 2>/dev/null && echo $$p && break; done
HAVE = $(shell $(1) >/dev/null 2>&1 && echo yes)
PYTHON = $(or $(shell $(FIND)),$(error khosim needs the package python3, 3.11 or newer (or uv)))
TOOL = $(or $(if $(call HAVE,uv --version),uv), $(if $(call HAVE,$(PYTHON) -m pip --version),pip), \
	$(if $(call HAVE,$(PYTHON) -m ensurepip --version),venv), \
	$(error khosim needs the package python3-venv (or python3-pip, or uv)))
MAKE_uv = uv venv -q --python '>=3.11' .venv
MAKE_pip = $(PYTHON) -m venv --without-pip .venv
MAKE_venv = $(PYTHON) -m venv .venv
GET_uv = uv pip install -q --python $(BIN)/python
GET_pip = $(PYTHON) -m pip --python $(BIN)/python install -q --disable-pip-version-check
GET_venv = $(BIN)/python -m pip install -q --disable-pip-version-check
GET = $(GET_$(TOOL)) -c constraints.txt

.PHONY: run test bench lint docs clean
run: .venv/.ready; @$(BIN)/khosim run $(ARGS)
# The whole suite is shared out to the cores; a part that ARGS picks starts sooner in one process.
SHARED = $(if $(ARGS),,-n auto --maxprocesses 8 --dist worksteal)
test: .venv/.oracle; $(BIN)/python -m pytest $(SHARED) $(ARGS)
bench: .venv/.ready; @$(BIN)/python -m benchmarks $(ARGS)
lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/mypy
docs: .venv/.docs; @$(BIN)/zensical build --strict
clean:; rm -rf .venv site

# Each stamp is written last: a folder without .ready is half made, and is made anew.
.venv/.ready: pyproject.toml constraints.txt
	@echo 'setting up .venv with $(TOOL)'; rm -rf .venv; $(MAKE_$(TOOL))
	@$(GET) -e '.[test]' && touch $@
.venv/.lint: .venv/.ready
	@$(GET) -e '.[lint]' && touch $@
.venv/.docs: .venv/.ready
	@$(GET) -e '.[docs]' && touch $@
.venv/.cluster: .venv/.ready
	@$(GET) -e '.[cluster]' && touch $@
.venv/.browser: .venv/.ready
	@$(GET) -e '.[browser]' && touch $@
# The real libfdt, which FDT code is compared with, is compiled; without it those tests skip.
.venv/.oracle: .venv/.ready
	@$(if $(call HAVE,cc --version),$(GET) -e '.[oracle]',false) >.venv/oracle.log 2>&1 || \
		echo 'no pylibfdt, so tests against it skip: no C compiler, or see .venv/oracle.log'
	@touch $@
