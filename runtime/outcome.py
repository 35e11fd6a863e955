"""What a run leaves behind: evaluations, videos before and after, curves, the report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError

from runtime import runlog, verdict
from runtime.checkpoint import versions
from runtime.evaluation import Sample, found_by, measure, motion_errors
from runtime.hardware import processor
from runtime.plan import schedule_picture
from runtime.settings import BETTER
from tracking.trackers import Tracks

if TYPE_CHECKING:
    from runtime.progress import Progress
    from runtime.runlog import RunLog
    from runtime.session import Session

RESULT = "evaluation.json"
# Videos shown per run; more make the report heavy, not clearer.
SHOWN = 6


class Outcome:
    """Collects evaluations of one run and writes its result files.

    "Before" is the weights that the run started from, also in a run that was resumed. An evaluation that the folder
    holds already is not made again.
    """

    def __init__(self, session: Session, log: RunLog, progress: Progress) -> None:
        self.session, self.log, self.progress = session, log, progress
        self.began, self.failed = time.time(), False
        self.path = session.run_dir / RESULT
        self.curve: list[dict[str, float]] = []
        self.errors: dict[str, list[float | None]] = {}  # update: motion error of each clip
        found = json.loads(self.path.read_text()) if session.iteration and self.path.is_file() else None
        found = session.team.share(found)
        if found is not None:
            self.curve = [row for row in found["curve"] if row["update"] <= session.iteration]
            kept = {str(row["update"]) for row in self.curve}
            self.errors = {key: row for key, row in found.get("clip_errors_px", {}).items() if key in kept}
        self.logged = {row["step"] for row in runlog.read(session.run_dir) if f"eval/{verdict.METRIC}" in row}
        self.judged = judged(session)
        self._choose_best()
        self._attempt(lambda: write_config(session))

    def begin(self) -> None:
        """Measure the weights that the run started from, unless that is done."""
        if not self._done(0):
            self.progress.phase("evaluation")
            fresh = self.session.iteration == 0
            self._record(0, *(self.session.evaluate() if fresh else self.session.evaluate_start()))

    def evaluate(self) -> None:
        """Measure the policy as it is, unless that is done; log it and keep its videos."""
        if not self._done(self.session.iteration):
            self.progress.phase("evaluation")
            self._record(self.session.iteration, *self.session.evaluate())
            if self._choose_best() == self.session.iteration:
                self.session.save()

    @property
    def complete(self) -> bool:
        """Whether the run has made its last update and measured it."""
        return any(row["update"] >= self.session.settings.updates for row in self.curve)

    def _done(self, update: int) -> bool:
        """Whether an update has been measured and, where the report shows it, its samples are there."""
        shown = update == 0 or update >= self.session.settings.updates
        samples = [self._samples(update, size).is_file() for size in range(len(self.session.truth))] if shown else []
        done = any(row["update"] == update for row in self.curve) and str(update) in self.errors and all(samples)
        return self.session.team.share(done)

    def _choose_best(self) -> int:
        """Tell the session which update's checkpoint is the best so far (0: none); see `Saving.best`."""
        metric = self.session.settings.saving.best
        rows = [row for row in self.curve if row["update"] > 0 and metric is not None and math.isfinite(row[metric])]
        if rows and metric is not None:
            self.session.best = int(max(rows, key=lambda row: BETTER[metric] * row[metric])["update"])
        return self.session.best

    def _attempt(self, action: Callable[[], None]) -> None:
        """Write something, in the first process; where that fails say so the first time and go on."""
        try:
            if self.session.team.main:
                action()
        except (OSError, SafetensorError) as error:
            if not self.failed:
                self.progress.notice(f"results cannot be written ({error}); the run goes on without them")
            self.failed = True

    def _record(self, update: int, metrics: dict[str, float], samples: list[Sample]) -> None:
        others = [row for row in self.curve if row["update"] != update]
        self.curve = sorted([*others, {"update": update, **metrics}], key=lambda row: row["update"])
        self.errors[str(update)] = [e if math.isfinite(e) else None for e in motion_errors(samples).tolist()]
        if update not in self.logged:
            self.log.log(update, {f"eval/{name}": value for name, value in metrics.items()})
        spread = metrics["motion_error_px_ci"]
        self.progress.note(
            f"evaluation after update {update}: motion error {metrics['motion_error_px']:.3f} "
            + (f"± {spread:.3f} " if math.isfinite(spread) else "")
            + f"px, aesthetic {metrics['aesthetic']:.3f}, Frechet {metrics['frechet']:.4f} "
            f"({self.session.settings.evaluation.clips} held-out clips)"
        )
        self._attempt(lambda: self._keep(samples, update))
        self._attempt(self._write)

    def finish(self) -> str:
        """Draw curves and report; return the closing words."""
        run_dir = self.session.run_dir
        if not self.complete:
            return f"stopped after update {self.session.iteration}; go on with: run_dir={run_dir} resume=true"
        self._attempt(self._draw)
        return f"{closing(self._result())}\nreport: {run_dir / 'report.html'}"

    def _draw(self) -> None:
        """Curves, videos and report of a run that is done."""
        ends = (("before", self.curve[0]), ("after", self.curve[-1]))
        sizes = range(len(self.session.truth))
        kept = [(name, [self._kept(int(row["update"]), size) for size in sizes]) for name, row in ends]
        publish(self.session, self.log, [("true clip", self.session.truth), *kept], time.time() - self.began)

    def _samples(self, update: int, size: int) -> Path:
        return Path(self.session.run_dir) / "samples" / f"{update:06d}_{size}.safetensors"

    def _kept(self, update: int, size: int) -> Sample:
        """Samples that `_keep` saved, of one frame size."""
        from safetensors.torch import load_file

        found = load_file(self._samples(update, size))
        clips = self.session.truth[size].clips.select(range(len(found["video"])))
        seen = torch.ones(found["tracks"].shape[:-1])
        # shown, not measured: what was seen and where tracking began is not kept
        tracks = Tracks(found["tracks"], seen.bool(), seen)
        return Sample(found["video"], clips, tracks, torch.zeros(len(clips)).bool(), self.session.judge)

    def _keep(self, samples: list[Sample], update: int) -> None:
        """Save the shown samples' videos and tracks, so that a report can be made from the folder alone.

        Those of the first and of the latest evaluation stay.
        """
        from safetensors.torch import save_file

        folder = self.session.run_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.safetensors"):
            if not path.name.startswith(f"{0:06d}_"):
                path.unlink()
        per_size = -(-SHOWN // len(samples))
        for i, s in enumerate(samples):
            path = self._samples(update, i)
            shown = {"video": s.video[:per_size].contiguous(), "tracks": s.tracks.xy[:per_size].contiguous()}
            save_file(shown, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)  # whole, or not there

    def _write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._result(), indent=1))
        temporary.replace(self.path)

    def _result(self) -> dict[str, Any]:
        return {
            "before": self.curve[0],
            "after": self.curve[-1],
            **self.judged,
            "curve": self.curve,
            "complete": self.complete,
            "clip_errors_px": self.errors,
            "schedule": schedule_picture(self.session),
        }


def judged(session: Session) -> dict[str, Any]:
    """How a session's policy is measured, and what true clips measure: entries of `evaluation.json`."""
    evaluation = session.settings.evaluation
    return {
        "truth": measure(session.truth, session.truth),
        "extractor": session.judge.features.name,
        "interpolator": session.judge.interpolator.name,
        "clips": evaluation.clips,
        "split": evaluation.split,
        "tracker": type(evaluation.tracker).__name__,
        "found_by": found_by(session.truth),
    }


def write_config(session: Session) -> None:
    """Write a run's config into its folder."""
    session.run_dir.mkdir(parents=True, exist_ok=True)
    (session.run_dir / "config.yaml").write_text(yaml.safe_dump(session.config, sort_keys=False))


def publish(session: Session, log: RunLog, columns: list[tuple[str, list[Sample]]], seconds: float) -> None:
    """Write curves, videos and report of a run that is done and whose `evaluation.json` is there.

    Args:
        session: of the run.
        log: shows them too.
        columns: see `draw_samples`.
        seconds: that this process took.
    """
    from runtime import curves, report

    run_dir = session.run_dir
    curves.plot(run_dir / runlog.FILE, run_dir / "curves.png")
    draw_samples(run_dir / "videos", columns)
    _write_environment(session, seconds)
    report.write(run_dir)
    log.results(run_dir)


def _write_environment(session: Session, seconds: float) -> None:
    import shlex
    import sys

    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": session.settings.seed,
        "device": session.device,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
        "versions": versions(),
    }
    (session.run_dir / "environment.json").write_text(json.dumps(facts, indent=1))


def closing(evaluation: Mapping[str, Any]) -> str:
    """What a run that is done says of itself, from its `evaluation.json`."""
    first, last, truth = evaluation["before"], evaluation["after"], evaluation["truth"]
    before, after = first["motion_error_px"], last["motion_error_px"]
    change = verdict.of(evaluation)
    judged = f"clip by clip {change.text}" if change is not None else ""
    found = " (by construction)" if evaluation["tracker"] in evaluation["found_by"] else ""
    parts = (
        f"held-out motion error {before:.3f} -> {after:.3f} px",
        verdict.relative(before, after),
        judged,
        f"true clips {truth['motion_error_px']:.3f} px{found}",
        f"aesthetic {first['aesthetic']:.3f} -> {last['aesthetic']:.3f}",
        f"Frechet {first['frechet']:.4f} -> {last['frechet']:.4f}",
    )
    return "; ".join(part for part in parts if part)


def draw_samples(folder: Path, columns: list[tuple[str, list[Sample]]], spread: bool = False) -> None:
    """Write `<n>.mp4` and a contact sheet for a few clips of every frame size: a panel per column.

    Args:
        folder: where to write.
        columns: title and samples (one entry per frame size); the first column's clips are drawn.
    """
    from runtime import videos

    sizes = len(columns[0][1])
    shown = -(-SHOWN // sizes)
    for size in range(sizes):
        clips = columns[0][1][size].clips
        few = min(shown, len(clips))
        for i, row in enumerate(range(0, len(clips), len(clips) // few if spread else 1)[:few]):
            asked = clips.trajectory.row(row)
            scale = max(1, 256 // min(asked.height, asked.width))
            panels = [videos.draw(s[size].video[row], asked, s[size].tracks.xy[row], scale) for _, s in columns]
            path = folder / f"{size * shown + i:02d}.mp4"
            videos.write_comparison(path, panels, [title for title, _ in columns], clips.prompts[row], asked.fps)
