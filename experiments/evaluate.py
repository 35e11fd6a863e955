"""Measure a policy on held-out clips: `python experiments/evaluate.py checkpoint=<run folder>/checkpoints/step_000060`.

Model, adaptation, world and rollout are those of the checkpoint's run where the command line does not name others, and
`kl_to_start` says how far the policy has moved from the model's own weights. Without a checkpoint these are measured.
Any setting may be changed, such as `evaluation.split=benchmark evaluation.clips=206`, `+extractor=inception_i3d`, or
`model.transformer=teacher rollout.sigmas=...` for the many-step model. Several checkpoints: `-m checkpoint=a,b`, then
`python experiments/side_by_side.py multirun/evaluate/<sweep>`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli import main, setup_phase
from runtime.config import Plan, as_trained

if TYPE_CHECKING:
    from runtime.evaluation import Sample
    from runtime.session import Session


def run(plan: Plan) -> None:
    """Print the metrics of the policy and of the true clips; write them and videos into `run_dir`."""
    from runtime.evaluation import measure
    from runtime.outcome import draw_samples
    from runtime.report import origin
    from runtime.session import Session

    with setup_phase():
        session = Session(plan.settings, plan.config, learns=False)
    metrics, samples = session.evaluate()
    truth = measure(session.truth, session.truth)
    if plan.settings.checkpoint is not None:
        metrics["kl_to_start"] = session.divergence()
    found = {"policy": metrics, "truth": truth, **details(session, samples), "config": plan.config}
    show(found)
    if origin(found):
        print(origin(found))
    folder = Path(session.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(found, indent=1))
    draw_samples(folder / "videos", [("true clip", session.truth), ("policy", samples)], spread=True)
    for name, shown in (("true", session.truth), ("policy", samples)):  # for side_by_side.py
        draw_samples(folder / "clips" / name, [(name, shown)], spread=True)
    print(f"results and videos: {folder}")


def details(session: Session, samples: list[Sample]) -> dict[str, Any]:
    """What `evaluation.json` holds beside means: how they were measured, every clip, intervals, speed."""
    from runtime.benchmark import by_clip, intervals, judging_weights
    from runtime.evaluation import error_by_frame, found_by

    judged, judge = session.settings.evaluation, session.judge
    values = by_clip(samples)
    return {
        "error_by_frame": error_by_frame(samples),
        "extractor": judge.features.name,
        "interpolator": judge.interpolator.name,
        "judging_weights": judging_weights(judge),
        "clips": judged.clips,
        "tracker": type(judged.tracker).__name__,
        "found_by": found_by(session.truth),
        "split": judged.split,
        "names": [name for s in session.truth for name in s.clips.names],
        "by_clip": {name: [v if math.isfinite(v) else None for v in column] for name, column in values.items()},
        "intervals": intervals(values, samples, session.truth),
        "speed": session.speed(),
    }


def show(found: Mapping[str, Any]) -> None:
    """Print what `evaluation.json` holds as a table."""
    from rich.console import Console
    from rich.table import Table

    measured = f"{found['clips']} {found['split']} clips, {found['tracker']}"
    title = f"{measured}, {found['extractor']}, interpolator {found['interpolator']}"
    table = Table("metric", "policy", "± over clips", "true clips", title=title)
    for name, value in found["policy"].items():
        half = f"{found['intervals'][name]['half']:.4f}" if name in found["intervals"] else ""
        table.add_row(name, f"{value:.4f}", half, f"{found['truth'][name]:.4f}" if name in found["truth"] else "")
    for name in ("latency_s", "frames_per_s"):
        table.add_row(name, f"{found['speed'][name]:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main("evaluate", run, as_trained)
