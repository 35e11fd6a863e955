"""Fine-tune the bidirectional model by flow matching (AR-Drag section 3.2, Eq. 7): `python experiments/finetune.py`.

`stage.fresh=true stage.control=false` trains the initial model, image-to-video without control, which stands in for
released weights; `model.transformer=<its folder>` then teaches it to follow a drag. The result is
`<run_dir>/transformer`, evaluated as a bidirectional many-step sampler. Goes on where it stopped with `resume=true`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.cli import main, setup_phase
from runtime.config import Plan

if TYPE_CHECKING:
    from pathlib import Path

    from policies.causal_dit import CausalWanTransformer3DModel
    from runtime.session import Session


def run(plan: Plan) -> None:
    """Train, evaluate, and write `transformer/` and `evaluation.json` into `run_dir`."""
    from runtime.session import Session
    from runtime.supervised import conclude

    with setup_phase():
        session = Session(plan.settings, plan.config)
    conclude(session, lambda work: train(session, work))


def train(session: Session, work: Path) -> CausalWanTransformer3DModel:
    """Fine-tune the session's transformer; returns the averaged weights."""
    from algorithms.distillation.finetune import finetune, fresh
    from algorithms.pretraining.flow import encode_pool

    settings, networks, stage = session.settings, session.episodes.networks, session.settings.stage
    model = networks.transformer
    if stage.fresh:
        model.load_state_dict(fresh(model, settings.seed).state_dict())
    pools = [
        encode_pool(settings.world, networks.video, networks.text, bucket, stage.pool, track_noise=stage.track_noise)
        for bucket in settings.world.buckets
    ]
    negative = networks.text.encode([stage.negative_prompt])
    return finetune(pools, stage, model, negative, settings.updates, settings.seed, print, work / "state.pt")


if __name__ == "__main__":
    main("finetune", run)
