"""Seconds per phase of an iteration of the real loop."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import Context, of_update
from benchmarks.memory import PeakTimer, matmul_rate, nominal_rate
from experiments.train import iterate
from runtime.alarms import Watch
from runtime.progress import Progress
from runtime.session import Session

REST_GOAL = 0.10
# Of the full size on a GPU.
FLOP_GOAL = 0.40


def utilisation(session: Session, seconds: float, peak_tflops: float | None = None) -> dict[str, Any]:
    """FLOP of an update (see `benchmarks.flops`) and the share of the device's peak at which they were done.

    The peak is what is given, or the maker's, or else the rate of a large matrix product on this device.
    """
    network: Any = session.episodes.networks.transformer
    settings, device = session.settings, session.device
    _, height, width = network.config.patch_size
    size = session.episodes.networks.video.latent_shape(*settings.world.buckets[0])
    tokens = size[1] // height * (size[2] // width)
    r, rule = settings.rollout, session.actor.causality
    image = 257 if network.config.image_dim and network.image_frames != "none" else 0
    seeing = image and (r.frames if network.image_frames == "all" else 1)
    context = Context(settings.model.text_length, image, seeing)
    adapters = settings.adaptation.kind == "lora"
    # One scored step a frame, and every sample once an epoch: what the default schedule and GRPO do.
    samples = r.prompts * r.group_size * settings.algorithm.epochs
    work = samples * of_update(network.config, rule, r.frames, tokens, context, adapters)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    nominal = peak_tflops * 1e12 if peak_tflops else nominal_rate(name, network.compute_dtype)
    measured = matmul_rate(device, network.compute_dtype)
    found = {"TFLOP": work / 1e12, "share of a matrix product's rate": work / seconds / measured}
    return found | ({"share of the peak": work / seconds / nominal, "aim": FLOP_GOAL} if nominal else {})


def phases(session: Session, iterations: int, peak_tflops: float | None = None) -> list[dict[str, Any]]:
    """Median seconds of each phase over `iterations` updates after a warm-up, its peak memory, FLOPs of the update.

    `rest` is what no phase covers: logging, the progress display and the loop itself. Evaluation and
    checkpoints are not part of an iteration.
    """
    timer, rows = PeakTimer(session.device), []
    with tempfile.TemporaryDirectory() as folder, Progress(iterations + 1) as progress:
        log = session.settings.logger.open(Path(folder), session.config)
        for _ in range(iterations + 1):
            iterate(session, timer, log, progress, Watch(session.settings.alarms))
            rows.append(timer.seconds())
        log.close()
    median = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    whole = sum(median.values())
    table: list[dict[str, Any]] = [
        {"phase": name, "seconds": value, "share": value / whole, "peak GB": timer.peaks.get(name, "")}
        for name, value in median.items()
    ]
    update = next(row for row in table if row["phase"] == "update")
    update |= utilisation(session, update["seconds"], peak_tflops)
    # `PhaseTimer` puts the rest last.
    table[-1] |= {"goal": f"at most {REST_GOAL:.0%}", "met": table[-1]["share"] <= REST_GOAL}
    return table
