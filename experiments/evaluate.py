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
from pathlib import Path

from runtime.cli import main, setup_phase
from runtime.config import Plan, as_trained


def run(plan: Plan) -> None:
    """Print the metrics of the policy and of the true clips; write them and videos into `run_dir`."""
    from rich.console import Console
    from rich.table import Table

    from runtime.benchmark import by_clip, intervals
    from runtime.evaluation import error_by_frame, found_by, measure
    from runtime.outcome import draw_samples
    from runtime.report import origin
    from runtime.session import Session

    with setup_phase():
        session = Session(plan.settings, plan.config)
    metrics, samples = session.evaluate()
    truth = measure(session.truth, session.truth, session.judge)
    if plan.settings.checkpoint is not None:
        metrics["kl_to_start"] = session.divergence()
    values = by_clip(samples, session.judge)
    known = intervals(values, samples, session.truth, session.judge)
    speed = session.speed()
    e = plan.settings.evaluation
    table = Table(
        "metric",
        "policy",
        "± over clips",
        "true clips",
        title=f"{e.clips} {e.split} clips, {type(e.tracker).__name__}, {session.judge.features.name}, "
        f"interpolator {session.judge.interpolator.name}",
    )
    for name, value in metrics.items():
        half = f"{known[name]['half']:.4f}" if name in known else ""
        table.add_row(name, f"{value:.4f}", half, f"{truth[name]:.4f}" if name in truth else "")
    for name in ("latency_s", "frames_per_s"):
        table.add_row(name, f"{speed[name]:.4f}")
    Console().print(table)
    folder = Path(session.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "policy": metrics,
        "truth": truth,
        "error_by_frame": error_by_frame(samples),
        "extractor": session.judge.features.name,
        "interpolator": session.judge.interpolator.name,
        "clips": e.clips,
        "tracker": type(e.tracker).__name__,
        "found_by": found_by(session.truth),
        "split": e.split,
        "names": [name for s in session.truth for name in s.clips.names],
        "by_clip": {name: [v if math.isfinite(v) else None for v in column] for name, column in values.items()},
        "intervals": known,
        "speed": speed,
        "config": plan.config,
    }
    if origin(result):
        print(origin(result))
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1))
    draw_samples(folder / "videos", [("true clip", session.truth), ("policy", samples)])
    for name, shown in (("true", session.truth), ("policy", samples)):  # for side_by_side.py
        draw_samples(folder / "clips" / name, [(name, shown)])
    print(f"results and videos: {folder}")


if __name__ == "__main__":
    main("evaluate", run, as_trained)
