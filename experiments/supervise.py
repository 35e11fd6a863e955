"""Continue the student's supervised training and measure it: the control that tells learning from under-training.

`python experiments/supervise.py updates=600 seed=0` runs the last stage of `algorithms/pretraining/flow.py` anew
from the student, on clips that no stage has seen, and evaluates before and after exactly as `grpo.py` does. With
`resume=true run_dir=...` an interrupted run goes on.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

from runtime.cli import main, setup_phase
from runtime.config import Plan

# Clips 0 .. 2047 trained the student; these are fresh.
FIRST_CLIP = 100_000


def run(plan: Plan) -> None:
    """Train, evaluate, and write `evaluation.json` and a checkpoint into `run_dir`."""
    from algorithms.pretraining.flow import WEAK_TRACKS, encode_pool, train_few_step
    from runtime.session import Session

    settings = plan.settings
    with setup_phase():
        session = Session(settings, plan.config)
    if session.iteration >= settings.updates:
        print(f"done already: {session.run_dir / 'evaluation.json'}")
        return
    before, _ = session.evaluate()
    networks = session.episodes.networks
    began = time.time()
    sigmas, clips = list(settings.rollout.sigmas), WEAK_TRACKS.pool
    stage = replace(WEAK_TRACKS, seed=2 + settings.seed, sigmas=sigmas, steps=settings.updates)
    first = FIRST_CLIP + settings.seed * clips
    pools = [
        encode_pool(settings.world, networks.video, networks.text, bucket, clips, first, stage.track_noise)
        for bucket in settings.world.buckets
    ]
    state = session.run_dir / "training.pt"
    session.run_dir.mkdir(parents=True, exist_ok=True)
    if not settings.resume:
        state.unlink(missing_ok=True)
    student = train_few_step(pools, stage, networks.transformer, lambda line: print(line, flush=True), state)
    networks.transformer.load_state_dict(student.state_dict())
    seconds = time.time() - began
    after, _ = session.evaluate()
    result = {"before": before, "after": after, "seconds": round(seconds), "updates": settings.updates}
    (session.run_dir / "evaluation.json").write_text(json.dumps(result, indent=1))
    session.iteration = settings.updates
    session.save()
    state.unlink(missing_ok=True)
    print(
        f"held-out motion error {before['motion_error_px']:.3f} -> {after['motion_error_px']:.3f} px in {seconds:.0f} s"
    )


if __name__ == "__main__":
    main("supervise", run)
