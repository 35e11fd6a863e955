"""The one loop: roll out, score, compute advantages, update. `python experiments/train.py algorithm=grpo`.

`grpo.py` and its siblings are names for it. `--help` explains every setting.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from runtime.cli import main, setup_phase
from runtime.config import Plan
from runtime.guard import NonFinite
from runtime.lock import FolderLock
from runtime.runlog import Silent, read
from runtime.signals import StopFlag, Stopped
from runtime.timing import PhaseTimer

if TYPE_CHECKING:
    from runtime.alarms import Watch
    from runtime.outcome import Outcome
    from runtime.progress import Progress
    from runtime.runlog import RunLog
    from runtime.session import Session


def run(plan: Plan) -> None:
    """Train as the plan says; leave checkpoints, metrics, videos and a report in `run_dir`."""
    from runtime.alarms import Watch
    from runtime.outcome import Outcome
    from runtime.plan import describe
    from runtime.progress import Progress
    from runtime.session import Session

    settings = plan.settings
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(settings.updates, started=plan.started))
        stop = stack.enter_context(StopFlag())
        with setup_phase():
            stack.enter_context(FolderLock.of(settings))
            session = Session(settings, plan.config, stop)
        session.notice = progress.notice
        progress.resume(session.iteration)
        progress.note(describe(session))
        log = settings.logger.open(session.run_dir, plan.config, session.iteration) if session.team.main else Silent()
        stack.callback(log.close)
        watch = Watch(settings.alarms, [row for row in read(session.run_dir) if row["step"] <= session.iteration])
        outcome = Outcome(session, log, progress)
        session.on_step = progress.rollout_step
        with suppress(Stopped):  # what an iteration has done so far is dropped: it follows from the weights before it
            train(session, outcome, log, progress, watch)
        if session.team.any(stop.requested) and session.iteration:
            session.save(required=True)
        progress.note(outcome.finish())


def train(session: Session, outcome: Outcome, log: RunLog, progress: Progress, watch: Watch) -> None:
    """Evaluate, then iterate to the last update; save and evaluate on the way."""
    settings = session.settings
    outcome.begin()
    if due(session):  # a run that was stopped between a checkpoint and its evaluation
        outcome.evaluate()
    timer = PhaseTimer(session.synchronize)
    while session.iteration < settings.updates:
        session.stop.poll()
        iterate(session, timer, log, progress, watch)
        last = session.iteration == settings.updates
        if last or session.unsaved or session.iteration % settings.saving.every == 0:
            session.save(required=last)
        if due(session):
            outcome.evaluate()


def due(session: Session) -> bool:
    """Whether the policy is measured after this update."""
    settings, done = session.settings, session.iteration
    every = settings.evaluation.every
    return done >= settings.updates or (every > 0 and done % every == 0)


def iterate(session: Session, timer: PhaseTimer, log: RunLog, progress: Progress, watch: Watch) -> None:
    """One iteration: act, decode, score, learn, log."""
    timer.reset()
    progress.phase("rollout")
    try:
        metrics = transaction(session, timer)
    except NonFinite as found:
        metrics = session.skip(found)
    metrics |= watch.check(metrics)
    seconds = timer.seconds()
    log.log(session.iteration, {**metrics, **{f"seconds/{name}": value for name, value in seconds.items()}})
    algorithm = session.settings.algorithm
    exact = session.settings.engine.precision == "fp32"
    if exact and algorithm.epochs * algorithm.minibatches == 1:  # every ratio is 1: nothing to clip
        metrics.pop("clip_fraction", None)
    progress.update(session.iteration, metrics, seconds)


def transaction(session: Session, timer: PhaseTimer) -> dict[str, float]:
    """One update, or an exception and weights as they were; returns what to log."""
    with timer.phase("rollout"):
        rollout = session.rollout()
    with timer.phase("decode"):
        video = session.decode(rollout)
    with timer.phase("reward"):
        metrics = session.score(rollout, video)
    with timer.phase("update"):
        return metrics | session.update(rollout)


if __name__ == "__main__":
    main("train", run)
