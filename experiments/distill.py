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
    from policies.causal_dit import CausalWanTransformer3DModel
    from runtime.journal import Journal
    from runtime.session import Session
    from runtime.supervised import Trained


def run(plan: Plan) -> None:
    """Train, evaluate, and write `transformer/`, `metrics.jsonl`, `evaluation.json` and a report into `run_dir`."""
    from runtime.state import fingerprint
    from runtime.supervised import conclude, opened

    stage = plan.settings.stage
    with opened(plan) as session:
        with setup_phase():
            teacher = replace(plan.settings.model, transformer=stage.teacher).load_transformer(session.device)
            teacher.requires_grad_(False)
            plan.settings.engine.shape(teacher)
            if stage.from_teacher:
                session.episodes.networks.transformer.load_state_dict(teacher.state_dict())
        steps = sum(stage.steps(plan.settings.updates).values())
        conclude(session, steps, lambda journal: train(session, teacher, journal), fingerprint(teacher))


def train(session: Session, teacher: CausalWanTransformer3DModel, journal: Journal) -> Trained:
    """Run the stages, one after the other; gives the student."""
    from algorithms.distillation.chain import Distillation
    from algorithms.pretraining.loop import unread
    from runtime.supervised import Trained, timed

    settings, networks, stage = session.settings, session.episodes.networks, session.settings.stage
    pools, encoding = timed(lambda: networks.pools(settings.world, stage.pool, stage.track_noise))
    negative = networks.text.encode([stage.negative_prompt])
    rule, sigmas, updates = session.actor.causality, settings.rollout.sigmas, settings.updates
    told = (unread, journal.stop, journal.record)
    chain = Distillation(stage, settings.strategy, rule, sigmas, updates, settings.seed, *told)
    student = chain.run(networks.transformer, teacher, negative, pools, journal.folder)
    return Trained(student, chain.seconds, encoding)


if __name__ == "__main__":
    main("distill", run)
