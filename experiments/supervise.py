"""Continue the student's supervised training and measure it: the control that tells learning from under-training.

`python experiments/supervise.py updates=600 seed=0` runs the last stage of `algorithms/pretraining/flow.py` anew
from the student, on clips that no stage has seen, and evaluates before and after exactly as `grpo.py` does. With
`resume=true run_dir=...` an interrupted run goes on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.cli import main, setup_phase
from runtime.config import Plan

if TYPE_CHECKING:
    from pathlib import Path

    from policies.causal_dit import CausalWanTransformer3DModel
    from runtime.session import Session

# Clips 0 .. 2047 trained the student; these are fresh.
FIRST_CLIP = 100_000


def run(plan: Plan) -> None:
    """Train, evaluate, and write `evaluation.json` and the transformer into `run_dir`."""
    from runtime.session import Session
    from runtime.supervised import conclude

    with setup_phase():
        session = Session(plan.settings, plan.config)
    conclude(session, lambda work: train(session, work))


def train(session: Session, work: Path) -> CausalWanTransformer3DModel:
    """Run the last stage from the session's transformer on fresh clips."""
    from algorithms.pretraining.flow import WEAK_TRACKS, train_few_step

    settings, networks = session.settings, session.episodes.networks
    sigmas, clips = list(settings.rollout.sigmas), WEAK_TRACKS.pool
    stage = replace(WEAK_TRACKS, seed=2 + settings.seed, sigmas=sigmas, steps=settings.updates)
    first = FIRST_CLIP + settings.seed * clips
    pools = networks.pools(settings.world, clips, stage.track_noise, first)
    return train_few_step(pools, stage, networks.transformer, print, work / "state.pt")


if __name__ == "__main__":
    main("supervise", run)
