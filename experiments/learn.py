"""The learning result of the README: `python experiments/learn.py` (`make learn`).

Cells, each a run of its own in `outputs/learn/<arm>_<seed>`: GRPO, the same updates with shuffled advantages, and
continued supervised training, for every seed; and, as they are, the student, the same before it was adapted to a weak
tracker's tracks ("exact"), and the many-step teacher. All are measured on the same held-out clips and noise, with the
last weights, by a tracker and a vision tower that took no part in the reward.
Interrupt it at will: a finished cell is not run again as long as its command and the weights it starts from are the
same, and an unfinished one goes on from its last checkpoint. The result is `docs/results/learn.jsonl` (one line per
cell) and `docs/results/learn.md` (the table).
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.checkpoint import sha256

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
# Steps of supervised training that take about as long as the default number of GRPO updates; the table gives seconds.
SUPERVISED_STEPS = 750
ARMS = ("student", "exact", "teacher", "grpo", "shuffled", "supervised")
# Two-sided 95 % quantile of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
TEACHER_SIGMAS = [1 - i / 16 for i in range(17)]
METRICS = {
    "motion_error_px": "motion error, px",
    "aesthetic": "aesthetic",
    "frechet": "Frechet",
    "frechet_video": "Frechet, video",
}


@dataclass(frozen=True)
class Cell:
    """One run: a script with overrides."""

    arm: str
    seed: int
    script: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the cell and of its folder."""
        return f"{self.arm}_{self.seed}"

    @property
    def command(self) -> str:
        """What one would type for it."""
        return " ".join(["python", f"experiments/{self.script}", *self.overrides])


def cells(seeds: int, updates: int, clips: int) -> list[Cell]:
    """All cells of the table."""
    shared = (f"evaluation.clips={clips}", "evaluation.every=0", "logger=local")
    rl = (*shared, f"updates={updates}", "saving.every=10", "resume=true")
    found = [
        Cell("student", 0, "evaluate.py", shared),
        Cell("exact", 0, "evaluate.py", (*shared, "model.transformer=few_step")),
    ]
    sigmas = ",".join(f"{s:g}" for s in TEACHER_SIGMAS)
    found.append(
        Cell("teacher", 0, "evaluate.py", (*shared, "model.transformer=teacher", f"rollout.sigmas=[{sigmas}]"))
    )
    for seed in range(seeds):
        found += [
            Cell("grpo", seed, "grpo.py", (*rl, f"seed={seed}")),
            Cell("shuffled", seed, "grpo.py", (*rl, f"seed={seed}", "algorithm.shuffle_advantages=true")),
            Cell(
                "supervised",
                seed,
                "supervise.py",
                (*shared, f"seed={seed}", f"updates={SUPERVISED_STEPS}", "resume=true"),
            ),
        ]
    return sorted(found, key=lambda c: (ARMS.index(c.arm), c.seed))


def weights_of(assets: Path) -> str:
    """Short hash of all weights that a cell may start from or be judged by."""
    digest = hashlib.sha256()
    for path in sorted(assets.rglob("*.safetensors")):
        digest.update(f"{path.relative_to(assets)} {sha256(path)}".encode())
    return digest.hexdigest()[:16]


def run(cell: Cell, out: Path, threads: int, weights: str) -> dict[str, Any]:
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
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(identity))
    command = [sys.executable, str(HERE / cell.script), f"run_dir={folder}", f"engine.threads={threads}"]
    with (folder / "log.txt").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([*command, *cell.overrides], stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{cell.name} failed with exit code {done.returncode}; see {folder / 'log.txt'}")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    row = {
        "arm": cell.arm,
        "seed": cell.seed,
        "before": evaluation.get("before"),
        "after": evaluation.get("after", evaluation.get("policy")),
        "truth": evaluation.get("truth"),
        "seconds": training_seconds(folder, evaluation),
        "date": time.strftime("%Y-%m-%d"),
        **identity,
    }
    result.write_text(json.dumps(row))
    return row


def training_seconds(folder: Path, evaluation: dict[str, Any]) -> int | None:
    """Seconds of training alone, over all parts of an interrupted run; None where nothing was trained."""
    metrics = folder / "metrics.jsonl"
    if "seconds" in evaluation:
        return round(evaluation["seconds"])
    if not metrics.is_file():
        return None
    rows = map(json.loads, metrics.read_text().splitlines())
    return round(sum(value for row in rows for key, value in row.items() if key.startswith("seconds/")))


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, as text."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def change(members: list[dict[str, Any]], student: dict[str, float]) -> str:
    """Change of the motion error against the student for every seed, and the 95 % interval of its mean over seeds."""
    found = [100 * (m["after"]["motion_error_px"] / student["motion_error_px"] - 1) for m in members]
    text = ", ".join(f"{c:+.1f} %" for c in found)
    if len(found) < 2:
        return text
    half = T95.get(len(found) - 1, 1.96) * statistics.stdev(found) / math.sqrt(len(found))
    mean = statistics.mean(found)
    return f"{text}; mean in [{mean - half:+.1f}, {mean + half:+.1f}] %"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per arm, mean ± standard deviation over seeds, and the change against the student."""
    student = next(r for r in rows if r["arm"] == "student")["after"]
    lines = [
        "| | seeds | " + " | ".join(METRICS.values()) + " | motion error against the student | seconds of training |",
        "|---" * (len(METRICS) + 4) + "|",
    ]
    arms = {r["arm"]: [s for s in rows if s["arm"] == r["arm"]] for r in rows}
    for arm, members in arms.items():
        values = [spread([m["after"][key] for m in members]) for key in METRICS]
        each = change(members, student) if arm != "student" else ""
        trained = [float(m["seconds"]) for m in members if m["seconds"] is not None]
        seconds = f"{statistics.mean(trained):.0f}" if trained else ""
        lines.append(f"| {arm} | {len(members)} | {' | '.join(values)} | {each} | {seconds} |")
    truth = next(r for r in rows if r["truth"])["truth"]
    lines.append("| true clips | | " + " | ".join(f"{truth[key]:.3f}" for key in METRICS) + " | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=120, help="GRPO updates per run")
    parser.add_argument("--clips", type=int, default=128, help="held-out clips")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one CPU thread each")
    parser.add_argument("--out", type=Path, default=Path("outputs/learn"))
    options = parser.parse_args()
    todo, weights = cells(options.seeds, options.updates, options.clips), weights_of(HERE.parent / "assets" / "tiny")
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = []
        for cell, row in zip(todo, pool.map(lambda c: run(c, options.out, 1, weights), todo), strict=True):
            print(f"{cell.name}: motion error {row['after']['motion_error_px']:.3f} px", flush=True)
            rows.append(row)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "learn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (RESULTS / "learn.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
