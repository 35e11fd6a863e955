"""What a schedule of stochastic steps does to learning.

`python experiments/study.py schedules` measures a fixed policy under every schedule and two kernels: how much of a
gradient is signal by group size, spread of returns, excess noise, quality and cost of the rollouts. Each cell is a run
of `agreement.py` on the same clips; interrupt it at will.
`python experiments/study.py curves multirun/...` compares finished runs, such as the cells of a sweep: held-out motion
error against wall time and against generated frames. Each leaves one table and one figure in `docs/results/`:
`<name>.jsonl`, `<name>.md`, `<name>.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.result_pages import page
from runtime.cells import (
    RESULTS,
    ROOT,
    Cell,
    Row,
    figure,
    markdown,
    publish,
    run_all,
    seconds_of,
    weights_of,
    write_rows,
)
from runtime.identity import flatten
from runtime.runlog import read
from runtime.schema import TARGET

KERNELS = {"cps": ("transition=cps",), "flow_sde": ("transition=flow_sde", "transition.eta=0.7")}
SCHEDULES = {
    "single": ("schedule=single",),
    "single, per frame": ("schedule=single", "schedule.scope=per_frame"),
    "single, one pair": ("schedule=single", "schedule.scope=one_pair"),
    "first": ("schedule=first",),
    "window": ("schedule=window", "schedule.interval=1"),  # it slides at every rollout, so all positions count
    "all": ("schedule=all",),
}
PROMPTS, SAMPLES = 3, 64  # of a rollout, so groups of 4 to 32 are compared
KIND = "within"  # pairs of groups of one prompt: the policy gradient of that prompt against the noise of sampling
TITLE = "Schedules of stochastic steps"
ABOUT = """`python experiments/study.py schedules`: the embedded student under every schedule and two kernels (cps with
its default eta, flow_sde with eta 0.7), {rollouts} rollouts each, {prompts} prompts of {samples} samples in
all, the same for all. Signal: the share of the energy of a group's policy gradient that another group of the
same prompt agrees on, ± its standard error. Samples and seconds for the same signal are relative to the
kernel's first line, with a 95 % interval over resampled prompts."""
# Keys of a config in which runs of one sweep may differ without being different settings.
PLACES = ("run_dir", "resume", "checkpoint")


def cells(rollouts: int, options: list[str]) -> list[Cell]:
    """One run of `agreement.py` per schedule and kernel."""
    shared = (
        f"updates={rollouts}",
        f"rollout.prompts={PROMPTS}",
        f"rollout.group_size={SAMPLES}",
        "logger=local",
        "evaluation.clips=2",
    )
    found = []
    for kernel, noise in KERNELS.items():
        for name, how in SCHEDULES.items():
            arm = f"{kernel}_{name}".replace(", ", "_").replace(" ", "_")
            found.append(Cell(arm, 0, "agreement.py", (*shared, *how, *noise, *options)))
    return found


def measured(folder: Path) -> Row:
    """What `agreement.py` left, without its config."""
    found = json.loads((folder / "agreement.json").read_text())
    return {key: value for key, value in found.items() if key != "config"}


def need(shares: Any, size: str) -> Any:
    """Samples of a prompt for one unit of signal to noise: k groups have k share / (1 - share) of it, each of `size`.

    Infinite where there is no signal.
    """
    import numpy as np

    shares = np.asarray(shares, float)
    return np.where(shares > 0, int(size) * (1 - shares) / np.where(shares > 0, shares, 1.0), np.inf)


def times(row: Row, base: Row, size: str, cost: float = 1.0) -> str:
    """Samples that `row` needs over those that `base` needs for the same signal, times `cost`; 95 % interval over
    resampled prompts, the same for both.
    """
    import numpy as np

    def ratio(key: str) -> Any:
        return cost * need(row["signal"][size][KIND][key], size) / need(base["signal"][size][KIND][key], size)

    with np.errstate(invalid="ignore"):  # no signal in both: no ratio
        value, drawn = float(ratio("share")), ratio("replicates")
    low, high = np.nanpercentile(drawn, [2.5, 97.5], method="nearest")
    return f"{value:.2f} [{low:.2f}, {high:.2f}] x"


def seconds_of_a_sample(row: Row) -> float:
    """Seconds that a sample costs in rollout and update; decoding and scoring are the same for all schedules."""
    return float(sum(row["seconds_per_sample"].values()))


def schedule_table(rows: list[Row]) -> str:
    """Markdown: a line per kernel and schedule; what the same signal costs is relative to the kernel's first line."""
    sizes = list(rows[0]["signal"])
    middle = "8" if "8" in sizes else sizes[0]
    heads = ["", "excess noise", "std of returns", "motion error, px", "aesthetic", "ms per sample: rollout", "update"]
    heads += [f"signal, groups of {size}, 1/1000" for size in sizes]
    heads += [f"samples for the same signal, groups of {middle}", "seconds for the same signal"]
    lines = []
    for row in rows:
        base = next(each for each in rows if kernel_of(each) == kernel_of(row))
        metrics, seconds = row["metrics"], row["seconds_per_sample"]
        values = [
            ", ".join(f"{x:.3f}" for x in row["excess_noise"]),
            f"{metrics['return_std']:.3f}",
            *(f"{metrics[key]:.2f}" if key in metrics else "" for key in ("motion/error_px", "reward_terms/aesthetic")),
            *(f"{1000 * seconds[name]:.0f}" for name in ("rollout", "update")),
            *(share_of(row, size) for size in sizes),
            times(row, base, middle),
            times(row, base, middle, seconds_of_a_sample(row) / seconds_of_a_sample(base)),
        ]
        lines.append([row["arm"].replace("_", " "), *values])
    return markdown(heads, lines)


def share_of(row: Row, size: str) -> str:
    """Signal of a group's gradient and its standard error, in thousandths."""
    found = row["signal"][size][KIND]
    return f"{1000 * found['share']:.0f} ± {1000 * found['error']:.0f}"


def kernel_of(row: Row) -> str:
    """The kernel of a cell, by its name."""
    return next(kernel for kernel in KERNELS if row["arm"].startswith(f"{kernel}_"))


def draw_schedules(rows: list[Row], path: Path) -> None:
    """Plot signal against group size, one panel per kernel, with standard errors."""
    page, panels = figure(len(KERNELS), width=11, height=4.2, sharey=True)
    for axes, kernel in zip(panels, KERNELS, strict=True):
        for i, row in enumerate(row for row in rows if kernel_of(row) == kernel):
            sizes = [int(size) for size in row["signal"]]
            beside = [size * 1.02 ** (i - len(SCHEDULES) / 2) for size in sizes]  # error bars next to each other
            shares, errors = (
                [1000 * value[KIND][key] for value in row["signal"].values()] for key in ("share", "error")
            )
            name = row["arm"].removeprefix(kernel + "_").replace("_", " ")
            axes.errorbar(beside, shares, errors, marker="o", capsize=3, label=name)
        axes.set(xscale="log", xlabel="samples of a group", title=kernel)
        axes.minorticks_off()
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.axhline(0, color="0.7", linewidth=1)
    panels[0].set_ylabel("signal, 1/1000 of the energy of a group's gradient")
    panels[-1].legend(frameon=False, fontsize=8)
    page.savefig(path, dpi=120)


def runs_in(folder: Path) -> list[Path]:
    """The folder where it is a run, else the runs in it."""
    if (folder / "metrics.jsonl").is_file():
        return [folder]
    return sorted(found.parent for found in folder.glob("*/metrics.jsonl"))


def curve(folder: Path) -> Row:
    """A finished run: what it was measured as, by update, seconds of training and generated latent frames.

    Raises:
        FileNotFoundError: it is not a finished run of the loop.
    """
    if not (folder / "evaluation.json").is_file() or not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder} is not a finished run: no evaluation.json, or no metrics.jsonl")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    if "curve" not in evaluation:
        raise FileNotFoundError(f"{folder} is not a run of the loop: its evaluation.json has no curve")
    if not evaluation.get("complete", True):
        raise FileNotFoundError(f"{folder} was stopped or failed after update {evaluation['curve'][-1]['update']}")
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    spent, seconds = {0: 0.0}, 0.0
    for row in read(folder):
        seconds += seconds_of(row)
        spent[int(row["step"])] = seconds
    r = config["rollout"]
    frames = r["prompts"] * r["group_size"] * r["frames"]
    points = [
        {**each, "seconds": spent.get(int(each["update"]), seconds), "frames": frames * int(each["update"])}
        for each in evaluation["curve"]
    ]
    return {"folder": folder.name, "points": points, "config": config}


def named(rows: list[Row]) -> list[Row]:
    """Name runs after the settings in which they differ from each other; of another class the class alone."""
    flat = [{k: v for k, v in flatten(row["config"]).items() if k.split(".")[0] not in PLACES} for row in rows]
    keys = sorted({key for one in flat for key in one if any(other.get(key) != one[key] for other in flat)})
    classes = {key.removesuffix(TARGET) for key in keys if key.endswith(TARGET)}
    shown = [key for key in keys if key.endswith(TARGET) or not any(key.startswith(group) for group in classes)]
    found = []
    for row, one in zip(rows, flat, strict=True):
        parts = [f"{key.removesuffix('.' + TARGET)}={_last_word(key, one.get(key))}" for key in shown]
        found.append({**row, "arm": " ".join(parts) or row["folder"]})
    return found


def curve_table(rows: list[Row]) -> str:
    """Markdown: first and last measurement of every run, and what it took."""
    heads = ["", "motion error, px: before", "after", "best", "aesthetic", "Frechet", "seconds", "latent frames"]
    lines = []
    for row in rows:
        first, last = row["points"][0], row["points"][-1]
        best = min(point["motion_error_px"] for point in row["points"])
        values = [f"{x:.3f}" for x in (first["motion_error_px"], last["motion_error_px"], best, last["aesthetic"])]
        values += [f"{last['frechet']:.3f}", f"{last['seconds']:.0f}", str(last["frames"])]
        lines.append([row["arm"], *values])
    return markdown(heads, lines)


def draw_curves(rows: list[Row], path: Path) -> None:
    """Plot held-out motion error against wall time and against generated frames."""
    page, panels = figure(2, width=11, height=4.2, sharey=True)
    for axes, key, label in zip(panels, ("seconds", "frames"), ("seconds of training", "latent frames"), strict=True):
        for row in rows:
            errors = [point["motion_error_px"] for point in row["points"]]
            axes.plot([point[key] for point in row["points"]], errors, "o-", label=row["arm"])
        axes.set_xlabel(label)
    panels[0].set_ylabel("held-out motion error, px")
    panels[-1].legend(frameon=False, fontsize=8)
    page.savefig(path, dpi=120)


def _last_word(key: str, value: Any) -> str:
    return str(value).rpartition(".")[2] if key.endswith(TARGET) else str(value)


def main() -> None:
    """Parse the command line and make one study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    fixed = kinds.add_parser("schedules", help="a fixed policy under every schedule")
    fixed.add_argument("--rollouts", type=int, default=4, help=f"of {PROMPTS} prompts each")
    fixed.add_argument("--jobs", type=int, default=2, help="runs at a time, one CPU thread each")
    fixed.add_argument("--out", type=Path, default=Path("outputs/study"))
    fixed.add_argument("--name", default="study_schedules")
    fixed.add_argument("options", nargs="*", help="overrides, such as reward=motion")
    sweep = kinds.add_parser("curves", help="finished runs side by side")
    sweep.add_argument("--name", default="study_curves")
    sweep.add_argument("folders", nargs="+", type=Path, help="folders of runs, or of sweeps")
    options = parser.parse_args()
    path = RESULTS / f"{options.name}.png"
    if options.kind == "schedules":
        weights = weights_of(ROOT / "assets" / "tiny")
        todo = cells(options.rollouts, options.options)
        rows = run_all(options.name, todo, options.out, weights, options.jobs, measured)
        about = ABOUT.format(rollouts=options.rollouts, prompts=options.rollouts * PROMPTS, samples=SAMPLES)
        publish(options.name, page(TITLE, about, rows, schedule_table(rows), path.name))
        draw_schedules(rows, path)
        return
    folders = [run for folder in options.folders for run in runs_in(folder)]
    found = []
    for folder in folders:
        try:
            found.append(curve(folder))
        except FileNotFoundError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        sys.exit(f"error: no finished runs in {', '.join(map(str, options.folders))}")
    rows = named(found)
    write_rows(RESULTS / f"{options.name}.jsonl", [{k: v for k, v in row.items() if k != "config"} for row in rows])
    publish(options.name, f"# Runs side by side\n\n{curve_table(rows)}\n![held-out motion error]({path.name})\n")
    draw_curves(rows, path)


if __name__ == "__main__":
    main()
