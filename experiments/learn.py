"""The learning result of the README: `python experiments/learn.py` (`make learn`).

Cells, each a run of its own in `outputs/learn/<arm>_<seed>`: GRPO, the same updates with shuffled advantages, and
continued supervised training, for every seed; and, as they are, the student, the same before it was adapted to a weak
tracker's tracks ("exact"), and the many-step teacher. All are measured on the same held-out clips and noise, with the
last weights, by a tracker and a vision tower that took no part in the reward.
Interrupt it at will: a finished cell is not run again and an unfinished one goes on from its checkpoint. The result is
`docs/results/learn.jsonl` (one line per cell) and `docs/results/learn.md` (the table).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
# Steps of supervised training that take about as long as the default number of GRPO updates; the table gives seconds.
SUPERVISED_STEPS = 750
ARMS = ("student", "exact", "teacher", "grpo", "shuffled", "supervised")
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
            Cell("supervised", seed, "supervise.py", (*shared, f"seed={seed}", f"updates={SUPERVISED_STEPS}")),
        ]
    return sorted(found, key=lambda c: (ARMS.index(c.arm), c.seed))


def run(cell: Cell, out: Path, threads: int) -> dict[str, Any]:
    """Run a cell unless it is done; return its result.

    Raises:
        RuntimeError: the run failed; its log says why.
    """
    folder = out / cell.name
    result = folder / "result.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            str(HERE / cell.script),
            f"run_dir={folder}",
            f"engine.threads={threads}",
            *cell.overrides,
        ]
        began = time.time()
        with (folder / "log.txt").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if code != 0:
            raise RuntimeError(f"{cell.name} failed with exit code {code}; see {folder / 'log.txt'}")
        evaluation = json.loads((folder / "evaluation.json").read_text())
        row = {
            "arm": cell.arm,
            "seed": cell.seed,
            "before": evaluation.get("before"),
            "after": evaluation.get("after", evaluation.get("policy")),
            "truth": evaluation.get("truth"),
            "seconds": round(evaluation.get("seconds", time.time() - began)),
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["python", f"experiments/{cell.script}", *cell.overrides]),
        }
        result.write_text(json.dumps(row))
    return dict(json.loads(result.read_text()))


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, as text."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per arm, mean ± standard deviation over seeds, and the change against the student."""
    student = next(r for r in rows if r["arm"] == "student")["after"]
    lines = [
        "| | seeds | " + " | ".join(METRICS.values()) + " | motion error against the student | seconds |",
        "|---" * (len(METRICS) + 4) + "|",
    ]
    arms = {r["arm"]: [s for s in rows if s["arm"] == r["arm"]] for r in rows}
    for arm, members in arms.items():
        values = [spread([m["after"][key] for m in members]) for key in METRICS]
        changes = [100 * (m["after"]["motion_error_px"] / student["motion_error_px"] - 1) for m in members]
        each = ", ".join(f"{c:+.1f} %" for c in changes) if arm != "student" else ""
        seconds = spread([float(m["seconds"]) for m in members]).split(".")[0]
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
    todo = cells(options.seeds, options.updates, options.clips)
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = []
        for cell, row in zip(todo, pool.map(lambda c: run(c, options.out, 1), todo), strict=True):
            print(f"{cell.name}: motion error {row['after']['motion_error_px']:.3f} px, {row['seconds']} s", flush=True)
            rows.append(row)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "learn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (RESULTS / "learn.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
