"""Measure a policy on held-out clips: `python experiments/evaluate.py checkpoint=<run folder>/checkpoints/step_000060`.

Model, adaptation, world and rollout are those of the checkpoint's run where the command line does not name others, and
`kl_to_start` says how far the policy has moved from the model's own weights. Without a checkpoint these are measured.
Any setting may be changed, such as `evaluation.split=hard`, or `model.transformer=teacher rollout.sigmas=...` for the
many-step model.
"""

from __future__ import annotations

import json
from pathlib import Path

from runtime.cli import main, setup_phase
from runtime.config import Plan, as_trained


def run(plan: Plan) -> None:
    """Print the metrics of the policy and of the true clips; write them and videos into `run_dir`."""
    from rich.console import Console
    from rich.table import Table

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
    e = plan.settings.evaluation
    table = Table(
        "metric",
        "policy",
        "true clips",
        title=f"{e.clips} {e.split} clips, {type(e.tracker).__name__}, {session.judge.features.name}",
    )
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}", f"{truth[name]:.4f}" if name in truth else "")
    Console().print(table)
    folder = Path(session.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "policy": metrics,
        "truth": truth,
        "error_by_frame": error_by_frame(samples),
        "extractor": session.judge.features.name,
        "clips": e.clips,
        "tracker": type(e.tracker).__name__,
        "found_by": found_by(session.truth),
        "config": plan.config,
    }
    if origin(result):
        print(origin(result))
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1))
    draw_samples(folder / "videos", [("true clip", session.truth), ("policy", samples)])
    print(f"results and videos: {folder}")


if __name__ == "__main__":
    main("evaluate", run, as_trained)
