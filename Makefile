# Everything here works on a fresh Debian machine; `make setup` installs what is missing.
SHELL := /bin/bash
PREFIX ?= /opt/tcpstuck-trace
SBIN ?= /usr/local/sbin
SHARE ?= /usr/local/share
UNITS ?= /usr/local/lib/systemd/system
DEFAULTS ?= /etc/default
PYTHON := .venv/bin/python
# Installed from a copy, because building leaves files behind that would belong to root here.
PACKAGED := setup.cfg pyproject.toml README.md LICENSE tcpstuck_bpf bpf docs lab
PAGES := man/man8/tcpstuck-trace.8 bash-completion/completions/tcpstuck-trace \
	zsh/site-functions/_tcpstuck-trace
export PIP_ROOT_USER_ACTION := ignore
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo quick test lint types unit golden kernel-test test-kernels bench
.PHONY: pages deb install uninstall clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: ## install what is missing (root or sudo), fetch the guests' kernel, make .venv
	@lab/setup.sh

demo: setup ## a real MariaDB whose clients get stuck, and the tool naming them (5 minutes)
	@$(PYTHON) -m lab demo

quick: setup ## checks, tests without a kernel, and the core scenarios in one guest by fentry
	@$(PYTHON) -m lab test --core

test: setup ## every check and test but the slow ones, the kernel tests in two guests
	@$(PYTHON) -m lab test --guests 2 --coverage

lint: setup ## style of Python, C and shell
	@$(PYTHON) -m lab test lint

types: setup ## static types
	@$(PYTHON) -m lab test types

unit: setup ## the tests that need neither root nor BCC
	@$(PYTHON) -m lab test unit

kernel-test: setup ## the tests on a real kernel, the slow ones too (hours)
	@$(PYTHON) -m lab test --slow kernel

test-kernels: setup ## the kernel tests on every kernel of the matrix (an hour or more)
	@$(PYTHON) -m lab matrix --json build/kernels.json

golden: setup ## record tests/golden anew, in a guest; read the difference
	@$(PYTHON) -m lab golden

bench: setup ## what tracing costs, in instructions
	@$(PYTHON) -m bench

deb: setup ## the Debian package, built in a fresh tree of Debian 12 (minutes)
	@$(PYTHON) -m lab deb

pages: setup ## write the manual page and the completions to build/pages
	@$(PYTHON) -m lab pages

install: ## as root: the tool in PREFIX, and tcpstuck-trace on root's PATH
	@/usr/bin/python3 -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("bcc"))' || \
		echo 'install: no BCC here (apt install python3-bpfcc): this machine can trace with --programs only' >&2
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

uninstall: ## as root: remove what install made
	@if [ -e $(PREFIX) ] && [ ! -e $(PREFIX)/pyvenv.cfg ]; then \
		echo 'uninstall: $(PREFIX) is not what `make install` makes: left alone' >&2; exit 1; fi
	rm -rf $(PREFIX)
	rm -f $(SBIN)/tcpstuck-trace $(addprefix $(SHARE)/,$(PAGES))
	rm -f $(UNITS)/tcpstuck-trace.service $(DEFAULTS)/tcpstuck-trace

clean: ## remove what was built here, .venv too
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
