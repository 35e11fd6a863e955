"""One page that shows a finished run and holds all of it: `report.html`, made from files of its folder."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from runtime import alarms, runlog, verdict, videos
from runtime.report_page import PAGE

FILE = "report.html"
SETS = ("before", "after", "truth")

METRICS = {  # key: label, unit, which way is better
    "motion_error_px": ("Motion error", "px", "lower"),
    "motion_error_px_median": ("Motion error, median clip", "px", "lower"),
    "epe_px": ("Motion error where seen", "px", "lower"),
    "motion_visible": ("Asked positions with the point in sight", "share", "higher"),
    "reward": ("Reward", "", "higher"),
    "motion_consistency": ("Motion consistency", "", "higher"),
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
        verdict: `better`, `worse` or empty where nothing can be said.
    """

    label: str
    unit: str
    better: str
    values: dict[str, str]
    percent: str
    verdict: str

    @property
    def arrow(self) -> str:
        """`1.95 → 1.43`, without spreads."""
        ends = [self.values[name] for name in ("before", "after") if name in self.values]
        return " → ".join(text.split(" ± ")[0] for text in ends)


def write(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder and return its path; a part whose file is absent is left out.

    Reads `evaluation.json`, `metrics.jsonl`, `curves.png`, `videos/*.mp4`, `config.yaml` and
    `environment.json`. Nothing in the page is loaded from elsewhere: it can be sent to a colleague as it is.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a JSON file cannot be read.
    """
    from jinja2 import Environment, StrictUndefined

    if not run_dir.is_dir():
        raise FileNotFoundError(f"run_dir={run_dir}: no such folder; it looks like outputs/grpo/<run>")
    evaluation, environment = _json(run_dir / "evaluation.json"), _json(run_dir / "environment.json")
    table, rows = changes(evaluation), runlog.read(run_dir)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = page.from_string(PAGE).render(
        name=run_dir.resolve().name,
        sentences=[*headline(evaluation), *filter(None, [alarms.summary(rows)])],
        cards=[table[key] for key in CARDS if key in table] + training_reward(rows, table),
        table=list(table.values()),
        sets=[name for name in SETS if isinstance(evaluation.get(name), dict)],
        measured=_measured(evaluation),
        origin=origin(evaluation),
        extractor=evaluation.get("extractor"),
        course=course(evaluation.get("curve") or []),
        schedule=evaluation.get("schedule"),
        videos=[(path.stem, _base64(path)) for path in sorted((run_dir / "videos").glob("*.mp4"))],
        legend=[("#{:02x}{:02x}{:02x}".format(*colour), text) for colour, text in videos.LEGEND],
        curves=_base64(run_dir / "curves.png"),
        config=_text(run_dir / "config.yaml"),
        command=environment.get("command"),
        facts=[_fact(key, value) for key, value in environment.items() if key != "command"],
    )
    path = run_dir / FILE
    path.write_text(html, encoding="utf-8")
    return path


def changes(evaluation: Mapping[str, Any]) -> dict[str, Change]:
    """Return each metric of `evaluation.json` as text, known metrics first and in the order of `METRICS`.

    The motion error is better or worse only where its change, clip by clip, is told apart from none.
    """
    sets = {name: evaluation[name] for name in SETS if isinstance(evaluation.get(name), dict)}
    keys = dict.fromkeys(key for values in sets.values() for key in values if _is_metric(key, values))
    table = {key: _change(key, sets) for key in sorted(keys, key=_rank)}
    judged = verdict.of(evaluation)
    if judged is not None and verdict.METRIC in table:
        table[verdict.METRIC] = replace(table[verdict.METRIC], verdict=judged.verdict)
    return table


def headline(evaluation: Mapping[str, Any]) -> list[str]:
    """Say in sentences what became of the motion error; no comparison where one of the numbers is missing."""
    key = verdict.METRIC
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
    judged = verdict.of(evaluation)
    return [first] if judged is None else [first, f"Clip by clip it changed by {judged.text}."]


def origin(evaluation: Mapping[str, Any]) -> str:
    """Say which asked paths a tracker found in the true clips, and what that makes of their error; else empty."""
    found = evaluation.get("found_by") or {}
    if not found:
        return ""
    of = f" of {evaluation['clips']}" if "clips" in evaluation else ""
    text = f"The asked paths of {sum(found.values())}{of} clips were not given: {', '.join(found)} found them there."
    if evaluation.get("tracker") in found:
        text += (
            " The same tracker judges, so the motion error of the true clips is near 0 by construction;"
            " it does not tell how exact the paths are."
        )
    return text


def training_reward(rows: Sequence[Mapping[str, Any]], table: Mapping[str, Change]) -> list[Change]:
    """Mean training reward of the first and the last tenth of the updates, where no evaluation has one."""
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
    number = isinstance(values[key], (int, float)) and not isinstance(values[key], bool)
    return number and key != "update" and not key.endswith(CI)


def _rank(key: str) -> tuple[int, str]:
    known = list(METRICS)
    return (known.index(key), "") if key in METRICS else (len(known), key)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _value(key: str, row: Mapping[str, Any]) -> str:
    """`1.43 ± 0.15`; `n/a` where there is no finite number."""
    value, spread = _number(row.get(key)), _number(row.get(key + CI))
    if value is None:
        return "n/a"
    style = ".2f" if METRICS.get(key, ("", "", ""))[1] in ("px", "share") else "#.4g"
    style = ".4f" if abs(value) < 1e-3 else style  # rounding, such as the distance of a thing to itself
    return f"{value:{style}}" + (f" ± {spread:{style}}" if spread is not None else "")


def _percent(before: float, after: float) -> str:
    return f"{100 * (after - before) / abs(before):+.1f} %" if before else ""


def _measured(evaluation: Mapping[str, Any]) -> str:
    """How the numbers were made, as far as the file says."""
    parts = []
    if "clips" in evaluation:
        parts.append(f"{evaluation['clips']} clips of the split {evaluation.get('split', '?')}")
    if "tracker" in evaluation:
        parts.append(f"paths found by the tracker {evaluation['tracker']}")
    if "extractor" in evaluation:
        parts.append(f"Fréchet distance on features of {evaluation['extractor']}")
    if "interpolator" in evaluation:
        parts.append(f"smoothness with the interpolator {evaluation['interpolator']}")
    return "; ".join(parts)


def _fact(key: str, value: Any) -> tuple[str, str]:
    """Name and text of an entry of `environment.json`; `<name>_seconds` becomes h:mm:ss."""
    name = key.replace("_", " ")
    seconds = _number(value) if key.endswith("_seconds") else None
    if seconds is not None:
        return name.replace(" seconds", " time (h:mm:ss)"), str(timedelta(seconds=round(seconds)))
    if isinstance(value, Mapping):
        return name, ", ".join(f"{part} {inner}" for part, inner in value.items())
    return name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


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
