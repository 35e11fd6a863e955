"""Evaluations of the same clips beside each other: a table (Markdown, CSV) and a page with their videos."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime import verdict
from runtime.cells import BUSY, busy, markdown
from runtime.identity import differences, flatten

METRICS = {  # key: heading, digits
    "motion_error_px": ("motion error (ObjMC), px", 3),
    "epe_px": ("EPE where seen, px", 3),
    "motion_visible": ("seen", 3),
    "motion_consistency": ("motion consistency", 3),
    "smoothness": ("smoothness", 4),
    "aesthetic": ("aesthetic", 3),
    "frechet": ("Frechet", 3),
    "frechet_video": ("Frechet, video", 3),
}
SPEED = {"latency_s": ("first frame, s", 3), "frames_per_s": ("frames per s", 1)}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Side by side</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2330; margin: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 2rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #dfe3ea; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .clips th { text-align: left; }
video { width: 300px; height: auto; } .soft { color: #5b6575; }
</style></head><body>
<h1>Side by side</h1>
<p class="soft">{{ about }}</p>
<table><tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for line in lines %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<table class="clips"><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in videos %}<tr>{% for data in row %}<td>{% if data %}<video autoplay loop muted playsinline
 src="data:video/mp4;base64,{{ data }}"></video>{% endif %}</td>{% endfor %}</tr>{% endfor %}</table>
</body></html>
"""


def read(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What `evaluate.py` left in each folder, by the folder's name (its path where names repeat).

    Raises:
        FileNotFoundError: a folder holds no evaluation.
        ValueError: they are not of the same clips and length, tracker, scorer, extractor and interpolator.
    """
    names = [folder.name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    found = {}
    for name, folder in zip(names, folders, strict=True):
        path = folder / "evaluation.json"
        if not path.is_file():
            raise FileNotFoundError(f"no evaluation in {folder}; make one: experiments/evaluate.py run_dir={folder}")
        found[name] = {"interpolator": "linear"} | json.loads(path.read_text())  # older evaluations do not name it
        if "by_clip" not in found[name]:
            raise ValueError(f"{path} was not made by experiments/evaluate.py, or by an older version")
    first = found[names[0]]
    for name, other in found.items():
        known = [key for key in ("judging_weights",) if key in first and key in other]  # older evaluations lack them
        for key in ("names", "tracker", "extractor", "interpolator", *known):
            if other[key] != first[key]:
                raise ValueError(f"{names[0]} and {name} were measured with other {key}; they cannot be compared")
        apart = differences(conditions(first), conditions(other))
        if apart:
            raise ValueError(f"{names[0]} and {name} were not measured alike: {'; '.join(apart)}")
    return found


def conditions(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an evaluation that decide what is measured, and how, whatever the policy."""
    config = evaluation["config"]
    judges = {key: config["evaluation"][key] for key in ("tracker", "scorer")}
    return flatten({"world": config["world"], "rollout": {"frames": config["rollout"]["frames"]}, "evaluation": judges})


def label(evaluation: Mapping[str, Any]) -> str:
    """What was measured: the checkpoint, or the model's weights."""
    config = evaluation["config"]
    return str(config.get("checkpoint") or config["model"]["transformer"])


def lines(evaluations: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table; ± is half of a 95 % interval over clips."""
    heads = [
        "",
        "policy",
        *(head for head, _ in (METRICS | SPEED).values()),
        "motion error against the first, clip by clip",
    ]
    rows = []
    first = next(iter(evaluations.values()))
    for name, found in evaluations.items():
        cells = []
        for key, (_, digits) in METRICS.items():
            known = found["intervals"][key]
            half = f" ± {known['half']:.{digits}f}" if math.isfinite(known["half"]) else ""
            cells.append(f"{known['value']:.{digits}f}{half}")
        speed, mark = found["speed"], " †" * busy(found["speed"])
        cells += [f"{speed[key]:.{digits}f}{mark}" for key, (_, digits) in SPEED.items()]
        change = verdict.paired(*(e["by_clip"]["motion_error_px"] for e in (first, found)))
        rows.append([name, label(found), *cells, change.text if change and found is not first else ""])
    blank = [""] * (len(SPEED) + 1)
    truth = [f"{first['truth'][k]:.{d}f}" if k in first["truth"] else "" for k, (_, d) in METRICS.items()]
    return heads, [*rows, ["true clips", "", *truth, *blank]]


def write(folders: Sequence[Path], out: Path) -> str:
    """Write `table.md`, `table.csv` and `page.html` into `out`; returns the table as Markdown."""
    from jinja2 import Environment

    found = read(folders)
    heads, rows = lines(found)
    first = next(iter(found.values()))
    about = (
        f"{first['clips']} {first['split']} clips, {first['tracker']}; Frechet distances between features of "
        f"{first['extractor']}, comparable with each other only; smoothness with the interpolator "
        f"{first['interpolator']}. ± is half of a 95 % interval over clips. Speeds on "
        f"{', '.join(dict.fromkeys(_place(each['speed']) for each in found.values()))}. {BUSY}"
    )
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(heads, rows) + f"\n{about}\n"
    (out / "table.md").write_text(text)
    sheet = io.StringIO()
    csv.writer(sheet).writerows([heads, *rows])
    (out / "table.csv").write_text(sheet.getvalue())
    columns = [folders[0] / "clips" / "true", *(folder / "clips" / "policy" for folder in folders)]
    shown = sorted(path.name for path in columns[0].glob("*.mp4"))
    videos = [[_data(column / name) for column in columns] for name in shown]
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(about=about, heads=heads, lines=rows, columns=["true clip", *found], videos=videos)
    (out / "page.html").write_text(html)
    return text


def _place(speed: Mapping[str, Any]) -> str:
    return f"{speed['device']}, {speed['threads']} thread(s)"


def _data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""
