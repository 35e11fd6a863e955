"""A page of results per algorithm, from the cells of `compare.py`: `docs/results/<algorithm>.md` and `.png`.

Command, seeds, hardware, table with spread, curve, and the meaning of everything that its runs logged.
"""

from __future__ import annotations

import math
import re
from fnmatch import fnmatch
from pathlib import Path

from runtime.cells import RESULTS, ROOT, Row, figure, markdown, mean_seconds, plot_ranges, spread
from runtime.runlog import read

# Updates at the start and at the end of a run over which a logged number is averaged.
AVERAGED = 10


def page(title: str, about: str, rows: list[Row], table: str, figure: str) -> str:
    """Markdown: a table with what it shows, the hardware and days of its cells, and its figure.

    Args:
        title: heading.
        about: what was measured, and the command.
        rows: the cells.
        table: Markdown.
        figure: file name of the figure, beside the page.
    """
    hardware, days = made(rows)
    where = f"One core of {hardware} for each run; {days}. Seconds pass on the wall, whatever else the machine does."
    return f"# {title}\n\n{about} {where}\n\n{table}\n![{title}]({figure})\n"


def made(rows: list[Row]) -> tuple[str, str]:
    """Processors and days of cells, as text."""
    return tuple(" and ".join(sorted({row[key] for row in rows})) for key in ("processor", "date"))  # type: ignore


def logged(folder: Path) -> dict[str, list[float]]:
    """Means of every number that a run logged, over its first and over its last updates."""
    rows = [row for row in read(folder) if "seconds/rest" in row]
    ends = (rows[:AVERAGED], rows[-AVERAGED:])
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {name: [mean([row[name] for row in part if name in row]) for part in ends] for name in names}


def mean(values: list[float]) -> float:
    """Mean of what was measured; not a number where nothing was."""
    return sum(values) / len(values) if values else math.nan


def meanings() -> dict[str, str]:
    """What docs/algorithms.md says of each logged name; `<...>` in a name stands for any text."""
    text = (ROOT / "docs" / "algorithms.md").read_text().partition("## What is logged")[2].partition("\n## ")[0]
    lines = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("| `")]
    return {re.sub("<.*?>", "*", name): cells[2].strip() for cells in lines for name in re.findall("`(.*?)`", cells[1])}


def meaning(name: str, known: dict[str, str]) -> str:
    """What a logged name means.

    Raises:
        KeyError: docs/algorithms.md does not say it.
    """
    found = next((text for pattern, text in known.items() if fnmatch(name, pattern)), None)
    if found is None:
        raise KeyError(f"docs/algorithms.md, What is logged, does not explain {name}")
    return found


def write(algorithm: str, members: list[Row], metrics: dict[str, str]) -> None:
    """Write page and figure of one algorithm.

    Args:
        algorithm: its name.
        members: its cells, one per seed.
        metrics: what was measured on held-out clips, and its heading.
    """
    about = (ROOT / "conf" / "algorithm" / f"{algorithm}.yaml").read_text().splitlines()[0].removeprefix("# ")
    first, hardware, days = members[0], *made(members)
    text = f"""# {algorithm}

{about} Loss and settings: [docs/algorithms.md](../algorithms.md).
Made by `make compare`; all algorithms side by side: [compare.md](compare.md).

Hardware: one core of {hardware}; {days}. Seconds pass on the wall, whatever else the machine does.
Command of seed {first["seed"]}, then its measurement of the KL:

```bash
{first["command"].replace("; ", chr(10))}
```

Held-out clips, before → after; the tracker and the vision tower that measure took no part in the reward.

{measured(members, metrics)}
![motion error on held-out clips against updates]({algorithm}.png)

What the runs logged, mean over seeds and over the first and the last {AVERAGED} updates:

{explained(members)}"""
    (RESULTS / f"{algorithm}.md").write_text(text)
    draw(members, RESULTS / f"{algorithm}.png")


def measured(members: list[Row], metrics: dict[str, str]) -> str:
    """Markdown: a line per seed, before and after on held-out clips, and one with mean and spread."""
    lines = []
    for row in members:
        pairs = [f"{row['before'][key]:.3f} → {row['after'][key]:.3f}" for key in metrics]
        lines.append([str(row["seed"]), *pairs, f"{_moved(row):.4f}", str(row["seconds"])])
    means = [spread([row["after"][key] for row in members]) for key in metrics]
    moved = sum(map(_moved, members)) / len(members)
    lines.append(["mean ± standard deviation, after", *means, f"{moved:.4f}", mean_seconds(members)])
    heads = ["seed", *metrics.values(), "KL to the student, nats per latent value", "seconds of training"]
    return markdown(heads, lines)


def explained(members: list[Row]) -> str:
    """Markdown: what all runs logged, mean over seeds at the start and at the end, and what it means."""
    known, lines = meanings(), []
    for name in dict.fromkeys(name for row in members for name in row["logged"]):
        having = [row["logged"][name] for row in members if name in row["logged"]]
        ends = [mean([pair[k] for pair in having if not math.isnan(pair[k])]) for k in (0, 1)]
        seeds = f" ({len(having)} of {len(members)} seeds)" if len(having) < len(members) else ""
        lines.append([f"`{name}`{seeds}", *(f"{value:.4g}" for value in ends), meaning(name, known)])
    return markdown(["name", "first", "last", "meaning"], lines)


def _moved(row: Row) -> float:
    return float(row["probes"]["kl"]["after"]["kl_to_start"])


def draw(members: list[Row], path: Path) -> None:
    """Plot held-out motion error and looks over updates, one line per seed."""
    page, panels = figure(2, width=10, height=3.8)
    for axes, key, label in zip(
        panels, ("motion_error_px", "aesthetic"), ("motion error, px", "aesthetic"), strict=True
    ):
        updates = [point["update"] for point in members[0]["curve"]]
        curves = {f"seed {m['seed']}": (updates, [[point[key] for point in m["curve"]]]) for m in members}
        plot_ranges(axes, curves, marker="o")
        axes.set(xlabel="updates", ylabel=f"held-out {label}")
    page.savefig(path, dpi=110)
