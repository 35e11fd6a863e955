"""One page that shows a finished run, with everything in it: `report.html`, made from the files of the run's folder."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from runtime import runlog, videos

FILE = "report.html"
SETS = ("before", "after", "truth")

METRICS = {  # key: label, unit, which way is better
    "motion_error_px": ("Motion error", "px", "lower"),
    "motion_error_px_median": ("Motion error, median clip", "px", "lower"),
    "motion_visible": ("Asked positions at which the tracker sees the point", "share", "higher"),
    "reward": ("Reward", "", "higher"),
    "aesthetic": ("Aesthetic score", "", "higher"),
    "frechet": ("Fréchet distance", "", "lower"),
    "frechet_video": ("Fréchet distance of videos", "", "lower"),
    "smoothness": ("Smoothness", "", "higher"),
}
CARDS = ("motion_error_px", "reward", "aesthetic", "frechet")
CI = "_ci"  # `<metric>_ci`: half-width of its 95 % interval


@dataclass(frozen=True)
class Change:
    """One metric before and after, as text; an empty string is what there is not.

    Attributes:
        label: name and, in the table, the unit.
        better: `lower`, `higher` or empty where nobody said.
        values: text for each of before, after and truth.
        percent: signed change from before to after.
        verdict: `better`, `worse` or empty.
    """

    label: str
    unit: str
    better: str
    values: dict[str, str]
    percent: str
    verdict: str


def write(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder; a part whose file is absent is left out.

    Reads `evaluation.json`, `metrics.jsonl`, `curves.png`, `videos/*.mp4`, `config.yaml` and `environment.json`. Nothing
    in the page is loaded from elsewhere, so it can be sent to a colleague as it is.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a JSON file cannot be read.
    """
    from jinja2 import Environment, StrictUndefined

    if not run_dir.is_dir():
        raise FileNotFoundError(f"run_dir={run_dir}: no such folder; it looks like outputs/grpo/<run>")
    evaluation, environment = _json(run_dir / "evaluation.json"), _json(run_dir / "environment.json")
    table = changes(evaluation)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = page.from_string(_PAGE).render(
        name=run_dir.resolve().name,
        sentences=headline(evaluation),
        cards=[table[key] for key in CARDS if key in table] + training_reward(runlog.read(run_dir), table),
        table=list(table.values()),
        sets=[name for name in SETS if isinstance(evaluation.get(name), dict)],
        measured=_measured(evaluation),
        extractor=evaluation.get("extractor"),
        course=course(evaluation.get("curve") or []),
        schedule=evaluation.get("schedule"),
        videos=[(path.stem, _base64(path)) for path in sorted((run_dir / "videos").glob("*.mp4"))],
        legend=[("#{:02x}{:02x}{:02x}".format(*colour), text) for colour, text in videos.LEGEND],
        curves=_base64(run_dir / "curves.png"),
        config=_text(run_dir / "config.yaml"),
        command=environment.get("command"),
        environment=[(key.replace("_", " "), _shown(key, value)) for key, value in environment.items()],
    )
    path = run_dir / FILE
    path.write_text(html, encoding="utf-8")
    return path


def changes(evaluation: Mapping[str, Any]) -> dict[str, Change]:
    """Return each metric of `evaluation.json` as text, known metrics first and in the order of `METRICS`."""
    sets = {name: evaluation[name] for name in SETS if isinstance(evaluation.get(name), dict)}
    keys = dict.fromkeys(key for values in sets.values() for key in values if _is_metric(key, values))
    return {key: _change(key, sets) for key in sorted(keys, key=_rank)}


def headline(evaluation: Mapping[str, Any]) -> list[str]:
    """Say in sentences what became of the motion error; no claim where the file does not hold both numbers."""
    key = "motion_error_px"
    before, after = (_number((evaluation.get(name) or {}).get(key)) for name in ("before", "after"))
    if after is None:
        return []
    if before is None:
        return [f"The motion error is {_value(key, evaluation['after'])} px."]
    verb = "fell" if after < before else "rose" if after > before else "stayed:"
    first = (
        f"The motion error {verb} from {_value(key, evaluation['before'])} to "
        f"{_value(key, evaluation['after'])} px ({_percent(before, after)})."
    )
    spreads = [_number(evaluation[name].get(key + CI)) for name in ("before", "after")]
    if None not in spreads and abs(after - before) <= sum(s for s in spreads if s is not None):
        return [first, "The 95 % intervals overlap: repeat with other seeds before trusting the change."]
    return [first]


def training_reward(rows: Sequence[Mapping[str, Any]], table: Mapping[str, Change]) -> list[Change]:
    """The mean training reward of the first and of the last tenth of the updates, where no evaluation has one."""
    rewards = [value for row in rows if (value := _number(row.get("reward"))) is not None]
    if "reward" in table or len(rewards) < 2:
        return []
    count = max(1, len(rewards) // 10)
    ends = {"before": sum(rewards[:count]) / count, "after": sum(rewards[-count:]) / count}
    change = _change("reward", {name: {"reward": value} for name, value in ends.items()})
    updates = "update" if count == 1 else f"{count} updates"
    label = f"Training reward, first and last {updates}"
    return [Change(label, "", "higher", change.values, change.percent, change.verdict)]


def course(curve: Sequence[Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """The evaluations of a run as a table: `head` and `body` of texts; both empty where there are none."""
    keys = [key for key in METRICS if any(key in row for row in curve)]
    if not keys:
        return {"head": [], "body": []}
    body = [[str(row.get("update", "")), *(_value(key, row) for key in keys)] for row in curve]
    return {"head": [["update"], *(list(METRICS[key][:2]) for key in keys)], "body": body}


def _change(key: str, sets: Mapping[str, Mapping[str, Any]]) -> Change:
    label, unit, better = METRICS.get(key, (key, "", ""))
    if key.startswith("reward/"):
        label, better = f"Reward term: {key.removeprefix('reward/')}", "higher"
    before, after = (_number(sets.get(name, {}).get(key)) for name in ("before", "after"))
    percent = _percent(before, after) if before is not None and after is not None else ""
    verdict = ""
    if better and before is not None and after is not None and before != after:
        verdict = "better" if (after < before) == (better == "lower") else "worse"
    values = {name: _value(key, row) for name, row in sets.items()}
    return Change(label, unit, better, values, percent, verdict)


def _is_metric(key: str, values: Mapping[str, Any]) -> bool:
    return not key.endswith(CI) and isinstance(values[key], (int, float)) and not isinstance(values[key], bool)


def _rank(key: str) -> tuple[int, str]:
    known = list(METRICS)
    return (known.index(key), "") if key in METRICS else (len(known), key)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _value(key: str, row: Mapping[str, Any]) -> str:
    """`1.43 ± 0.15`; a dash where there is no finite number."""
    value, spread = _number(row.get(key)), _number(row.get(key + CI))
    if value is None:
        return "–"
    style = ".2f" if METRICS.get(key, ("", "", ""))[1] in ("px", "share") else "#.4g"
    return f"{value:{style}}" + (f" ± {spread:{style}}" if spread is not None else "")


def _percent(before: float, after: float) -> str:
    return f"{100 * (after - before) / abs(before):+.1f} %".replace("-", "−") if before else ""


def _measured(evaluation: Mapping[str, Any]) -> str:
    """How the numbers were made, as far as the file says."""
    parts = []
    if "clips" in evaluation:
        parts.append(f"{evaluation['clips']} clips of the split {evaluation.get('split', '?')}")
    if "tracker" in evaluation:
        parts.append(f"paths found by the tracker {evaluation['tracker']}")
    if "extractor" in evaluation:
        parts.append(f"Fréchet distance on features of {evaluation['extractor']}")
    return "; ".join(parts)


def _shown(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    if key.endswith("seconds") and _number(value) is not None:
        return str(timedelta(seconds=round(value)))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); delete it or run the evaluation again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold one JSON object; delete it or run the evaluation again")
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
:root { color-scheme: light; --ink: #1c2330; --soft: #5b6575; --line: #dfe3ea; --good: #00684a; --bad: #a8320a; }
body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); background: #fff;
       max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.lead { font-size: 1.15rem; margin: .2rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.better { color: var(--good); } .worse { color: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .9rem; border-bottom: 1px solid var(--line); vertical-align: top;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; } th { font-weight: 600; }
.facts td { text-align: left; font-size: .9rem; white-space: normal; }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; border: 1px solid #222; margin: 0 .3em 0 0; }
video, img { max-width: 100%; height: auto; display: block; } figure { margin: 1rem 0 1.8rem; }
pre { background: #f5f7fa; border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto;
      font: .85rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
details { margin: .8rem 0; } summary { cursor: pointer; } .wide { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
{% for sentence in sentences %}
<p class="lead">{{ sentence }}</p>
{% endfor %}
{% if measured %}
<p class="soft">Measured on {{ measured }}.</p>
{% endif %}
{% if cards %}
<div class="cards">
{% for card in cards %}
<div class="card"><span class="soft">{{ card.label }}{{ ", " + card.unit if card.unit }}</span>
<b>{{ card["values"].values() | reject("equalto", card["values"].get("truth")) | map("trim") | join(" → ") }}</b>
<span class="{{ card.verdict }}">{{ card.percent }} {{ card.verdict }}</span></div>
{% endfor %}
</div>
{% endif %}
{% if table %}
<h2>Before and after</h2>
<div class="wide"><table>
<tr><th>Metric</th>{% for name in sets %}<th>{{ name }}</th>{% endfor %}<th>change</th></tr>
{% for row in table %}
<tr><td>{{ row.label }}{{ ", " + row.unit if row.unit }}
{% if row.better %}<span class="soft">({{ row.better }} is better)</span>{% endif %}</td>
{% for name in sets %}<td>{{ row["values"][name] }}</td>{% endfor %}
<td class="{{ row.verdict }}">{{ row.percent }} {{ row.verdict }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">± is half of a 95 % interval over clips. truth: the true clips, measured in the same way.
{% if extractor %}Fréchet distances use {{ extractor }}; they cannot be compared with those of another extractor.{% endif %}</p>
{% endif %}
{% if course.body %}
<details><summary>Every evaluation of the run</summary><div class="wide"><table>
<tr>{% for head in course.head %}<th>{{ head | select | join(", ") }}</th>{% endfor %}</tr>
{% for row in course.body %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div></details>
{% endif %}
{% if videos %}
<h2>Videos</h2>
<p class="soft">{% for colour, text in legend %}<span class="dot" style="background: {{ colour }}"></span>{{ text }} &ensp;
{% endfor %} The closer magenta follows yellow, the better.</p>
{% for title, data in videos %}
<figure><video autoplay loop muted playsinline controls aria-label="{{ title }}" src="data:video/mp4;base64,{{ data }}"></video>
<figcaption class="soft">{{ title }}</figcaption></figure>
{% endfor %}
{% endif %}
{% if curves %}
<h2>Curves</h2>
<img alt="Metrics over the updates of the run" src="data:image/png;base64,{{ curves }}">
{% endif %}
{% if schedule %}
<h2>Schedule of stochastic steps</h2>
<pre>{{ schedule }}</pre>
<p class="soft">● stochastic step, · deterministic step; columns are noise levels.</p>
{% endif %}
{% if command or environment or config %}
<h2>Reproduce</h2>
{% if command %}
<pre>{{ command }}</pre>
{% endif %}
{% if environment %}
<table class="facts">
{% for key, value in environment if key != "command" %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if config %}
<details><summary>Resolved configuration</summary><pre>{{ config }}</pre></details>
{% endif %}
{% endif %}
</body>
</html>
"""
