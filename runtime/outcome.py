"""What a run leaves behind: evaluations, videos before and after, curves, the report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from runtime.checkpoint import versions
from runtime.evaluation import Sample, measure
from runtime.plan import schedule_picture
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

    A resumed run keeps the evaluations that its folder holds, so "before" stays what it was.
    """

    def __init__(self, session: Session, log: RunLog, progress: Progress) -> None:
        self.session, self.log, self.progress = session, log, progress
        self.began = time.time()
        self.path = session.run_dir / RESULT
        self.curve: list[dict[str, float]] = []
        if session.iteration and self.path.is_file():
            self.curve = [
                row for row in json.loads(self.path.read_text())["curve"] if row["update"] <= session.iteration
            ]
        self.truth = measure(session.truth, session.truth, session.judge)
        self._write_inputs()

    def evaluate(self) -> dict[str, float]:
        """Measure the policy as it is, unless this update has been measured; log it and keep its videos."""
        update = self.session.iteration
        if self.curve and self.curve[-1]["update"] == update:
            return self.curve[-1]
        self.progress.phase("evaluation")
        metrics, samples = self.session.evaluate()
        self.curve.append({"update": update, **metrics})
        self.log.log(update, {f"eval/{name}": value for name, value in metrics.items()})
        self.progress.note(
            f"evaluation after update {update}: motion error {metrics['motion_error_px']:.3f} "
            f"± {metrics['motion_error_px_ci']:.3f} px, aesthetic {metrics['aesthetic']:.3f}, "
            f"Frechet {metrics['frechet']:.4f} ({self.session.settings.evaluation.clips} held-out clips)"
        )
        self._keep(samples, "before" if update == 0 else "after")
        self._write()
        return metrics

    def finish(self) -> str:
        """Draw curves and report; return the closing words."""
        from runtime import curves, report

        run_dir, first, last = self.session.run_dir, self.curve[0], self.curve[-1]
        if self.session.iteration < self.session.settings.updates:
            return f"stopped after update {self.session.iteration}; go on with: run_dir={run_dir} resume=true"
        curves.plot(run_dir / "metrics.jsonl", run_dir / "curves.png")
        kept = [(name, [self._kept(name, i) for i in range(len(self.session.truth))]) for name in ("before", "after")]
        draw_samples(run_dir / "videos", [("true clip", self.session.truth), *kept])
        self._write_environment()
        page = report.write(run_dir)
        gain = 100 * (1 - last["motion_error_px"] / first["motion_error_px"])
        return (
            f"held-out motion error {first['motion_error_px']:.3f} -> {last['motion_error_px']:.3f} px "
            f"({gain:+.1f} % better; true clips {self.truth['motion_error_px']:.3f}), "
            f"aesthetic {first['aesthetic']:.3f} -> {last['aesthetic']:.3f}, "
            f"Frechet {first['frechet']:.4f} -> {last['frechet']:.4f}\nreport: {page}"
        )

    def _kept(self, name: str, size: int) -> Sample:
        """Samples that `_keep` saved, of one frame size."""
        from safetensors.torch import load_file

        found = load_file(self.session.run_dir / "samples" / f"{name}_{size}.safetensors")
        clips = self.session.truth[size].clips.select(range(len(found["video"])))
        seen = torch.ones(found["tracks"].shape[:-1])
        return Sample(found["video"], clips, Tracks(found["tracks"], seen.bool(), seen))

    def _keep(self, samples: list[Sample], name: str) -> None:
        """Save the shown samples' videos and tracks, so that a report can be made from the folder alone."""
        from safetensors.torch import save_file

        folder = self.session.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        per_size = -(-SHOWN // len(samples))
        for i, s in enumerate(samples):
            save_file(
                {"video": s.video[:per_size].contiguous(), "tracks": s.tracks.xy[:per_size].contiguous()},
                folder / f"{name}_{i}.safetensors",
            )

    def _write(self) -> None:
        settings = self.session.settings
        result: dict[str, Any] = {
            "before": self.curve[0],
            "after": self.curve[-1],
            "truth": self.truth,
            "extractor": self.session.judge.features.name,
            "clips": settings.evaluation.clips,
            "split": settings.evaluation.split,
            "tracker": type(settings.evaluation.tracker).__name__,
            "curve": self.curve,
            "schedule": schedule_picture(self.session),
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1))
        temporary.replace(self.path)

    def _write_inputs(self) -> None:
        run_dir: Path = self.session.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(self.session.config, sort_keys=False))

    def _write_environment(self) -> None:
        import platform
        import shlex
        import sys

        facts = {
            "command": shlex.join(["python", *sys.argv]),
            "seed": self.session.settings.seed,
            "device": self.session.device,
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "seconds": round(time.time() - self.began),
            "versions": versions(),
        }
        (self.session.run_dir / "environment.json").write_text(json.dumps(facts, indent=1))


def draw_samples(folder: Path, columns: list[tuple[str, list[Sample]]]) -> None:
    """Write `<n>.mp4` and a contact sheet for the first clips of every frame size: a panel per column.

    Args:
        folder: where to write.
        columns: title and samples (one entry per frame size); the first column's clips are drawn.
    """
    from runtime import videos

    sizes = len(columns[0][1])
    shown = -(-SHOWN // sizes)
    for size in range(sizes):
        clips = columns[0][1][size].clips
        for row in range(min(shown, len(clips))):
            asked = clips.trajectory.row(row)
            scale = max(1, 256 // min(asked.height, asked.width))
            panels = [videos.draw(s[size].video[row], asked, s[size].tracks.xy[row], scale) for _, s in columns]
            path = folder / f"{size * shown + row:02d}.mp4"
            videos.write_comparison(path, panels, [title for title, _ in columns], clips.prompts[row], asked.fps)
