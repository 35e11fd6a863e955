"""Runs of supervised training: evaluate, train, evaluate, and keep what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policies.causal_dit import CausalWanTransformer3DModel
    from runtime.session import Session

RESULT = "evaluation.json"


def conclude(session: Session, train: Callable[[Path], CausalWanTransformer3DModel]) -> None:
    """Train a session's transformer; write `transformer/` (diffusers' layout), videos and `evaluation.json`.

    Args:
        session: evaluates before and after, on the same clips and noise.
        train: takes a folder for its state and returns the trained transformer. With `resume=true` it finds there what
            an interrupted run left.
    """
    from policies.adapters import merged
    from runtime.evaluation import error_by_frame, measure
    from runtime.outcome import draw_samples

    settings, folder = session.settings, session.run_dir
    work, network = folder / "training", session.episodes.networks.transformer
    if settings.resume and (folder / RESULT).is_file():
        print(f"done already: {folder / RESULT}")
        return
    if work.is_dir() and not settings.resume:
        raise ValueError(f"run_dir={folder} holds an earlier run; add resume=true to go on with it, or choose another")
    work.mkdir(parents=True, exist_ok=True)
    before, _ = session.evaluate()
    began = time.time()
    trained = train(work)
    seconds = time.time() - began
    network.load_state_dict(trained.state_dict())
    after, samples = session.evaluate()
    merged(trained).save_pretrained(folder / "transformer")
    session.iteration = settings.updates
    session.save()
    draw_samples(folder / "videos", [("true clip", session.truth), ("after", samples)])
    result = {
        "before": before,
        "after": after,
        "truth": measure(session.truth, session.truth, session.judge),
        "error_by_frame": error_by_frame(samples),
        "seconds": round(seconds),
        "updates": settings.updates,
        "config": session.config,
    }
    (folder / RESULT).write_text(json.dumps(result, indent=1))
    print(
        f"held-out motion error {before['motion_error_px']:.3f} -> {after['motion_error_px']:.3f} px in {seconds:.0f} s"
    )
    print(f"transformer, results and videos: {folder}")
