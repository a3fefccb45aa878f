# Every target sets up what it needs: host packages by .ci/setup, Python packages in .venv.
.POSIX:
.NOTPARALLEL:

SPEC = specs/sessions/hello.yaml
SOAK_MINUTES = 30
BIN = .venv/bin
LAUNCHER = $(BIN)/kenaz-launcher
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST = $(BIN)/coverage run -m pytest
SHARING = --numprocesses logical --dist
# The first start no machine and wait for nothing. Of the others those of one file share what they set up; they
# begin in the order that tests/conftest.py gives them.
PURE = $(SHARING) worksteal tests/unit tests/property tests/journals specs/scenarios
REAL = $(SHARING) loadfile --no-loadscope-reorder tests/integration tests/acceptance

help: ## list the targets (what `make` alone does)
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' Makefile

# Running ----------------------------------------------------------------------------------------------------

session: host-session .venv/ready-to-run ## build the demo image once and run a session (SPEC=specs/sessions/hello.yaml)
	@driver=auto; \
	$(LAUNCHER) image build || { driver=process; echo "kenaz: there is no image, so the session gets no machine" >&2; }; \
	$(LAUNCHER) run $(SPEC) --set spec.driver=$$driver

image: host-session .venv/ready-to-run ## build the demo image for this architecture
	@$(LAUNCHER) image build

image-aarch64: host-image-aarch64 .venv/ready-to-run ## build the demo image for aarch64
	@$(LAUNCHER) image build --arch aarch64

download-image: which-image host-session .venv/ready-to-run ## fetch an image (IMAGE=name-or-URL SHA256=digest)
	@$(LAUNCHER) image pull "$$IMAGE" $${SHA256:+--sha256 "$$SHA256"}

run-vm: image ## run a session in a real machine, never in a mere process (SPEC=specs/sessions/hello.yaml)
	@$(LAUNCHER) run $(SPEC) --set spec.driver=qemu

image-sigilos: host-image-sigilos .venv/ready-to-run ## build the image with systemd, greetd and sway
	@$(LAUNCHER) image build sigilos

run-vm-aarch64: host-vm-aarch64 image-aarch64 ## the same for aarch64, emulated where the host is another (SPEC=...)
	@$(LAUNCHER) run $(SPEC) --set spec.driver=qemu --set spec.machine.arch=aarch64

# Checking ---------------------------------------------------------------------------------------------------

test: host-test lint image ## check and test everything but what is long; branch coverage must reach 90 %
	@rm -f .coverage .coverage.*
	$(PYTEST) $(PURE)
	$(PYTEST) $(REAL)
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=90

test-quick: lint ## check, and run the unit and property tests: no machine, no image, under a minute
	$(BIN)/pytest $(PURE)

test-all: host-test .venv/ready-to-test ## only what `test` leaves out because it is long
	$(BIN)/pytest --long $(PURE)
	$(BIN)/pytest --long $(REAL)

bench: host-test image .venv/ready-to-test ## measure what docs/performance.md promises
	$(BIN)/python tests/benchmarks

fuzz: .venv/ready-to-test ## tamper with frames for a long time (FUZZ=seconds, or a number of frames: 10000000f)
	$(BIN)/python tests/property/test_channel_fuzz.py $${FUZZ:-600}

soak: host-test image .venv/ready-to-test ## run sessions in one process over and over, all must stay flat (SOAK_MINUTES=30)
	$(BIN)/python tests/soak.py --process 200 --qemu 20 --at-once 50 --minutes $(SOAK_MINUTES)

lint: host-lint .venv/ready-to-test ## check style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: host-lint .venv/ready-to-test ## put the sources into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and all that was built or cached in this directory
	rm -rf .venv build dist .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Setting up -------------------------------------------------------------------------------------------------

which-image:
	@test -n "$$IMAGE" || { echo "kenaz: say which: make download-image IMAGE=name-or-URL [SHA256=digest]" >&2; exit 2; }

host-session:
	@.ci/setup session

host-test:
	@.ci/setup test

host-lint:
	@.ci/setup lint

host-image-aarch64:
	@.ci/setup image-aarch64

host-image-sigilos:
	@.ci/setup image-sigilos

host-vm-aarch64:
	@.ci/setup vm-aarch64

# A dangling link (the Python that .venv was made from has gone) counts as missing, so .venv is made anew.
.venv/bin/python:
	@python=$$(.ci/python) && "$$python" -m venv --clear .venv

# pip 25.1 is the first that knows dependency groups.
.venv/ready-to-run: .venv/bin/python pyproject.toml
	@echo "kenaz: installing into .venv"
	@$(PIP) --upgrade "pip>=25.1"
	@$(PIP) --editable .
	@touch $@

.venv/ready-to-test: .venv/bin/python pyproject.toml
	@echo "kenaz: installing into .venv, with the tools for testing"
	@$(PIP) --upgrade "pip>=25.1"
	@$(PIP) --editable . --group test --group lint
	@[ -z "$${KENAZ_REQUIRE_ALL:-}" ] || $(BIN)/python -m tests.wine
	@touch .venv/ready-to-run $@

.PHONY: help session image image-aarch64 image-sigilos download-image run-vm run-vm-aarch64 test test-quick test-all bench fuzz soak lint format clean \
	which-image host-session host-test host-lint host-image-aarch64 \
	host-image-sigilos host-vm-aarch64
