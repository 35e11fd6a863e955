# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON   ?= python3
VENV     ?= .venv
# More arguments for pip, such as PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for a small CPU-only torch.
PIP_ARGS ?=
# Hydra overrides for the experiment a target runs, such as ARGS="updates=10 seed=1".
ARGS     ?=

BIN      := $(VENV)/bin
PIP      := $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
SOURCES  := envs policies rewards algorithms data tracking metrics runtime experiments benchmarks

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow soak lint bench bench-trackers tables learn ablation-step1 compare study tiny clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[wandb]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[wandb,dev]'
	@touch $@

venv: $(VENV)/.installed-dev  ## make .venv and install everything a developer needs

demo: $(VENV)/.installed  ## install, then improve the embedded model with GRPO and report the gain
	$(BIN)/python experiments/grpo.py reward=motion+aesthetic $(ARGS)

test: $(VENV)/.installed-dev  ## install, then run the tests
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.installed-dev  ## the tests that `make test` leaves out: every algorithm with every schedule, kernel and reward
	$(BIN)/python -m pytest -q -m slow

soak: $(VENV)/.installed-dev  ## what runs promise, tried hundreds of times: kills, signals, damage, full disks, 40 minutes of faults (long)
	$(BIN)/python -m benchmarks.soak $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy $(wildcard $(SOURCES))

bench: $(VENV)/.installed  ## seconds per phase of an iteration, and the speed of rollout and re-scoring
	$(BIN)/python -m benchmarks $(ARGS)

bench-trackers: $(VENV)/.installed  ## trackers on 200 clips whose tracks are known; ARGS="--folder my_videos" adds real ones
	$(BIN)/python -m benchmarks.trackers $(ARGS)

tables: $(VENV)/.installed  ## the paper's Tables 2 and 3 and Figure 6 on the embedded world, 3 seeds (long; goes on where it stopped)
	$(BIN)/python experiments/tables.py $(ARGS)

learn: $(VENV)/.installed  ## the learning result of the README: 3 seeds and the controls (long; goes on where it stopped)
	$(BIN)/python experiments/learn.py $(ARGS)

ablation-step1: $(VENV)/.installed  ## ways of making the student's clips in distillation, side by side (long; goes on where it stopped)
	$(BIN)/python experiments/ablation_step1.py $(ARGS)

compare: $(VENV)/.installed  ## the algorithms side by side, 3 seeds each (long; goes on where it stopped)
	$(BIN)/python experiments/compare.py $(ARGS)

study: $(VENV)/.installed  ## what schedules of stochastic steps do to the signal of an update (long; goes on where it stopped)
	$(BIN)/python experiments/study.py schedules $(ARGS)

tiny: $(VENV)/.installed  ## train the embedded models from nothing, into outputs/tiny (long)
	$(BIN)/python experiments/tiny.py $(ARGS)

clean:  ## remove caches and the virtual environment; runs in outputs/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
