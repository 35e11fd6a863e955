"""Trials of runs that launchers start, by the commands a user types."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.processes import SMALL
from tests.trials import GRACE, RUN, unsaved
from tests.update_trials import distance

LAUNCHERS: dict[str, list[str]] = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2"],
    "deepspeed": ["-m", "deepspeed.launcher.launch", "--node_rank", "0"],
}


def launched(model: Path, folder: Path, launcher: str, trials: int, seed: int = 0) -> dict[str, float]:
    """SIGTERM to a launcher of two real processes at random instants; what was logged must be saved."""
    rng, slowest, lost, saved = random.Random(seed), 0.0, 0, 0
    engine = "deepspeed_z2" if launcher == "deepspeed" else "plain"
    folder.mkdir(parents=True, exist_ok=True)
    for trial in range(trials):
        run_dir = folder / f"trial{trial}"
        options = [*SMALL, *RUN, f"model.path={model}", f"run_dir={run_dir}", "updates=1000", "saving.every=1000"]
        log = folder / f"{trial}.log"
        process = _start(launcher, log, f"engine={engine}", *options)
        while not (run_dir / "config.yaml").is_file():
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
        time.sleep(rng.uniform(1, 10))
        began = time.monotonic()
        process.terminate()
        process.wait(60)
        slowest = max(slowest, time.monotonic() - began)
        assert slowest < GRACE
        missing, step = unsaved(run_dir, log.read_text()[-2000:])
        lost, saved = lost + missing, saved + (step > 0)
    return {"trials": trials, "updates_lost": lost, "saved_something": saved, "slowest_seconds": round(slowest, 2)}


def _start(launcher: str, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """`experiments/grpo.py` under a launcher (`LAUNCHERS`) of two processes; what is printed goes to `log`."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    extra = ["--world_info", world] if launcher == "deepspeed" else []
    extra += [] if launcher == "python" else ["--master_port", str(random.SystemRandom().randrange(20000, 40000))]
    command = [sys.executable, *LAUNCHERS[launcher], *extra, "experiments/grpo.py", *overrides]
    threads = {} if launcher == "python" else {"OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "DS_ACCELERATOR": "cpu", **threads})


ENGINES = {
    "plain": ("python", "plain"),
    "two processes": ("torchrun", "plain"),
    "ZeRO-1": ("torchrun", "deepspeed_z1"),
    "ZeRO-2": ("deepspeed", "deepspeed_z2"),
    "ZeRO-3": ("torchrun", "deepspeed_z3"),
}


def curves(folder: Path, updates: int) -> dict[str, object]:
    """The embedded default under every engine: held-out error on the way, and the distance from the plain engine's.

    Rounding alone may tell them apart: rewards within 1 %, the held-out error within 0.05 px.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {}
    every = max(1, updates // 2)
    options = [
        f"updates={updates}",
        f"evaluation.every={every}",
        "evaluation.clips=32",
        "logger=local",
        "engine.threads=1",
    ]
    for name, (launcher, engine) in ENGINES.items():
        run_dir, log = folder / name.replace(" ", "_"), folder / f"{name}.log"
        process = _start(launcher, log, f"engine={engine}", f"run_dir={run_dir}", *options)
        assert process.wait() == 0, log.read_text()[-2000:]
        plain = folder / "plain"
        ours, theirs = (_rewards(each) for each in (run_dir, plain))
        held, base = (_held_out(each) for each in (run_dir, plain))
        reward = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        apart = distance(run_dir, plain, updates)
        assert reward <= 1e-2 and max(abs(a - b) for a, b in zip(held, base, strict=True)) <= 0.05, (held, base)
        found[name] = {"error_px": held, "reward_gap": float(f"{reward:.1e}"), "weights": float(f"{apart:.1e}")}
    return found


def _rewards(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [float(row["reward"]) for row in rows if "reward" in row]


def _held_out(run_dir: Path) -> list[float]:
    curve = json.loads((run_dir / "evaluation.json").read_text())["curve"]
    return [round(float(point["motion_error_px"]), 4) for point in curve]
