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
    from runtime.supervised import conclude, opened

    stage = plan.settings.stage
    with opened(plan) as session:
        with setup_phase():
            teacher = replace(plan.settings.model, transformer=stage.teacher).load_transformer(session.device)
            plan.settings.engine.shape(teacher)
            if stage.from_teacher:
                session.episodes.networks.transformer.load_state_dict(teacher.state_dict())
        conclude(session, lambda work: train(session, teacher, work))


def train(session: Session, teacher: CausalWanTransformer3DModel, work: Path) -> CausalWanTransformer3DModel:
    """Run the stages, one after the other; returns the student."""
    from algorithms.distillation.chain import Distillation
    from runtime.supervised import asked

    settings, networks, stage = session.settings, session.episodes.networks, session.settings.stage
    pools = networks.pools(settings.world, stage.pool, stage.track_noise)
    negative = networks.text.encode([stage.negative_prompt])
    rule, sigmas = session.actor.causality, settings.rollout.sigmas
    chain = Distillation(stage, settings.strategy, rule, sigmas, settings.updates, settings.seed, print, asked(session))
    return chain.run(networks.transformer, teacher, negative, pools, work)


if __name__ == "__main__":
    main("distill", run)
