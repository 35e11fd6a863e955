"""Runs of supervised training: evaluate, train, evaluate, and keep what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint import replace_text
from runtime.cli import setup_phase
from runtime.config import Plan
from runtime.identity import BEGUN, identity
from runtime.lock import FolderLock
from runtime.signals import StopFlag, Stopped

if TYPE_CHECKING:
    from policies.causal_dit import CausalWanTransformer3DModel
    from runtime.session import Session

RESULT = "evaluation.json"


@contextmanager
def opened(plan: Plan) -> Iterator[Session]:
    """A session that holds its folder and stops politely: what is asked to stop has kept its state."""
    from algorithms.pretraining.loop import Interrupted
    from runtime.session import Session

    with ExitStack() as stack:
        stop = stack.enter_context(StopFlag())
        with setup_phase():
            stack.enter_context(FolderLock.of(plan.settings))
            session = Session(plan.settings, plan.config, stop)
        try:
            yield session
        except (Stopped, Interrupted) as where:
            print(f"stopped{f' ({where})' if str(where) else ''}; go on with: run_dir={session.run_dir} resume=true")


def asked(session: Session) -> Callable[[], bool]:
    """Whether a session's stop has been asked for."""
    return lambda: session.stop.requested


def conclude(session: Session, train: Callable[[Path], CausalWanTransformer3DModel]) -> None:
    """Train a session's transformer; write `transformer/` (diffusers' layout), videos and `evaluation.json`.

    Args:
        session: evaluates before and after, on the same clips and noise. Its transformer has the weights that training
            begins with.
        train: takes a folder for its state and returns the trained transformer. With `resume=true` it finds there what
            an interrupted run left.
    """
    from policies.adapters import merged
    from policies.causal_dit import save
    from runtime.evaluation import error_by_frame, measure
    from runtime.outcome import draw_samples

    folder, network = session.run_dir, session.episodes.networks.transformer
    if (folder / RESULT).is_file():
        print(f"done already: {folder / RESULT}")
        return
    before = _begin(session)
    began = time.time()
    trained = train((folder / BEGUN).parent)
    seconds = time.time() - began
    network.load_state_dict(trained.state_dict())
    after, samples = session.evaluate()
    save(merged(trained), folder / "transformer")
    draw_samples(folder / "videos", [("true clip", session.truth), ("after", samples)])
    result = {
        "before": before,
        "after": after,
        "truth": measure(session.truth, session.truth, session.judge),
        "error_by_frame": error_by_frame(samples),
        "extractor": session.judge.features.name,
        "seconds": round(seconds),
        "config": session.config,
    }
    replace_text(folder / RESULT, json.dumps(result, indent=1))
    print(
        f"held-out motion error {before['motion_error_px']:.3f} -> {after['motion_error_px']:.3f} px in {seconds:.0f} s"
    )
    print(f"transformer, results and videos: {folder}")


def _begin(session: Session) -> dict[str, float]:
    """Measure the starting weights, or read what the run that is gone on with measured."""
    note = session.run_dir / BEGUN
    if note.is_file():
        return dict(json.loads(note.read_text())["before"])
    note.parent.mkdir(parents=True, exist_ok=True)
    before, _ = session.evaluate()
    replace_text(note, json.dumps({"identity": identity(session.config), "before": before}))
    return before
