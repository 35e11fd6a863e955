"""The command line of every experiment: compose, validate, run; one-line errors; sweeps that go on.

    if __name__ == "__main__":
        main("grpo", run)

Exit codes: 0 done, 1 a run failed, 2 refused: the config, or something it names, is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig

from runtime import STARTED
from runtime.config import CONF, Plan, one_line, validate
from runtime.explain import explain, known_keys
from runtime.overrides import check
from runtime.schema import suggest

FAILED, REFUSED = 1, 2


class SetupError(Exception):
    """Something that a person can mend, in one line."""


@contextmanager
def setup_phase() -> Iterator[None]:
    """Turn ValueError and OSError (a missing file) into a one-line `SetupError`: exit code 2, no traceback.

    Experiments wrap loading of models, clips and checkpoints in it. What fails later is a defect and keeps
    its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise SetupError(one_line(str(error))) from error


Prepare = Callable[[DictConfig, Sequence[str]], DictConfig]
"""Changes a composed config before it is checked, knowing the overrides of the command line."""


def main(config_name: str, run: Callable[[Plan], None], prepare: Prepare = lambda cfg, overrides: cfg) -> None:
    """Run an experiment from `sys.argv` and exit.

    Args:
        config_name: primary config in `conf/`.
        run: the experiment; imports what is heavy inside. `plan.settings.run_dir` is set; the folder is not
            made yet.
        prepare: see `Prepare`.
    """
    # One line for people; where in the code it was raised says nothing to them.
    warnings.formatwarning = lambda message, *where, **more: f"warning: {message}\n"
    options, overrides = _arguments()
    if options.config_dir is not None:
        # a scratch folder holds its Python file beside its YAML
        sys.path.append(str(Path(options.config_dir).resolve()))
    outcome = _Outcome(wanted=_wants_traceback())
    known = partial(known_keys, config_name, options.config_dir)
    refused = outcome.guard(lambda: check(overrides), known)
    if refused:
        sys.exit(refused)
    if options.help:
        sys.exit(outcome.guard(lambda: print(explain(config_name, overrides, options.config_dir)), known))
    job = _Job(config_name, run, outcome, prepare)
    compose_and_run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job.task)
    with _raw_errors(), _sweeps_that_go_on(outcome, known):
        code = outcome.guard(compose_and_run, known)
    if outcome.cells > 1 and outcome.codes:
        print(
            f"error: {len(outcome.codes)} of {outcome.cells} runs of the sweep were refused or failed",
            file=sys.stderr,
        )
    sys.exit(code or min(outcome.codes, default=0))


@dataclass
class _Outcome:
    """Reports errors and remembers their exit codes."""

    wanted: bool
    cells: int = 0
    codes: list[int] = field(default_factory=list)

    def report(self, message: str, code: int) -> int:
        """Print one line (and the traceback where wanted)."""
        if self.wanted or code == FAILED:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        return code

    def guard(self, action: Callable[[], object], known: Callable[[], list[str]] = list) -> int:
        """Run `action`; what Hydra and OmegaConf refuse becomes one line. Returns the exit code."""
        try:
            action()
        except (HydraException, SetupError, ValueError, OSError) as error:
            return self.report(readable(error, known), REFUSED)
        return 0


@dataclass
class _Job:
    """The task function of Hydra: one cell of a sweep, or the only run."""

    config_name: str
    run: Callable[[Plan], None]
    outcome: _Outcome
    prepare: Prepare
    started: float = STARTED

    @property
    def task(self) -> Callable[[DictConfig], None]:
        """A plain function, as Hydra wants one; its module gives the job its name."""

        def task(cfg: DictConfig) -> None:
            code, cell = 0, self._cell()
            try:
                with setup_phase():
                    cfg.run_dir = self._folder(cfg)
                    cfg = self.prepare(cfg, HydraConfig.get().overrides.task)
                    plan = validate(cfg, self.config_name)
                    plan = replace(plan, started=self.started)
                self.run(plan)
            except SetupError as error:
                code = self.outcome.report(f"{cell}{error}", REFUSED)
            except Exception as error:
                code = self.outcome.report(f"{cell}{type(error).__name__}: {one_line(str(error))}", FAILED)
            self.outcome.cells += 1
            self.outcome.codes += [code] if code else []
            self.started = time.monotonic()  # of the next cell

        task.__module__ = f"experiments.{self.config_name}"
        return task

    def _folder(self, cfg: DictConfig) -> str:
        if cfg.run_dir is not None and not isinstance(cfg.run_dir, str):
            raise ValueError(f"run_dir must be text, got {cfg.run_dir!r}; quote it: run_dir=\"'{cfg.run_dir}'\"")
        given = cfg.run_dir
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return str(Path(given) / str(HydraConfig.get().job.num)) if given else HydraConfig.get().runtime.output_dir
        if cfg.resume is True and given is None:
            raise ValueError("resume=true needs the folder of the run to go on with; add run_dir=...")
        return given or str(Path("outputs") / self.config_name / time.strftime("%Y-%m-%d_%H-%M-%S"))

    def _cell(self) -> str:
        job = HydraConfig.get().job
        return f"#{job.num} {job.override_dirname}: " if HydraConfig.get().mode == RunMode.MULTIRUN else ""


# Hydra's own options that take a value, which is no override.
HYDRA = (
    ("--cfg", "-c"),
    ("--package", "-p"),
    ("--config-path", "-cp"),
    ("--config-name", "-cn"),
    ("--info", "-i"),
    ("--experimental-rerun",),
)


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    for names in HYDRA:
        parser.add_argument(*names, dest="hydra", nargs="?")
    # The deepspeed launcher names the process's GPU; the environment says the same.
    sys.argv = [sys.argv[0], *(text for text in sys.argv[1:] if not text.startswith("--local_rank="))]
    options, rest = parser.parse_known_args()
    return options, [text for text in rest if not text.startswith("-")]


@contextmanager
def _sweeps_that_go_on(outcome: _Outcome, known: Callable[[], list[str]]) -> Iterator[None]:
    """Leave cells that cannot be composed out of a sweep, each with its line; Hydra would refuse the whole sweep."""

    def compose_each(sweeper: Any, batch: list[Sequence[str]]) -> None:
        for overrides in list(batch):
            try:
                check(overrides)
                sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, list(overrides))
            except HydraException as error:
                code = outcome.report(f"{' '.join(overrides)}: {readable(error, known)}", REFUSED)
                outcome.cells, outcome.codes = outcome.cells + 1, [*outcome.codes, code]
                batch.remove(overrides)

    before = Sweeper.validate_batch_is_legal
    Sweeper.validate_batch_is_legal = compose_each  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = before  # type: ignore[method-assign]


@contextmanager
def _raw_errors() -> Iterator[None]:
    """Let Hydra raise its errors instead of printing them."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        os.environ |= {} if before is None else {"HYDRA_FULL_ERROR": before}


def _wants_traceback() -> bool:
    return "1" in (os.environ.get("ARDRAG_TRACEBACK"), os.environ.get("HYDRA_FULL_ERROR"))


def readable(error: Exception, known: Callable[[], list[str]]) -> str:
    """Return an error of composition as one line that names the key, and what would be valid."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name} does not exist; choose one of {', '.join(sorted(error.options))}"
    text = str(error.__cause__) if isinstance(error, HydraException) and not str(error) else str(error)
    key = re.match(r"Could not override '([^']+)'", text)
    if key:
        return f"{key[1]} does not exist; {suggest(key[1], known())}"
    return one_line(text)
