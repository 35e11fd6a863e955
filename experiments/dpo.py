"""DPO. Online, with pairs from each group: `python experiments/dpo.py algorithm.credit=clip` (the loop of `train.py`).

Offline, from a file of preference pairs: `python experiments/dpo.py stage=pairs stage.file=pairs.csv updates=200`;
the result is `<run_dir>/transformer`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from experiments import train
from runtime.cli import main, setup_phase
from runtime.config import Plan

if TYPE_CHECKING:
    from algorithms.preferences import EncodedPairs
    from runtime.journal import Journal
    from runtime.session import Session


def run(plan: Plan) -> None:
    """Learn online, or from pairs where `plan.settings.stage` says so."""
    if plan.settings.stage is None:
        train.run(plan)
        return
    from copy import deepcopy

    from runtime.state import fingerprint
    from runtime.supervised import Trained, conclude, opened, timed

    with opened(plan) as session:
        with setup_phase():
            pairs, encoding = timed(lambda: encode(session))
        network = session.episodes.networks.transformer
        conclude(
            session,
            plan.settings.updates,
            lambda journal: Trained(network, learn(session, pairs, journal), encoding),
            fingerprint(deepcopy(network).requires_grad_(False)),  # DPO's reference: the weights that it begins with
        )


def encode(session: Session) -> EncodedPairs:
    """Read and encode the pairs, at the world's first frame size.

    Raises:
        FileNotFoundError, ValueError: see `data.pairs`.
    """
    from pathlib import Path

    from algorithms.preferences import EncodedPairs
    from data.draws import Stream, seed_of
    from data.pairs import load_pairs, read_pairs
    from runtime.rules import pixel_frames

    settings, networks = session.settings, session.episodes.networks
    stage = settings.stage
    found = read_pairs(Path(stage.file).expanduser(), stage.criterion)
    clips = load_pairs(found, settings.world.buckets[0], pixel_frames(settings.rollout.frames), stage.fps)
    # Both clips of a pair have the same noise in place of the reference.
    seed = seed_of(Stream.TRAINING, settings.seed, 21)
    keys: list[tuple[int, ...]] = [(seed, 0, n) for _ in range(2) for n in range(len(found))]
    shape = (2, len(found))
    return EncodedPairs(
        networks.video.encode(clips.video.to(session.device)).unflatten(0, shape),
        networks.condition(clips, keys, session.device).unflatten(0, shape),
        networks.text.encode(clips.prompts[: len(found)]),
    )


def learn(session: Session, pairs: EncodedPairs, journal: Journal) -> float:
    """Train the session's transformer in place; returns the seconds that it took."""
    from algorithms.preferences import learn_preferences
    from algorithms.pretraining.loop import Fit, unread

    settings, network = session.settings, session.episodes.networks.transformer
    o, steps = settings.optimizer, settings.updates
    rate = partial(o.share, updates=steps)
    fit = Fit(steps, o.lr, (o.betas[0], o.betas[1]), o.weight_decay, o.grad_clip, rate)

    rule, sigmas, amount = session.actor.causality, list(settings.rollout.sigmas), settings.stage.batch
    return learn_preferences(
        amount,
        settings.algorithm.beta,
        fit,
        network,
        pairs,
        rule,
        sigmas,
        settings.seed,
        unread,
        journal.folder / "state.pt",
        journal.record,
        journal.stop,
    )


if __name__ == "__main__":
    main("dpo", run)
