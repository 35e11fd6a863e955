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
    from runtime.journal import Journal
    from runtime.session import Session
    from runtime.supervised import Trained


def run(plan: Plan) -> None:
    """Train, evaluate, and write `transformer/`, `metrics.jsonl`, `evaluation.json` and a report into `run_dir`."""
    from runtime.supervised import conclude, opened

    with opened(plan) as session:
        with setup_phase():
            start(session)
        conclude(session, plan.settings.updates, lambda journal: train(session, journal))


def start(session: Session) -> None:
    """Give the transformer the weights that training begins with. Where it has no control yet and only a part of the
    weights trains, the patch embedding trains beside them: without it control could not come in.

    Raises:
        ValueError: it would have to, and is not float32.
    """
    from algorithms.distillation.finetune import fresh

    model, stage = session.episodes.networks.transformer, session.settings.stage
    if stage.fresh:
        model.load_state_dict(fresh(model, session.settings.seed).state_dict())
    embedding = model.patch_embedding.weight
    channels = model.config.out_channels
    if stage.control and not embedding[:, -channels:].any():
        if embedding.element_size() < 4:  # rounds most of an update away, as in rules.precision
            raise ValueError(
                f"model.transformer={session.settings.model.transformer} knows no control yet, so its patch embedding "
                "trains; use model.precision=float32 engine.precision=bf16"
            )
        embedding.requires_grad_(True)


def train(session: Session, journal: Journal) -> Trained:
    """Fine-tune the session's transformer; gives the averaged weights."""
    from algorithms.distillation.finetune import finetune
    from algorithms.pretraining.loop import unread
    from runtime.supervised import Trained, timed

    settings, networks, stage = session.settings, session.episodes.networks, session.settings.stage
    pools, encoding = timed(lambda: networks.pools(settings.world, stage.pool, stage.track_noise))
    negative = networks.text.encode([stage.negative_prompt])
    network, seconds = finetune(
        pools,
        stage,
        networks.transformer,
        negative,
        settings.updates,
        settings.seed,
        unread,
        journal.folder / "state.pt",
        journal.stop,
        journal.record,
    )
    return Trained(network, seconds, encoding)


if __name__ == "__main__":
    main("finetune", run)
