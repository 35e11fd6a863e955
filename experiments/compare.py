"""Algorithms side by side: `python experiments/compare.py` (`make compare`).

Every algorithm with its defaults, from the same student, with the same number of generated frames, for every seed; all
are measured on the same held-out clips and noise, with the last weights, by a tracker and a vision tower that took no
part in the reward. The result is `docs/results/compare.jsonl` (one line per cell), `compare.md` (the table) and
`compare.png` (held-out motion error against generated frames). Interrupt it at will: it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from runtime.cells import (
    RESULTS,
    ROOT,
    Cell,
    Probe,
    Row,
    arms_of,
    evaluated,
    interval,
    mean_seconds,
    publish,
    run_all,
    spread,
    weights_of,
)

ALGORITHMS = ("grpo", "ppo", "dpo", "nft", "guard")
METRICS = {"motion_error_px": "motion error, px", "aesthetic": "aesthetic", "frechet": "Frechet"}


def cells(seeds: int, updates: int, clips: int, options: list[str]) -> list[Cell]:
    """The student as it is, and a run of every algorithm for every seed."""
    shared = (f"evaluation.clips={clips}", "logger=local")
    found = [Cell("student", 0, "evaluate.py", shared)]
    for name in ALGORITHMS:
        for seed in range(seeds):
            rl = (f"algorithm={name}", f"updates={updates}", "evaluation.every=30", "saving.every=10")
            moved = Probe("kl", (*shared, f"checkpoint={{folder}}/checkpoints/step_{updates:06d}"))
            overrides = (*shared, *rl, *options, f"seed={seed}", "resume=true")
            found.append(Cell(name, seed, "train.py", overrides, (moved,)))
    return found


def with_curve(folder: Path) -> Row:
    """What a run was measured as, also on the way."""
    return {**evaluated(folder), "curve": json.loads((folder / "evaluation.json").read_text()).get("curve")}


def table(rows: list[Row]) -> str:
    """Markdown: a line per algorithm, mean ± standard deviation over seeds, and the change against the student."""
    student = next(row for row in rows if row["arm"] == "student")["after"]
    heads = [*METRICS.values(), "KL to the student, nats per latent value", "motion error against the student, 95 %"]
    lines = ["| | seeds | " + " | ".join(heads) + " | seconds |", "|---" * (len(heads) + 3) + "|"]
    for arm, members in arms_of(rows).items():
        values = [spread([m["after"][key] for m in members]) for key in METRICS]
        moved = [m["probes"]["kl"]["after"]["kl_to_start"] for m in members if m["probes"]]
        values.append(f"{statistics.mean(moved):.4f}" if moved else "")
        change = [100 * (m["after"]["motion_error_px"] / student["motion_error_px"] - 1) for m in members]
        values.append("[{:+.1f}, {:+.1f}] %".format(*interval(change)) if len(change) > 1 else "")
        lines.append(f"| {arm} | {len(members)} | {' | '.join(values)} | {mean_seconds(members)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Plot held-out motion error over updates: mean over seeds, and its range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for arm, members in arms_of(rows).items():
        curves = [member["curve"] for member in members if member["curve"]]
        if not curves:
            continue
        updates = [point["update"] for point in curves[0]]
        columns = list(zip(*([point["motion_error_px"] for point in curve] for curve in curves), strict=True))
        axes.plot(updates, [statistics.mean(column) for column in columns], marker="o", label=arm)
        axes.fill_between(updates, *map(list, zip(*((min(c), max(c)) for c in columns), strict=True)), alpha=0.12)
    axes.set(xlabel="updates, each of the same number of generated frames", ylabel="held-out motion error, px")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run what is missing; write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=120, help="updates per run")
    parser.add_argument("--clips", type=int, default=64, help="held-out clips")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one CPU thread each")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    parser.add_argument("options", nargs="*", help="overrides of every run, such as schedule=all")
    options = parser.parse_args()
    todo = cells(options.seeds, options.updates, options.clips, options.options)
    rows = run_all(todo, options.out, weights_of(ROOT / "assets" / "tiny"), options.jobs, with_curve)
    publish("compare", rows, table(rows))
    draw(rows, RESULTS / "compare.png")


if __name__ == "__main__":
    main()
