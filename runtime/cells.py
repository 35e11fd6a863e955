"""Tables of many runs: each cell is a run of its own, in a folder of its own, and is run once.

A finished cell is not run again as long as its command, the settings that this comes to (`config`, a hash) and the
weights it starts from are the same: its result stands in `docs/results/<table>.jsonl`, which is committed, and needs no
folder. An unfinished one goes on from what it left in its folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from runtime.checkpoint import replace_text, sha256
from runtime.composed import Run, fingerprint
from runtime.hardware import processor
from runtime.runlog import read as read_log
from runtime.verdict import t95

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS, RESULTS = ROOT / "experiments", ROOT / "docs" / "results"
# Latent frames of a clip in training.
FRAMES = 9
Row = dict[str, Any]
# What makes two results the same result.
IDENTITY = ("command", "config", "weights")
# Digits after the point where they are not 3: smoothness differs in the fourth.
DIGITS = {"smoothness": 4, "kl_to_start": 4}
BUSY = "† measured while the machine was busy with other work: an upper bound."
# Held while a run that cells share is made, by its folder.
_ALONE: dict[str, Lock] = defaultdict(Lock)


@dataclass(frozen=True)
class Probe:
    """A further evaluation of a cell's model.

    Attributes:
        name: its folder below the cell's.
        overrides: of `evaluate.py`; `{folder}` is the cell's folder.
    """

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Home:
    """Where a table keeps its cells.

    Attributes:
        out: folder of the cells' folders.
        weights: hash of all weights that a cell may start from or be judged by.
    """

    out: Path
    weights: str


@dataclass(frozen=True)
class Cell:
    """One run: a script with overrides, and evaluations of what came out.

    Attributes:
        arm: what is compared.
        seed: of the run.
        script: in `experiments/`.
        overrides: of the script.
        probes: run after it.
        after: a run that other cells may share and that this one starts from, as `{after}` in its overrides. It is made
            when this one is run, and only then.
        home: that of the table that it belongs to; none: of the one that is being made.
    """

    arm: str
    seed: int
    script: str
    overrides: tuple[str, ...]
    probes: tuple[Probe, ...] = ()
    after: Cell | None = None
    home: Home | None = None

    @property
    def name(self) -> str:
        """Name of the cell and of its folder."""
        return f"{self.arm}_{self.seed}"

    @property
    def runs(self) -> list[Run]:
        """Those before it, its own, and its probes."""
        first = self.after.runs if self.after else []
        return [*first, (self.script, self.overrides), *(("evaluate.py", probe.overrides) for probe in self.probes)]

    @property
    def command(self) -> str:
        """What one would type for its runs."""
        return "; ".join(" ".join(["python", f"experiments/{script}", *overrides]) for script, overrides in self.runs)

    def identity(self, weights: str) -> dict[str, str]:
        """By what its result is recognised: see `IDENTITY`."""
        return dict(zip(IDENTITY, (self.command, fingerprint(self.runs), weights), strict=True))


def many_steps(model: str, frames: int = FRAMES) -> tuple[str, ...]:
    """Overrides for a model that sees the whole clip: 16 even steps, one chunk."""
    sigmas = "rollout.sigmas=[" + ",".join(f"{1 - i / 16:g}" for i in range(17)) + "]"
    longer = (f"rollout.frames={frames}",) if frames != FRAMES else ()
    return (sigmas, f"model.transformer={model}", *longer, f"rollout.chunk={frames}")


def evaluated(folder: Path) -> Row:
    """What a run left that measures models: `before`, `after`, `truth`, error by frame, extractor, speed, seconds."""
    path = folder / "evaluation.json"
    found = json.loads(path.read_text()) if path.is_file() else {"complete": False}
    if not found.get("complete", True):
        raise RuntimeError(f"{folder} was stopped before its end; start this again to go on")
    return {
        "before": found.get("before"),
        "after": found.get("after", found.get("policy")),
        "truth": found.get("truth"),
        "error_by_frame": found.get("error_by_frame"),
        "extractor": found.get("extractor"),
        "speed": found.get("speed"),
        "seconds": training_seconds(folder, found),
    }


def run_all(
    table: str, cells: Sequence[Cell], out: Path, weights: str, jobs: int, read: Callable[[Path], Row] = evaluated
) -> list[Row]:
    """Run what is missing, `jobs` cells at a time on one CPU thread each; results in the order of `cells`.

    Results are kept in `docs/results/<table>.jsonl` as they come; what stands there already is not run again. After a
    failure, or Ctrl-C, no further cell is begun, and the results of those that end are kept.

    Args:
        table: name of the file of results.
        cells: what to run.
        out: folder of the cells' folders.
        weights: hash of all weights that a cell may start from or be judged by.
        jobs: cells at a time.
        read: tells what a cell's folder holds when its run is done.
    """
    path, found = RESULTS / f"{table}.jsonl", recorded(table, cells, weights)

    def keep(name: str, row: Row) -> None:
        found[name] = row
        commands = {each["command"] for each in found.values()}  # under other settings than before, perhaps
        # Read again: another process may have added rows.
        rest = [other for other in rows_in(path) if other["weights"] == weights and other["command"] not in commands]
        write_rows(path, [*(found[cell.name] for cell in cells if cell.name in found), *rest])
        error = f": motion error {row['after']['motion_error_px']:.3f} px" if row.get("after") else " is done"
        print(f"{name}{error}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        missing = [cell for cell in cells if cell.name not in found]
        runs = {pool.submit(run, cell, out, 1, weights, read): cell.name for cell in missing}
        try:
            for done in as_completed(runs):
                keep(runs[done], done.result())
        except BaseException:
            print("no further cell is begun; those that run end first", flush=True)
            pool.shutdown(cancel_futures=True)
            for done, name in runs.items():
                if name not in found and not done.cancelled() and done.exception() is None:
                    keep(name, done.result())
            raise
    return [found[cell.name] for cell in cells]


def recorded(table: str, cells: Sequence[Cell], weights: str) -> dict[str, Row]:
    """What stands in `docs/results/<table>.jsonl` of some cells: cell's name -> result."""
    known = {tuple(row.get(key) for key in IDENTITY): row for row in rows_in(RESULTS / f"{table}.jsonl")}
    keys = {cell.name: tuple(cell.identity(weights).values()) for cell in cells}
    return {name: known[key] for name, key in keys.items() if key in known}


def rows_in(path: Path) -> list[Row]:
    """Results in a file of JSON lines; none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write results as JSON lines, the whole file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def publish(name: str, table: str) -> None:
    """Write `docs/results/<name>.md` and print it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text(table)
    print(table)


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def arguments(about: str, out: str, clips: int) -> argparse.ArgumentParser:
    """Command line that scripts of tables share: seeds, clips, jobs and the folder of the cells."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=clips, help="held-out clips")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one CPU thread each")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def plot_ranges(
    axes: Any, curves: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]], marker: str = ""
) -> None:
    """Plot one line per arm, the mean over seeds, with their range: arm -> (x, a curve per seed)."""
    for arm, (x, members) in curves.items():
        columns = list(zip(*members, strict=True))
        axes.plot(x, [statistics.mean(column) for column in columns], marker=marker, label=arm.replace("_", " "))
        axes.fill_between(x, [min(column) for column in columns], [max(column) for column in columns], alpha=0.15)
    axes.legend(frameon=False)


def figure(panels: int = 1, width: float = 7.5, height: float = 4.5, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure that needs no screen, and its axes: `panels` beside each other in each of `rows`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, panels, figsize=(width, height), layout="constrained", **options)


def arms_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by arm, in the order of the rows."""
    return {row["arm"]: [other for other in rows if other["arm"] == row["arm"]] for row in rows}


def weights_of(assets: Path) -> str:
    """Short hash of all weights that a cell may start from or be judged by."""
    digest = hashlib.sha256()
    for path in sorted(assets.rglob("*.safetensors")):
        digest.update(f"{path.relative_to(assets)} {sha256(path)}".encode())
    return digest.hexdigest()[:16]


def run(cell: Cell, out: Path, threads: int, weights: str, read: Callable[[Path], Row] = evaluated) -> dict[str, Any]:
    """Run a cell unless it is done; return its result.

    Raises:
        RuntimeError: the run failed (its log says why), or its folder holds another one.
    """
    folder = out / cell.name
    result, begun = folder / "result.json", folder / "begun.json"
    identity = cell.identity(weights)
    for note in (result, begun):
        there = json.loads(note.read_text()) if note.is_file() else identity
        if changed := [key for key in IDENTITY if there.get(key) != identity[key]]:
            raise RuntimeError(f"{note} is of another {' and '.join(changed)}; remove {folder}, or change --out")
    if result.is_file():
        return dict(json.loads(result.read_text()))
    overrides = _ready(cell, Home(out, weights), threads)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(begun, json.dumps(identity))
    _start(cell.script, overrides, folder, threads)
    probes = {}
    for probe in cell.probes:
        place = folder / probe.name
        if not (place / "evaluation.json").is_file():
            place.mkdir(exist_ok=True)
            _start("evaluate.py", tuple(text.format(folder=folder) for text in probe.overrides), place, threads)
        measured = evaluated(place)
        probes[probe.name] = {key: measured[key] for key in ("after", "error_by_frame", "speed")}
    row = {"arm": cell.arm, "seed": cell.seed, **read(folder), "probes": probes}
    row |= {"date": time.strftime("%Y-%m-%d"), "processor": processor(), **identity}
    replace_text(result, json.dumps(row))
    return row


def _ready(cell: Cell, home: Home, threads: int) -> tuple[str, ...]:
    """Make the run that a cell starts from; returns the cell's overrides with its folder in them."""
    if cell.after is None:
        return cell.overrides
    home = cell.after.home or home
    folder = home.out / cell.after.name
    with _ALONE[str(folder)]:  # cells that share it wait
        run(cell.after, home.out, threads, home.weights)
    return tuple(text.format(after=folder) for text in cell.overrides)


def _start(script: str, overrides: tuple[str, ...], folder: Path, threads: int) -> None:
    """Run a script to its end; its output goes to `log.txt`."""
    command = [sys.executable, str(EXPERIMENTS / script), f"run_dir={folder}", f"engine.threads={threads}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{folder.name} failed with exit code {done.returncode}; see {folder / 'log.txt'}")


def training_seconds(folder: Path, evaluation: dict[str, Any]) -> int | None:
    """Seconds of training alone, over all parts of an interrupted run; None where nothing was trained."""
    metrics = folder / "metrics.jsonl"
    if "seconds" in evaluation:
        return round(evaluation["seconds"])
    if not metrics.is_file():
        return None
    return round(sum(map(seconds_of, read_log(folder))))


def seconds_of(row: Row) -> float:
    """Seconds of a logged update, over all phases."""
    return float(sum(value for key, value in row.items() if key.startswith("seconds/")))


def spread(values: list[float], metric: str = "") -> str:
    """Mean and standard deviation over seeds, as text with the digits of a metric."""
    digits = DIGITS.get(metric, 3)
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def latency(measured: Sequence[Row]) -> str:
    """Seconds to the first frame, with `†` where the machine was busy; empty where it was not measured."""
    speeds = [each["speed"] for each in measured if each.get("speed")]
    return spread([speed["latency_s"] for speed in speeds]) + " †" * any(map(busy, speeds)) if speeds else ""


def busy(speed: Mapping[str, Any]) -> bool:
    """Whether a machine had more to do than cores when a speed was measured there, or did not say."""
    return bool(speed.get("load", math.inf) > speed.get("cores", 0))


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of two or more values (Student's t)."""
    half = t95(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return mean - half, mean + half


def mean_seconds(rows: Sequence[Row]) -> str:
    """Mean seconds of training of an arm, and their range, as text; empty where nothing was trained."""
    trained = [float(row["seconds"]) for row in rows if row["seconds"] is not None]
    if not trained:
        return ""
    spanned = f" ({min(trained):.0f} to {max(trained):.0f})" if len(trained) > 1 else ""
    return f"{statistics.mean(trained):.0f}{spanned}"
