"""What `evaluate.py` says beyond means: every clip, intervals over clips, and how fast the policy is."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metrics.features import ClipFeatures, tower
from metrics.frechet import frechet_distance
from metrics.intervals import Estimate, jackknife, of_mean
from policies.sampler import generate
from runtime.checkpoint import sha256
from runtime.evaluation import EVALUATION_SEED, Judge, Sample, features, motion_errors, position_totals

if TYPE_CHECKING:
    from policies.actor import Actor
    from runtime.episodes import Episodes

DISTANCES = ("frechet", "frechet_video")


def by_clip(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Metrics of each clip, in the order of the clips; NaN where no asked position is in sight.

    `motion_error_px` (ObjMC: every asked position, lost points where the tracker guesses them), `epe_px` (only what
    the tracker saw), `motion_visible` (the share it saw), `motion_consistency`, `smoothness`, `aesthetic`.
    """
    found = {name: [total / count] for name, (total, count) in position_totals(samples).items()}
    found |= {"motion_error_px": [motion_errors(samples)], "epe_px": [motion_errors(samples, seen=True)]}
    found["smoothness"] = [s.smoothness for s in samples]
    found["aesthetic"] = [s.looks.nanmean(1) for s in samples]
    return {name: torch.cat(parts).tolist() for name, parts in found.items()}


def intervals(
    values: dict[str, list[float]], samples: Sequence[Sample], truth: Sequence[Sample]
) -> dict[str, dict[str, float]]:
    """Estimate and half-width of its 95 % interval for every metric of `by_clip` and both Frechet distances.

    Estimates are those of `measure`: means of clips, but quotients over all positions where it has these, whose
    interval is a jackknife's as that of distances, for clips weigh differently.
    """
    found: dict[str, Estimate] = {name: of_mean(column) for name, column in values.items()}
    for name, (total, count) in position_totals(samples).items():
        total, count = total[count > 0], count[count > 0]
        found[name] = replace(jackknife(len(count), _quotient(total, count)), over="positions")
    sides = [features(side) for side in (samples, truth)]
    clips = len(sides[0][0])
    for i, name in enumerate(DISTANCES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few clips: `measure` has said it
            found[name] = jackknife(clips, _distance(sides[0][i], sides[1][i]))
    return {name: asdict(estimate) for name, estimate in found.items()}


def _quotient(total: Tensor, count: Tensor) -> Callable[[list[int]], float]:
    return lambda rows: float(total[rows].sum() / count[rows].sum())


def _distance(one: Tensor, other: Tensor) -> Callable[[list[int]], float]:
    return lambda rows: frechet_distance(one[rows].flatten(0, 1), other[rows].flatten(0, 1))


def judging_weights(judge: Judge) -> dict[str, str]:
    """Short hashes of the networks that judge: of the scorer's tower and head, and of the extractor's tower.

    Two networks may have one name, as the scorers of two model folders do.
    """
    assets, found = judge.assets, {}
    towers = {"scorer": tower(assets, judge.aesthetic.model)}
    if isinstance(judge.features, ClipFeatures):  # others have a hash in their names
        towers["extractor"] = tower(assets, judge.features.model)
    for role, folder in towers.items():
        files = [folder / "model.safetensors", *([judge.aesthetic.head_file(assets)] if role == "scorer" else [])]
        found[role] = hashlib.sha256(" ".join(map(sha256, files)).encode()).hexdigest()[:12]
    return found


def speed(actor: Actor, episodes: Episodes, samples: Sequence[Sample], repeats: int = 3) -> dict[str, Any]:
    """How fast one clip comes, medians over `repeats` after a warm-up.

    Returns:
        `latency_s`: seconds from image, path and prompt to the first pixel frame; with chunks of k frames, all of them
        are denoised before it. `frames_per_s`: pixel frames per second after the first chunk, decoding included (of
        the whole clip where one chunk is all of it). `seconds`: the whole clip. `threads`, `device`, and `load` of the
        machine as it was begun: above `cores` the numbers are not the policy's.
    """
    load = os.getloadavg()[0]
    clip = samples[0].clips.select([0])
    runs = [_timed(actor, episodes, clip) for _ in range(repeats + 1)][1:]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    place = {"threads": torch.get_num_threads(), "device": episodes.device, "cores": os.cpu_count(), "load": load}
    return {**medians, **place}


@torch.no_grad()
def _timed(actor: Actor, episodes: Episodes, clip: Any) -> dict[str, float]:
    marks: list[float] = []

    def clock() -> float:
        if episodes.device.startswith("cuda"):
            torch.cuda.synchronize(episodes.device)
        return time.perf_counter()

    began = clock()
    state, _ = episodes.begin(clip, 1, EVALUATION_SEED, 0)
    frames, steps = state["stochastic"].shape[1:]
    chain = generate(
        actor.transformer, actor.transition, actor.causality, state, on_step=lambda *_: marks.append(clock())
    )
    latents, done = chain.latents[:, :, -1], clock()
    first_chunk = marks[steps - 1]
    stream = episodes.networks.video.decode_stream()
    shown = stream(latents[:, 0]).shape[2]
    one = clock()
    for m in range(1, frames):
        shown += stream(latents[:, m]).shape[2]
    whole = clock()
    chunk = min(actor.causality.chunk, frames)
    early = 1 + 4 * (chunk - 1)
    # Decoding is spread evenly over latent frames after the first.
    decoding = (whole - one) * (frames - chunk) / max(1, frames - 1)
    rest = (done - first_chunk) + decoding
    steady = (shown - early) / rest if chunk < frames else shown / (whole - began)
    return {"latency_s": first_chunk - began + one - done, "frames_per_s": steady, "seconds": whole - began}
