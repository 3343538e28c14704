# Every target works on a fresh Debian machine; `make setup` installs missing packages.
SHELL := /bin/bash
PREFIX ?= /opt/tcpstuck-trace
SBIN ?= /usr/local/sbin
SHARE ?= /usr/local/share
UNITS ?= /usr/local/lib/systemd/system
DEFAULTS ?= /etc/default
PYTHON := .venv/bin/python
# `install` builds from a copy: a build as root would leave root-owned files in this tree.
PACKAGED := setup.cfg pyproject.toml README.md LICENSE tcpstuck_bpf bpf docs lab
PAGES := man/man8/tcpstuck-trace.8 bash-completion/completions/tcpstuck-trace \
	zsh/site-functions/_tcpstuck-trace
export PIP_ROOT_USER_ACTION := ignore
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo quick test lint types unit golden kernel-test test-kernels bench
.PHONY: pages deb install uninstall clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: ## install missing packages (root or sudo), fetch the guests' kernel, create .venv
	@lab/setup.sh

demo: setup ## make clients of a real MariaDB get stuck, and list them with the tool (3 minutes)
	@$(PYTHON) -m lab demo

quick: setup ## run checks, tests without a kernel, and the core scenarios in one guest with fentry
	@$(PYTHON) -m lab test --core

test: setup ## run every check and test except slow ones; kernel tests run in two guests
	@$(PYTHON) -m lab test --guests 2 --coverage

lint: setup ## check the style of Python, C and shell
	@$(PYTHON) -m lab test lint

types: setup ## check static types
	@$(PYTHON) -m lab test types

unit: setup ## run the tests that need neither root nor BCC
	@$(PYTHON) -m lab test unit

kernel-test: setup ## run the tests on a real kernel, including slow ones (hours)
	@$(PYTHON) -m lab test --slow kernel

test-kernels: setup ## run the kernel tests on every kernel of the matrix (an hour or more)
	@$(PYTHON) -m lab matrix --json build/kernels.json

golden: setup ## re-record tests/golden in a guest; review the diff
	@$(PYTHON) -m lab golden

bench: setup ## measure the cost of tracing, in instructions
	@$(PYTHON) -m bench

deb: setup ## build the Debian package in a fresh Debian 12 tree (minutes)
	@$(PYTHON) -m lab deb

pages: setup ## write the manual page and the completions to build/pages
	@$(PYTHON) -m lab pages

install: ## as root: install the tool in PREFIX, and put tcpstuck-trace on root's PATH
	@/usr/bin/python3 -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("bcc"))' || \
		echo 'install: BCC is missing (apt install python3-bpfcc); without it, tracing needs --programs' >&2
	/usr/bin/python3 -m venv --system-site-packages $(PREFIX)
	copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && cp -r $(PACKAGED) "$$copy" && \
		$(PREFIX)/bin/python -m pip install --quiet --force-reinstall --no-deps "$$copy" && \
		$(PREFIX)/bin/python -m pip install --quiet "$$copy"
	install -d $(SBIN)
	ln -sf $(PREFIX)/bin/tcpstuck-trace $(SBIN)/tcpstuck-trace
	install -d $(dir $(addprefix $(SHARE)/,$(PAGES))) $(UNITS) $(DEFAULTS)
	for page in $(PAGES); do ln -sf $(PREFIX)/share/$$page $(SHARE)/$$page; done
	sed 's,/usr/bin/tcpstuck-trace,$(SBIN)/tcpstuck-trace,' packaging/tcpstuck-trace.service \
		>$(UNITS)/tcpstuck-trace.service
	[ -e $(DEFAULTS)/tcpstuck-trace ] || \
		install -m 644 packaging/tcpstuck-trace.default $(DEFAULTS)/tcpstuck-trace

uninstall: ## as root: remove what `install` created
	@if [ -e $(PREFIX) ] && [ ! -e $(PREFIX)/pyvenv.cfg ]; then \
		echo 'uninstall: $(PREFIX) was not created by `make install`; not removed' >&2; exit 1; fi
	rm -rf $(PREFIX)
	rm -f $(SBIN)/tcpstuck-trace $(addprefix $(SHARE)/,$(PAGES))
	rm -f $(UNITS)/tcpstuck-trace.service $(DEFAULTS)/tcpstuck-trace

clean: ## remove build results and .venv
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
