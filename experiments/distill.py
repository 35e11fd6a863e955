"""Distil the bidirectional teacher into the causal few-step student (AR-Drag Alg. 1): `python experiments/distill.py`.

`strategy=` names how the student makes its clips, `stage.<name>.steps` which stages run. The result is
`<run_dir>/transformer`, evaluated as GRPO evaluates, with ODE steps. Goes on where it stopped with `resume=true`.
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


def run(plan: Plan) -> None:
    """Train, evaluate, and write `transformer/` and `evaluation.json` into `run_dir`."""
    from runtime.session import Session
    from runtime.supervised import conclude

    with setup_phase():
        session = Session(plan.settings, plan.config)
    conclude(session, lambda work: train(session, work))


def train(session: Session, work: Path) -> CausalWanTransformer3DModel:
    """Run the stages that have steps, one after the other; returns the student."""
    from algorithms.distillation.chain import Distillation
    from algorithms.pretraining.flow import encode_pool
    from policies.causal_dit import CausalWanTransformer3DModel

    settings, networks, stage = session.settings, session.episodes.networks, session.settings.stage
    with setup_phase():
        folder = replace(settings.model, transformer=stage.teacher).network
        teacher = CausalWanTransformer3DModel.from_pretrained(folder, local_files_only=True).to(session.device).eval()
    pools = [
        encode_pool(settings.world, networks.video, networks.text, bucket, stage.pool, track_noise=stage.track_noise)
        for bucket in settings.world.buckets
    ]
    student = networks.transformer
    if stage.from_teacher:
        student.load_state_dict(teacher.state_dict())
    negative = networks.text.encode([stage.negative_prompt])
    chain = Distillation(
        stage, settings.strategy, session.actor.causality, settings.rollout.sigmas, settings.seed, print
    )
    return chain.run(student, teacher, negative, pools, work)


if __name__ == "__main__":
    main("distill", run)
