# make demo         the whole loop on this machine: serve, learn, swap, report; BUFFER=redis keeps
#                   traces and weights in a Valkey server that it starts, BUFFER=kafka in Tansu;
#                   MPS=1 shares the GPU by CUDA MPS, OWN_GPU=1 gives the trainer a second one
# make test         all tests; ARGS=... is passed to pytest
# make check        lint, format, types, import order, house rules
# make real         fetches a real target, SmolLM2-135M-Instruct, and says how to serve it
# make bench        the published figures; AGAINST=FOLDER compares speed with another checkout
# make bench-real   figures for a target and a drafter trained on the spot, and for peers; needs a GPU
# make clean        remove everything that make created
#
# Each target first installs what it needs into .venv. PYTHON=... selects the interpreter, 3.11 or
# 3.12.

VENV := .venv
BIN := $(VENV)/bin
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
HAS_GPU := $(shell { ls /dev/nvidia[0-9]* || nvidia-smi -L; } >/dev/null 2>&1 && echo yes)
IS_LINUX := $(shell test `uname -s` = Linux && echo yes)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
EXTRAS := dev$(if $(HAS_GPU),$(shell echo ',gpu'))
# --no-compile: compiling all of torch takes a minute, and modules are compiled on first import.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt

# Otherwise each test server would recompile torch and transformers, which triples its start-up time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check real bench bench-real setup clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m examples.demo $(if $(BUFFER),--buffer $(BUFFER)) $(if $(MPS),--mps) $(if $(OWN_GPU),--own-gpu)

# Three processes, for two cores: now and then, tests of brokers and servers only wait.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.house.check_house

real: setup
	$(BIN)/python -m examples.real_target

bench: setup
	$(BIN)/python -m benchmarks.demo
	$(BIN)/python -m benchmarks.lossless --device cpu
	$(BIN)/python -m benchmarks.data_path
	$(BIN)/python -m benchmarks.engine.host
	$(if $(AGAINST),$(BIN)/python -m benchmarks.house --against $(AGAINST))
ifneq ($(HAS_GPU),)
	$(if $(AGAINST),$(BIN)/python -m benchmarks.house --gpu --against $(AGAINST))
	$(BIN)/python -m benchmarks.one_gpu --start bundled --out benchmarks/results/one_gpu_bundled.json
	$(BIN)/python -m benchmarks.one_gpu --start random --out benchmarks/results/one_gpu_random.json
	for name in attention capture distill drafter drafting linear penalties rounds verify; do \
		$(BIN)/python -m benchmarks.ops.$$name || exit 1; done
	$(BIN)/python -m benchmarks.engine.steps
	$(BIN)/python -m benchmarks.lossless
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.engine --parts start --keep benchmarks/results/engine_speed.json
endif

# The first two commands train the target and its drafter, a few minutes each; the rest need both.
bench-real: REAL := --target runs/real/target
bench-real: setup
	@test ! -e runs/real || { echo "runs/real exists, and its drafter may belong to another target: move it away first."; exit 1; }
	$(BIN)/python -m examples.train_target --large --out runs/real/target
	$(BIN)/python -m benchmarks.real.train_drafter $(REAL) --run-dir runs/real/run
	$(BIN)/python -m benchmarks.real.speculation $(REAL) --run-dir runs/real/run
	$(BIN)/python -m benchmarks.real.full_batch $(REAL) --run-dir runs/real/run
	$(BIN)/python -m benchmarks.peers $(REAL) --drafter runs/real/run/weights/1
	$(BIN)/python -m benchmarks.peers --shape Qwen3-8B

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
	echo "Slipstream needs Python 3.11 or 3.12; python3 on this machine is: `python3 --version 2>&1`."; \
	echo "Install one, or pass its path: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12"; \
	exit 1; }
	@$(PYTHON) -c '$(FITS)' || { echo "PYTHON=$(PYTHON) is not Python 3.11 or 3.12."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	echo "$(PYTHON) cannot create virtual environments (on Debian and Ubuntu: apt install python3-venv)."; \
	exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(IS_LINUX)$(HAS_GPU),yes)
	@# The default torch for Linux brings gigabytes of CUDA, useless without a GPU. The first command
	@# works if the configured index has the CPU build; the second takes it from pytorch.org.
	$(INSTALL) torch==$(TORCH)+cpu || \
	$(INSTALL) torch==$(TORCH)+cpu --extra-index-url https://download.pytorch.org/whl/cpu
endif
	$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
