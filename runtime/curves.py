"""Curves of a run as one PNG: small multiples over updates, drawn from `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import runlog

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
Panel = tuple[str, Callable[["Axes"], None]]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
BLUE, ORANGE = "#0072B2", "#D55E00"
PHASE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
REST_COLOUR = "#BBBBBB"
COLUMNS = 3
TERMS = ("reward/", "reward_terms/")
SECONDS = "seconds/"
SMOOTHED_FROM = 20  # a series of fewer updates is shown as it is

STAGES = ("teacher_forcing", "own_history", "ode", "consistency", "dmd")  # of distillation: <stage>/<key>
LINES = {  # key: title; what is drawn after the rewards and the motion error
    "loss": "Loss",
    "dmd": "Distribution matching",
    "adversarial": "Generator against the discriminator",
    "critic_loss": "Loss of the critics",
    "flow_matching": "Fake score: flow matching",
    "discriminator": "Discriminator",
    "discriminator_accuracy": "Discriminator: share it tells apart",
    "preference_accuracy": "Pairs in the right order (share)",
    "group_std": "Reward spread inside a group (std)",
    "signs/edges": "Edges: mean slope of brightness",
    "signs/motion": "Motion: mean change from frame to frame",
    "signs/diversity": "Diversity: pixel std inside a group",
    "kl": "KL to the reference policy (nats per latent value)",
    "clip_fraction": "Clipped ratios (fraction of steps)",
    "ratio_deviation": "Largest |ratio - 1|",
    "log_prob_gap": "|log-prob acting - re-scored| (must stay below 1e-5)",
    "grad_norm": "Gradient norm (before clipping)",
    "critic_grad_norm": "Gradient norm of the critics",
}


def plot(metrics_path: Path, out_png: Path) -> Path:
    """Draw what a run's `metrics.jsonl` holds and write it as PNG; what it does not hold is left out.

    Panels: motion error in pixels in training and at evaluations, reward and each of its terms, spread inside
    a group, losses of supervised training, KL, clip fraction, ratio deviation, agreement of log-probs, gradient norm,
    seconds by phase (stacked). Values that are not finite are gaps. The x axis is the update (`update`, else `step`).

    Returns:
        `out_png`.

    Raises:
        FileNotFoundError: there is no such metrics file.
        ValueError: the file holds none of these metrics.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if metrics_path.name != runlog.FILE or not metrics_path.is_file():
        raise FileNotFoundError(f"no {runlog.FILE} at {metrics_path}; a run writes it after its first update")
    rows = runlog.read(metrics_path.parent)
    panels = _panels(rows)
    if not panels:
        raise ValueError(f"{metrics_path} holds no metrics to draw; let the run finish an update first")
    height = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4.4 * COLUMNS, 2.8 * height), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, paint) in enumerate(panels):
        axes = figure.add_subplot(height, COLUMNS, i + 1)
        paint(axes)
        _dress(axes, title)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=110)
    return out_png


def series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Return updates and values of one metric, where it was logged; a value that is not finite is NaN."""
    found = [(row.get("update", row.get("step", i)), row[key]) for i, row in enumerate(rows) if key in row]
    # Logs write numbers that JSON does not have as text.
    values = [float(value) if math.isfinite(float(value)) else math.nan for _, value in found]
    return [float(update) for update, _ in found], values


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential mean of the finite values with weight 1 / span for the newest, unbiased at the start.

    A value that is not finite keeps the mean (NaN before the first finite one).
    """
    out: list[float] = []
    total = weight = 0.0
    for value in values:
        if math.isfinite(value):
            total = (1 - 1 / span) * total + value / span
            weight = (1 - 1 / span) * weight + 1 / span
        out.append(total / weight if weight else math.nan)
    return out


def _panels(rows: Rows) -> list[Panel]:
    """Titles and painters of what the rows hold, in the order of reading."""
    keys = dict.fromkeys(key for row in rows for key in row)
    panels: list[Panel] = []

    def line(key: str, title: str, evaluated: str | None = None) -> None:
        present = [k for k in (key, evaluated) if k in keys]
        if present:
            panels.append((title, partial(_curve, rows=rows, key=key, evaluated=evaluated)))

    line("motion/error_px", "Motion error (px, lower is better)", "eval/motion_error_px")
    line("reward", "Reward (weighted sum)")
    for key in keys:
        for prefix in TERMS:
            if key.startswith(prefix):
                line(key, f"Reward term: {key.removeprefix(prefix)} (unweighted)")
    for stage in ("", *STAGES):
        for key, title in LINES.items():
            line(f"{stage}/{key}" if stage else key, f"{stage}: {title}" if stage else title)
    phases = [key for key in keys if key.startswith(SECONDS)]
    if phases:
        panels.append(("Seconds per update, by phase", partial(_stack, rows=rows, phases=phases)))
    return panels


def _curve(axes: Axes, rows: Rows, key: str, evaluated: str | None) -> None:
    """A thin raw line and a bold smoothed one; evaluations as connected points."""
    x, y = series(rows, key)
    if len(x) >= SMOOTHED_FROM:
        axes.plot(x, y, color=BLUE, alpha=0.3, linewidth=0.9)
        axes.plot(x, smoothed(y, span=len(x) / 12), color=BLUE, linewidth=2, label="training (smoothed)")
    elif x:
        axes.plot(x, y, color=BLUE, linewidth=1.5, marker=".", label="training")
    points = series(rows, evaluated) if evaluated else ([], [])
    if points[0]:
        axes.plot(*points, color=ORANGE, linewidth=1.2, marker="o", markersize=6, label="evaluation")
        axes.legend(fontsize=8, frameon=False)


def _stack(axes: Axes, rows: Rows, phases: Sequence[str]) -> None:
    """Seconds by phase as a stacked area, `rest` on top and grey."""
    ordered = sorted(phases, key=lambda key: key == f"{SECONDS}rest")
    timed = [row for row in rows if any(key in row for key in ordered)]
    x = [float(row.get("update", row.get("step", i))) for i, row in enumerate(timed)]
    heights = [[float(row.get(key, 0)) for row in timed] for key in ordered]
    names = [key.removeprefix(SECONDS) for key in ordered]
    colours = [REST_COLOUR if name == "rest" else PHASE_COLOURS[i % len(PHASE_COLOURS)] for i, name in enumerate(names)]
    if len(x) == 1:  # an area needs two points
        x, heights = [x[0] - 0.5, x[0] + 0.5], [h * 2 for h in heights]
    axes.stackplot(x, heights, labels=names, colors=colours)
    top = max(map(sum, zip(*heights, strict=True)))
    axes.set_ylim(0, 1.45 * top if top > 0 else 1)  # room for the legend
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", reverse=True)


def _dress(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=9.5, loc="left", fontweight="bold")
    axes.set_xlabel("update", fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useOffset=False)
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
