# make demo    the whole loop on this machine: serve, learn, swap, report
# make test    all tests                make check   lint, format, types, order of imports
# make bench   the measured figures     make clean   remove what make made
#              AGAINST=FOLDER: speed against another checkout, too
# make bench-real   figures of a target trained on the spot, a drafter for it, and peers; on a GPU
#
# Each installs what it needs into .venv first. PYTHON=... names an interpreter (3.11 or 3.12),
# ARGS=... goes to pytest.

VENV := .venv
BIN := $(VENV)/bin
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
HAS_GPU := $(shell { ls /dev/nvidia[0-9]* || nvidia-smi -L; } >/dev/null 2>&1 && echo yes)
IS_LINUX := $(shell test `uname -s` = Linux && echo yes)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
EXTRAS := dev$(if $(HAS_GPU),$(shell echo ',gpu'))
# Bytecode is written when a module is first imported; compiling all of torch takes a minute.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo test check bench bench-real setup clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m examples.demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.demo
	$(BIN)/python -m benchmarks.lossless --device cpu
	$(BIN)/python -m benchmarks.verification
	$(if $(AGAINST),$(BIN)/python -m benchmarks.house --against $(AGAINST))
ifneq ($(HAS_GPU),)
	$(if $(AGAINST),$(BIN)/python -m benchmarks.house --gpu --against $(AGAINST))
	$(BIN)/python -m benchmarks.one_gpu --start bundled --out benchmarks/results/one_gpu_bundled.json
	$(BIN)/python -m benchmarks.one_gpu --start random --out benchmarks/results/one_gpu_random.json
	for name in attention capture decoder distill drafter drafting linear penalties rounds verify; do \
		$(BIN)/python -m benchmarks.ops.$$name || exit 1; done
	$(BIN)/python -m benchmarks.engine.steps
	$(BIN)/python -m benchmarks.lossless
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.engine --parts start --keep benchmarks/results/engine_speed.json
endif

# The first makes the target and the second its drafter, some minutes each; the others need both.
bench-real: REAL := --target runs/real/target
bench-real: setup
	@test ! -e runs/real || { echo "runs/real is there already, and its drafter may be of another target: move it away first."; exit 1; }
	$(BIN)/python -m examples.train_target --large --out runs/real/target
	$(BIN)/python -m benchmarks.real.train_drafter $(REAL) --run-dir runs/real/run
	$(BIN)/python -m benchmarks.real.speculation $(REAL) --run-dir runs/real/run
	$(BIN)/python -m benchmarks.real.full_batch $(REAL) --run-dir runs/real/run
	$(BIN)/python -m benchmarks.peers $(REAL) --drafter runs/real/run/weights/1
	$(BIN)/python -m benchmarks.peers --shape Qwen3-8B

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
	echo "Slipstream needs Python 3.11 or 3.12; python3 here is: `python3 --version 2>&1`."; \
	echo "Install one of them, or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12"; \
	exit 1; }
	@$(PYTHON) -c '$(FITS)' || { echo "PYTHON=$(PYTHON) is not Python 3.11 or 3.12."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	echo "$(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)."; \
	exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(IS_LINUX)$(HAS_GPU),yes)
	@# The ordinary torch for Linux brings gigabytes of CUDA, of no use here. The first form works
	@# where the configured index offers the CPU build, the second where the internet does.
	$(INSTALL) torch==$(TORCH)+cpu || \
	$(INSTALL) torch==$(TORCH)+cpu --extra-index-url https://download.pytorch.org/whl/cpu
endif
	$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
