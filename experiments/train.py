"""The one loop: roll out, score, compute advantages, update. `python experiments/train.py algorithm=grpo`.

`grpo.py` and its siblings are names for it. `--help` explains every setting.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from runtime.cli import main, setup_phase
from runtime.config import Plan

if TYPE_CHECKING:
    from runtime.alarms import Watch
    from runtime.progress import Progress
    from runtime.runlog import RunLog
    from runtime.session import Session
    from runtime.timing import PhaseTimer


def run(plan: Plan) -> None:
    """Train as the plan says; leave checkpoints, metrics, videos and a report in `run_dir`."""
    from runtime.alarms import Watch
    from runtime.outcome import Outcome
    from runtime.plan import describe
    from runtime.progress import Progress
    from runtime.runlog import read
    from runtime.session import Session
    from runtime.signals import StopFlag
    from runtime.timing import PhaseTimer

    settings = plan.settings
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(settings.updates, started=plan.started))
        with setup_phase():
            session = Session(settings, plan.config)
        progress.resume(session.iteration)
        progress.note(describe(session))
        stop = stack.enter_context(StopFlag())
        log = settings.logger.open(session.run_dir, plan.config, session.iteration)
        stack.callback(log.close)
        watch = Watch(settings.alarms, [row for row in read(session.run_dir) if row["step"] <= session.iteration])
        outcome = Outcome(session, log, progress)
        session.on_step = progress.rollout_step
        outcome.begin()
        if due(session):  # a run that was stopped between a checkpoint and its evaluation
            outcome.evaluate()
        timer = PhaseTimer(session.synchronize)
        while session.iteration < settings.updates and not stop.requested:
            iterate(session, timer, log, progress, watch)
            last = session.iteration == settings.updates
            if last or stop.requested or session.iteration % settings.saving.every == 0:
                session.save()
            if due(session):
                outcome.evaluate()
        progress.note(outcome.finish())


def due(session: Session) -> bool:
    """Whether the policy is measured after this update."""
    settings, done = session.settings, session.iteration
    every = settings.evaluation.every
    return done >= settings.updates or (every > 0 and done % every == 0)


def iterate(session: Session, timer: PhaseTimer, log: RunLog, progress: Progress, watch: Watch) -> None:
    """One iteration: act, decode, score, learn, log."""
    timer.reset()
    progress.phase("rollout")
    with timer.phase("rollout"):
        rollout = session.rollout()
    with timer.phase("decode"):
        video = session.decode(rollout)
    with timer.phase("reward"):
        metrics = session.score(rollout, video)
    with timer.phase("update"):
        metrics |= session.update(rollout)
    metrics |= watch.check(metrics)
    seconds = timer.seconds()
    log.log(session.iteration, {**metrics, **{f"seconds/{name}": value for name, value in seconds.items()}})
    algorithm = session.settings.algorithm
    if algorithm.epochs * algorithm.minibatches == 1:  # every ratio is 1: nothing to clip
        metrics.pop("clip_fraction", None)
    progress.update(session.iteration, metrics, seconds)


if __name__ == "__main__":
    main("train", run)
