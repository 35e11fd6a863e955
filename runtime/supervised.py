"""Runs of supervised training: evaluate, train, evaluate, and keep what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from runtime.checkpoint import replace_text
from runtime.cli import setup_phase
from runtime.config import Plan
from runtime.identity import BEGUN, identity
from runtime.lock import FolderLock
from runtime.signals import StopFlag, Stopped

if TYPE_CHECKING:
    from policies.causal_dit import CausalWanTransformer3DModel
    from runtime.journal import Journal
    from runtime.session import Session

RESULT = "evaluation.json"
Made = TypeVar("Made")


class Trained(NamedTuple):
    """What training gives.

    Attributes:
        network: the transformer.
        seconds: of training, over all parts of an interrupted run.
        encoding: seconds of encoding the clips before it, which every part does anew; the last one's.
    """

    network: CausalWanTransformer3DModel
    seconds: float
    encoding: float


@contextmanager
def opened(plan: Plan) -> Iterator[Session]:
    """A session that holds its folder and stops politely: what is asked to stop has kept its state."""
    from algorithms.pretraining.loop import Interrupted
    from runtime.session import Session

    with ExitStack() as stack:
        stop = stack.enter_context(StopFlag())
        with setup_phase():
            stack.enter_context(FolderLock.of(plan.settings))
            session = Session(plan.settings, plan.config, stop, learns=False)
        try:
            yield session
        except (Stopped, Interrupted) as where:
            print(f"stopped{f' ({where})' if str(where) else ''}; go on with: run_dir={session.run_dir} resume=true")


def timed(make: Callable[[], Made]) -> tuple[Made, float]:
    """What `make` returns, and the seconds that it took."""
    began = time.perf_counter()
    return make(), time.perf_counter() - began


def conclude(session: Session, steps: int, train: Callable[[Journal], Trained], guides: str = "") -> None:
    """Train a session's transformer; write `transformer/` (diffusers' layout), `evaluation.json`, videos and report.

    Args:
        session: evaluates before and after, on the same clips and noise. Its transformer has the weights that training
            begins with.
        steps: that training takes.
        train: trains; what it is given takes its rows of `metrics.jsonl`, and has a folder for its state, where with
            `resume=true` it finds what an interrupted run left.
        guides: hash of the networks that training asks and does not change, such as a teacher.

    Raises:
        SetupError: the run that is gone on with had other weights that do not train.
    """
    from policies.adapters import merged
    from policies.causal_dit import save
    from runtime.evaluation import error_by_frame
    from runtime.journal import Journal
    from runtime.outcome import closing, judged, publish, write_config

    folder = session.run_dir
    if (folder / RESULT).is_file():
        print(f"done already: {folder / RESULT}")
        return
    frozen = f"{session.base}-{guides}"
    with setup_phase():
        _same_weights(session, frozen)
    began = time.time()
    with Journal(session, steps) as journal:
        write_config(session)
        journal.progress.phase("evaluation")
        before = journal.before = _begin(session, frozen)
        journal.progress.phase("training")
        trained = train(journal)
        session.episodes.networks.transformer.load_state_dict(trained.network.state_dict())
        journal.progress.phase("evaluation")
        after, samples = session.evaluate()
        log = journal.measured(after)
        save(merged(trained.network), folder / "transformer")
        result = {
            "before": before,
            "after": after,
            **judged(session),
            "error_by_frame": error_by_frame(samples),
            "seconds": round(trained.seconds),
            "seconds_encoding": round(trained.encoding),
            "config": session.config,
        }
        replace_text(folder / RESULT, json.dumps(result, indent=1))
        try:
            publish(session, log, [("true clip", session.truth), ("after", samples)], time.time() - began)
        except OSError as error:  # what was trained and measured is kept
            journal.progress.notice(f"videos and report cannot be written ({error})")
        journal.progress.note(
            f"{closing(result)}; {trained.seconds:.0f} s of training\n"
            f"transformer, results, videos and report.html: {folder}"
        )


def _same_weights(session: Session, frozen: str) -> None:
    """Refuse to go on with a run whose weights that do not train have changed since."""
    note = session.run_dir / BEGUN
    kept = json.loads(note.read_text()).get("frozen") if note.is_file() else None  # older notes do not say
    if kept not in (None, frozen):
        raise ValueError(
            f"resume=true: the weights that do not train are not those that the run in {session.run_dir} began with; "
            "put the files of model and teacher back, or choose another run_dir"
        )


def _begin(session: Session, frozen: str) -> dict[str, float]:
    """Measure the starting weights, or read what the run that is gone on with measured."""
    note = session.run_dir / BEGUN
    if note.is_file():
        return dict(json.loads(note.read_text())["before"])
    note.parent.mkdir(parents=True, exist_ok=True)
    before, _ = session.evaluate()
    begun = {"identity": identity(session.config), "frozen": frozen, "before": before}
    replace_text(note, json.dumps(begun))
    return before
