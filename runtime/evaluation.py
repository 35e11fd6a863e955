"""Measure a policy on clips that training never sees: fixed noise, no stochastic step, judges that do not reward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.clip import ClipBatch
from envs.transitions import gaussian_kl
from metrics.anchor import anchored
from metrics.features import ClipFeatures, FeatureExtractor
from metrics.frechet import frechet_distance
from metrics.interpolators import Interpolator, Linear
from metrics.intervals import of_mean
from metrics.motion import by_latent_frame, counted, drag_score, endpoint_error, per_clip
from metrics.smoothness import smoothness
from policies.actor import Actor
from policies.sampler import generate, sample_rollout
from rewards.aesthetic import Aesthetic
from rewards.base import RewardContext
from rewards.motion import PROFILES
from tracking.trackers import Tracker, Tracks, make_ready

if TYPE_CHECKING:
    from runtime.episodes import Episodes

# Part of every evaluation's identity: all runs, whatever their seed, are measured on the same noise.
EVALUATION_SEED = 2_000_000_011
# Clips that a tracker takes at a time: at full size a handful fills a device.
TRACKED = 4


class Judge:
    """What measures: a tracker and a vision tower that took no part in the reward.

    Args:
        tracker: finds the motion.
        scorer: of looks; prepared here.
        assets: folder of the model.
        device: torch device.
        extractor: features of Frechet distances; None takes the scorer's tower.
        interpolator: of smoothness; None takes the mean of both neighbours.
    """

    def __init__(
        self,
        tracker: Tracker,
        scorer: Aesthetic,
        assets: Path,
        device: str,
        extractor: FeatureExtractor | None = None,
        interpolator: Interpolator | None = None,
    ) -> None:
        make_ready(tracker, device)
        self.tracker, self.device, self.assets = tracker, device, assets
        self.features = extractor or ClipFeatures(model=scorer.model, label=f"tiny-clip:{scorer.model}")
        self.features.prepare(assets, device)
        self.interpolator: Interpolator = interpolator or Linear()
        self.interpolator.prepare(assets, device)
        self.aesthetic = scorer
        self.aesthetic.prepare(RewardContext(device, tracker, assets))

    def track(self, video: Tensor, queries: Tensor) -> Tracks:
        """Follow points on the judge's device, a few clips at a time; see `Tracker.track`."""
        parts = [
            self.tracker.track(clips.to(self.device), points.to(self.device))
            for clips, points in zip(video.split(TRACKED), queries.split(TRACKED), strict=True)
        ]
        columns = [(part.xy, part.visible, part.confidence) for part in parts]
        return Tracks(*(torch.cat(column).to(video.device) for column in zip(*columns, strict=True)))


@dataclass(frozen=True)
class Sample:
    """Videos `[B, 3, T, H, W]` generated for clips, and where the judge found the touched points; from the reference
    image on where frame 0 is `foreign [B]` bool (`metrics.anchor`). What else the judge says is worked out once, when
    it is asked for.
    """

    video: Tensor
    clips: ClipBatch
    tracks: Tracks
    foreign: Tensor
    judge: Judge

    @cached_property
    def looks(self) -> Tensor:
        """Aesthetic scores `[B, M - 1]` of the latent frames after the first; NaN where one could not be scored."""
        term = self.judge.aesthetic.score(self.video, self.clips)
        return term.value.where(term.valid, torch.nan)[:, 1:]

    @cached_property
    def smoothness(self) -> Tensor:
        """VBench's motion smoothness `[B]`."""
        return smoothness(self.video, self.judge.interpolator)

    @cached_property
    def frame_features(self) -> Tensor:
        """Vectors `[B, M - 1, D]` of the last pixel frame of each latent frame after the first."""
        return self.judge.features.frames(self.video[:, :, 4::4])

    @cached_property
    def video_features(self) -> Tensor:
        """Vectors `[B, D']`."""
        return self.judge.features.videos(self.video)


def sample(
    actor: Actor,
    episodes: Episodes,
    clips: list[ClipBatch],
    judge: Judge,
    size: int,
    on_step: Callable[[int, int], None] = lambda frame, frames: None,
) -> list[Sample]:
    """Generate a video for each clip, `size` at a time, and follow its touched points; `episodes` decides steps and
    schedule.
    """
    found, first = [], 0
    for batch in clips:
        videos = []
        for part in batch.split(size):
            state, _ = episodes.begin(part, 1, EVALUATION_SEED, 0, first_prompt=first)
            first += len(part)
            chain = generate(actor.transformer, actor.transition, actor.causality, state, on_step=on_step)
            videos.append(episodes.networks.video.decode(chain.latents[:, :, -1]).cpu())
        found.append(follow(torch.cat(videos), batch, judge))
    return found


@torch.no_grad()
def divergence(actor: Actor, initial: Actor, episodes: Episodes, clips: list[ClipBatch], size: int) -> float:
    """KL of a policy to another one, nats per latent value: mean over the stochastic steps of its own clips, in closed
    form between the kernels' Gaussians, `size` clips at a time. nan where the schedule leaves no stochastic step.
    """
    total, count, first = 0.0, 0.0, 0
    for batch in clips:
        for part in batch.split(size):
            state, _ = episodes.begin(part, 1, EVALUATION_SEED, 1, first_prompt=first)
            first += len(part)
            rollout = sample_rollout(actor.transformer, actor.transition, actor.causality, state)
            now, then = actor.evaluate(rollout), initial.evaluate(rollout)
            kl = gaussian_kl(now["mean"], then["mean"], now["std"][..., None, None, None])
            total, count = total + float(kl.sum()), count + float(rollout["stochastic"].sum())
    return total / count if count else math.nan


def follow(video: Tensor, clips: ClipBatch, judge: Judge) -> Sample:
    """Track the touched points of `clips` through `video`."""
    shown, foreign = anchored(video, clips.video[:, :, :1].to(video), clips.trajectory, judge.tracker)
    return Sample(video, clips, judge.track(shown, clips.trajectory.xy[:, :, 0]), foreign, judge)


def in_sight(clips: ClipBatch) -> Tensor:
    """`[B, K, T]` bool: the touched point has been visible in the true clip from the first frame on.

    Behind another sprite nobody can say where it is, and after that a tracker that lost it follows something else:
    both would measure the tracker.
    """
    return clips.visible.int().cummin(dim=-1).values.bool()


def motion_errors(samples: Sequence[Sample], seen: bool = False) -> Tensor:
    """Motion error of each clip in px, `[clips]`, in the order of the clips; NaN where no position counts.

    Over asked positions in sight, and with `seen` (EPE) over those of them that the tracker saw.
    """
    return torch.cat(
        [
            per_clip(
                endpoint_error(s.clips.trajectory, s.tracks),
                counted(s.clips.trajectory, s.tracks if seen else None, in_sight(s.clips)),
            )
            for s in samples
        ]
    )


def position_totals(samples: Sequence[Sample]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of the metrics that are means over positions: each clip's total, and how many of its positions count, `[clips]`.

    The metric of a set is the quotient of the sums, so a clip weighs as much as it has asked positions in sight:
    `motion_visible` (share that the tracker saw) and `motion_consistency` (Eq. 16 at the paper's scale, 5 at most, 0
    where the tracker lost the point).
    """
    found: dict[str, list[Tensor]] = {"motion_visible": [], "motion_consistency": []}
    counts = []
    for s in samples:
        asked = counted(s.clips.trajectory, reference=in_sight(s.clips))
        seen = s.tracks.visible.double()
        score = drag_score(s.clips.trajectory, s.tracks.xy, *PROFILES["paper"]) * seen
        counts.append(asked.double().sum((1, 2)))
        for name, value in (("motion_visible", seen), ("motion_consistency", score)):
            found[name].append(value.where(asked, 0).sum((1, 2)))
    return {name: (torch.cat(totals), torch.cat(counts)) for name, totals in found.items()}


def features(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Vectors of each clip: `[clips, M - 1, D]`, one per latent frame after the first, and `[clips, 1, D']`."""
    frames = torch.cat([s.frame_features for s in samples])
    return frames, torch.cat([s.video_features for s in samples])[:, None]


def error_by_frame(samples: list[Sample]) -> list[float]:
    """Motion error in px at each latent frame after the first, over all clips."""
    errors = torch.cat([endpoint_error(s.clips.trajectory, s.tracks) for s in samples])
    asked = torch.cat([counted(s.clips.trajectory, reference=in_sight(s.clips)) for s in samples])
    return [float(value) for value in by_latent_frame(errors, asked)]


def found_by(samples: list[Sample]) -> dict[str, int]:
    """Trackers that found asked paths, and for how many clips; empty where all were given."""
    return dict(Counter(name for s in samples for name in s.clips.found_by if name))


def measure(samples: list[Sample], truth: list[Sample]) -> dict[str, float]:
    """Metrics over all samples.

    Returns:
        `motion_error_px` (mean over clips of the distance between asked and tracked path where the point is in sight)
        with `motion_error_px_ci` (half-width of its 95 % interval over clips), `motion_error_px_median` (of the clips),
        `epe_px` (the same mean over what the tracker saw), `motion_visible` and `motion_consistency` (see
        `position_totals`), `foreign` (share of clips that were followed from the reference image), `smoothness`
        (VBench's, with the judge's interpolator), `aesthetic` (judge's scorer), `frechet` (frames) and `frechet_video`,
        both to the true clips.
    """
    scores = torch.cat([s.looks.flatten() for s in samples])
    error = motion_errors(samples)
    error = error[error.isfinite()]
    frames, videos = zip(features(samples), features(truth), strict=True)
    return {
        "motion_error_px": float(error.mean()),
        "motion_error_px_ci": of_mean(error.tolist()).half,
        "motion_error_px_median": float(error.quantile(0.5)) if len(error) else math.nan,
        "epe_px": float(motion_errors(samples, seen=True).nanmean()),
        **{name: float(total.sum() / count.sum()) for name, (total, count) in position_totals(samples).items()},
        "foreign": float(torch.cat([s.foreign for s in samples]).double().mean()),
        "smoothness": float(torch.cat([s.smoothness for s in samples]).mean()),
        "aesthetic": float(scores.nanmean()),
        "frechet": frechet_distance(*(side.flatten(0, 1) for side in frames)),
        "frechet_video": frechet_distance(*(side.flatten(0, 1) for side in videos)),
    }
