"""Runs of a very small model in processes of their own, forked from one that has imported everything already."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SMALL = [
    "+debug=smoke",
    "world.sizes=[16x16]",
    "evaluation.clips=2",
    "optimizer.lr=1e-3",
    "optimizer.decay=0",
    "engine.threads=1",
]
WAIT = 240


def warm() -> Any:
    """A multiprocessing context whose processes start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.processes", "tests.heavy"])
    return context


def begin(ranks: int, target: Callable[..., Any], *args: Any) -> list[BaseProcess]:
    """Start `target(*args)` in processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    places = [where | {"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {} for r in range(ranks)]
    started = [warm().Process(target=_run, args=(place, target, args)) for place in places]
    for process in started:
        process.start()
    return started


def end(processes: list[BaseProcess], codes: tuple[int, ...] = (0,)) -> list[int]:
    """Wait for processes; returns their exit codes, which must be among `codes`."""
    for process in processes:
        process.join(WAIT)
    found = [process.exitcode if process.exitcode is not None else -999 for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    assert all(code in codes for code in found), found
    return found


def together(ranks: int, target: Callable[..., Any], *args: Any) -> None:
    """Run `target(*args)` in `ranks` processes to its end."""
    end(begin(ranks, target, *args))


def train(model: Path, run_dir: Path, *overrides: str, primary: str = "train") -> None:
    """A whole run but for its report; for `begin`."""
    from experiments import train as loop
    from runtime.outcome import Outcome

    Outcome._draw = lambda self: None  # type: ignore[method-assign]
    loop.run(plan(model, run_dir, *overrides, primary=primary))


def plan(model: Path, run_dir: Path, *overrides: str, primary: str = "train") -> Any:
    """The plan of a very small run."""
    from hydra import compose, initialize_config_dir

    from runtime.config import CONF, validate

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate(compose(primary, [*SMALL, f"model.path={model}", f"run_dir={run_dir}", *overrides]))


def _run(place: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__ or sys.stderr)  # kill -USR2 shows where a process stands
    os.environ |= place
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    code = 0
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), _stderr_to(os.environ.get("TALK")):
        try:
            target(*args)
        except BaseException:
            traceback.print_exc()
            code = 1
    # not by way of atexit: what a forked process inherited is not its own to take down
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _stderr_to(talk: str | None) -> Any:
    if talk:
        yield
        return
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        yield
