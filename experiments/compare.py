"""Algorithms side by side: `python experiments/compare.py` (`make compare`).

Every algorithm from the same student, with the same number of generated frames and of optimizer steps, for every seed;
all are measured on the same held-out clips and noise, with the last weights, by a tracker and a vision tower that took
no part in the reward. Each rollout is used for two optimizer steps: at the first every ratio is 1, at the second
clipping and the normalisation of ratios may act.
The result is `docs/results/compare.jsonl` (one line per cell), `compare.md` (the table) and
`compare.png` (held-out motion error against updates), and a page per algorithm.
Interrupt it at will: it goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path

from experiments import result_pages
from runtime.cells import (
    RESULTS,
    ROOT,
    Cell,
    Probe,
    Row,
    arguments,
    arms_of,
    evaluated,
    figure,
    interval,
    markdown,
    mean_seconds,
    plot_ranges,
    publish,
    run_all,
    spread,
    weights_of,
)

ALGORITHMS = ("grpo", "ppo", "dpo", "nft", "guard")
STEPS = ("algorithm.epochs=1", "algorithm.minibatches=2")
ABOUT = """`python experiments/compare.py` (`make compare`): the embedded student, and {updates} updates of every
algorithm from it with the same number of generated frames and of optimizer steps, for every seed; {clips}
held-out clips, last weights, mean ± standard deviation over seeds; the interval is that of the mean change
(95 %, Student's t over seeds)."""
METRICS = {"motion_error_px": "motion error, px", "aesthetic": "aesthetic", "frechet": "Frechet"}


def cells(seeds: int, updates: int, clips: int, options: list[str]) -> list[Cell]:
    """The student as it is, and a run of every algorithm for every seed; `options` are overrides of all of them."""
    shared = (f"evaluation.clips={clips}", "logger=local", *options)
    found = [Cell("student", 0, "evaluate.py", shared)]
    for seed in range(seeds):
        for name in ALGORITHMS:
            rl = (f"algorithm={name}", f"updates={updates}", *STEPS, "evaluation.every=20", "saving.every=10")
            moved = Probe("kl", (*shared, f"checkpoint={{folder}}/checkpoints/step_{updates:06d}"))
            found.append(Cell(name, seed, "train.py", (*rl, *shared, f"seed={seed}", "resume=true"), (moved,)))
    return found


def with_curve(folder: Path) -> Row:
    """What a run was measured as, also on the way, and what it logged."""
    curve = json.loads((folder / "evaluation.json").read_text()).get("curve")
    return {**evaluated(folder), "curve": curve, "logged": result_pages.logged(folder) if curve else None}


def table(rows: list[Row]) -> str:
    """Markdown: a line per algorithm, mean ± standard deviation over seeds, and the change against the student."""
    student = next(row for row in rows if row["arm"] == "student")["after"]
    last = ["KL to the student, nats per latent value", "motion error against the student, 95 %", "seconds"]
    lines = []
    for arm, members in arms_of(rows).items():
        values = [spread([m["after"][key] for m in members]) for key in METRICS]
        moved = [m["probes"]["kl"]["after"]["kl_to_start"] for m in members if m["probes"]]
        values.append(spread(moved, "kl_to_start") if moved else "")
        change = [100 * (m["after"]["motion_error_px"] / student["motion_error_px"] - 1) for m in members]
        values.append("[{:+.1f}, {:+.1f}] %".format(*interval(change)) if len(change) > 1 else "")
        lines.append([arm, str(len(members)), *values, mean_seconds(members)])
    return markdown(["", "seeds", *METRICS.values(), *last], lines)


def draw(rows: list[Row], path: Path) -> None:
    """Plot held-out motion error over updates: mean over seeds, and its range."""
    found = {}
    for arm, members in arms_of(rows).items():
        curves = [member["curve"] for member in members if member["curve"]]
        if curves:
            errors = [[point["motion_error_px"] for point in curve] for curve in curves]
            found[arm] = ([point["update"] for point in curves[0]], errors)
    page, axes = figure()
    plot_ranges(axes, found, marker="o")
    axes.set(xlabel="updates, each of the same number of generated frames", ylabel="held-out motion error, px")
    page.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing; write table and figure."""
    parser = arguments(__doc__, "outputs/compare", clips=64)
    parser.add_argument("--updates", type=int, default=60, help="updates per run, of 2 optimizer steps")
    parser.add_argument("options", nargs="*", help="overrides of every run, such as schedule=all")
    options = parser.parse_args()
    todo = cells(options.seeds, options.updates, options.clips, options.options)
    rows = run_all("compare", todo, options.out, weights_of(ROOT / "assets" / "tiny"), options.jobs, with_curve)
    about = ABOUT.format(updates=options.updates, clips=options.clips)
    publish("compare", result_pages.page("Algorithms side by side", about, rows, table(rows), "compare.png"))
    draw(rows, RESULTS / "compare.png")
    for arm, members in arms_of(rows).items():
        if arm in ALGORITHMS:
            result_pages.write(arm, members, METRICS)


if __name__ == "__main__":
    main()
