"""Tables of many runs: each cell is a run of its own, in a folder of its own, and is run once.

A finished cell is not run again as long as its command and the weights it starts from are the same: its result stands
in `docs/results/<table>.jsonl`, which is committed. An unfinished one goes on from what it left in its folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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
from runtime.hardware import processor
from runtime.runlog import read as read_log
from runtime.verdict import t95

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS, RESULTS = ROOT / "experiments", ROOT / "docs" / "results"
# Latent frames of a clip in training.
FRAMES = 9
Row = dict[str, Any]
# Held while a run that cells share is made, by its name.
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
class Cell:
    """One run: a script with overrides, and evaluations of what came out.

    Attributes:
        arm: what is compared.
        seed: of the run.
        script: in `experiments/`.
        overrides: of the script.
        probes: run after it.
        after: a run that other cells may share and that this one starts from, as `{after}` in its overrides.
    """

    arm: str
    seed: int
    script: str
    overrides: tuple[str, ...]
    probes: tuple[Probe, ...] = ()
    after: Cell | None = None

    @property
    def name(self) -> str:
        """Name of the cell and of its folder."""
        return f"{self.arm}_{self.seed}"

    @property
    def command(self) -> str:
        """What one would type for the run before it, for it, and for its probes."""
        first = [self.after.command] if self.after else []
        runs = [(self.script, self.overrides), *(("evaluate.py", probe.overrides) for probe in self.probes)]
        typed = (" ".join(["python", f"experiments/{script}", *overrides]) for script, overrides in runs)
        return "; ".join([*first, *typed])


def many_steps(model: str, frames: int = FRAMES) -> tuple[str, ...]:
    """Overrides for a model that sees the whole clip: 16 even steps, one chunk."""
    sigmas = "rollout.sigmas=[" + ",".join(f"{1 - i / 16:g}" for i in range(17)) + "]"
    longer = (f"rollout.frames={frames}",) if frames != FRAMES else ()
    return (sigmas, f"model.transformer={model}", *longer, f"rollout.chunk={frames}")


def evaluated(folder: Path) -> Row:
    """What a run left that measures models: `before`, `after`, `truth`, error by frame, extractor, seconds."""
    found = json.loads((folder / "evaluation.json").read_text())
    return {
        "before": found.get("before"),
        "after": found.get("after", found.get("policy")),
        "truth": found.get("truth"),
        "error_by_frame": found.get("error_by_frame"),
        "extractor": found.get("extractor"),
        "seconds": training_seconds(folder, found),
    }


def run_all(
    table: str, cells: Sequence[Cell], out: Path, weights: str, jobs: int, read: Callable[[Path], Row] = evaluated
) -> list[Row]:
    """Run what is missing, `jobs` cells at a time on one CPU thread each; results in the order of `cells`.

    Results are kept in `docs/results/<table>.jsonl` as they come; what stands there already is not run again.

    Args:
        table: name of the file of results.
        cells: what to run.
        out: folder of the cells' folders.
        weights: hash of all weights that a cell may start from or be judged by.
        jobs: cells at a time.
        read: tells what a cell's folder holds when its run is done.
    """
    path = RESULTS / f"{table}.jsonl"
    known = {(row["command"], row["weights"]): row for row in rows_in(path)}
    found = {cell.name: known[key] for cell in cells if (key := (cell.command, weights)) in known}
    others = [row for row in known.values() if row["weights"] == weights and row not in found.values()]

    def keep(name: str, row: Row) -> None:
        found[name] = row
        write_rows(path, [*(found[cell.name] for cell in cells if cell.name in found), *others])
        error = f": motion error {row['after']['motion_error_px']:.3f} px" if row.get("after") else " is done"
        print(f"{name}{error}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        missing = [cell for cell in cells if cell.name not in found]
        runs = {pool.submit(run, cell, out, 1, weights, read): cell.name for cell in missing}
        for done in as_completed(runs):
            keep(runs[done], done.result())
    return [found[cell.name] for cell in cells]


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


def figure(panels: int = 1, width: float = 7.5, height: float = 4.5, **options: Any) -> tuple[Any, Any]:
    """A figure that needs no screen, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, panels, figsize=(width, height), layout="constrained", **options)


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
    identity = {"command": cell.command, "weights": weights}
    if result.is_file():
        row = dict(json.loads(result.read_text()))
        if {key: row.get(key) for key in identity} != identity:
            raise RuntimeError(f"{folder} holds the result of another command or of other weights; remove it, or --out")
        return row
    if begun.is_file() and json.loads(begun.read_text()) != identity:
        raise RuntimeError(f"{folder} holds the start of another command or of other weights; remove it, or --out")
    overrides = cell.overrides
    if cell.after:
        with _ALONE[cell.after.name]:  # cells that share it wait
            run(cell.after, out, threads, weights, read)
        overrides = tuple(text.format(after=out / cell.after.name) for text in overrides)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(begun, json.dumps(identity))
    _start(cell.script, overrides, folder, threads)
    probes = {}
    for probe in cell.probes:
        place = folder / probe.name
        if not (place / "evaluation.json").is_file():
            place.mkdir(exist_ok=True)
            _start("evaluate.py", tuple(text.format(folder=folder) for text in probe.overrides), place, threads)
        found = json.loads((place / "evaluation.json").read_text())
        probes[probe.name] = {"after": found["policy"], "error_by_frame": found["error_by_frame"]}
    row = {"arm": cell.arm, "seed": cell.seed, **read(folder), "probes": probes}
    row |= {"date": time.strftime("%Y-%m-%d"), "processor": processor(), **identity}
    replace_text(result, json.dumps(row))
    return row


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


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, as text."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of two or more values (Student's t)."""
    half = t95(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return mean - half, mean + half


def mean_seconds(rows: Sequence[Row]) -> str:
    """Mean seconds of training of an arm, as text; empty where nothing was trained."""
    trained = [float(row["seconds"]) for row in rows if row["seconds"] is not None]
    return f"{statistics.mean(trained):.0f}" if trained else ""
