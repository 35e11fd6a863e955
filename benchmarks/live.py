"""Live generation: how long until the first frame, how many frames a second, how soon a control is seen."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.policy import Rows, clip
from data.clip import ClipBatch
from envs.control import heatmap
from policies.stream import Episode, Stream, VideoStream
from runtime.session import Session
from runtime.timing import PhaseTimer

PARTS = ("text", "image", "control", "denoise", "decode")
# What the full size aims at on a GPU: seconds to the first frame, pixel frames per second.
FIRST_GOAL, RATE_GOAL = 0.15, 30.0


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile, interpolated."""
    points = torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)
    found = torch.tensor(list(values), dtype=torch.float64).quantile(points)
    return dict(zip(("p50", "p95", "p99"), found.tolist(), strict=True))


def measure(session: Session, samples: int, compile: str = "none") -> dict[str, Rows]:
    """Both measurements by title, with the full VAE and, where the model has one, the tiny VAE."""
    found: dict[str, Rows] = {}
    for tiny in (False, True) if session.episodes.networks.tiny else (False,):
        decoder = ", tiny VAE" if tiny else ""
        found[f"first frame, batch 1, seconds{decoder}"] = first_frame(session, samples, compile, tiny)
        found[f"steady generation, batch 1{decoder}"] = steady(session, samples, compile, tiny)
    return found


def begin(session: Session, source: ClipBatch, timer: PhaseTimer, compile: str, tiny: bool) -> VideoStream:
    """A live stream of one clip, decoded by the full or the tiny VAE; it times its preparation (`text`, `image`)."""
    networks, r = session.episodes.networks, session.settings.rollout
    video, device = networks.video, session.device
    with timer.phase("text"):
        text = networks.text.encode(source.prompts)
    with timer.phase("image"):  # the reference is one pixel frame: no other is encoded
        reference = video.encode(source.video[:, :, :1].to(device))[:, 0]
        image = networks.image_tokens(source, device)
    with timer.phase("denoise"):
        episode = Episode(text, ((session.settings.seed, 0, 0, 0),), image)
        shape = video.latent_shape(source.trajectory.height, source.trajectory.width)
        rule = session.actor.causality
        stream = Stream(networks.transformer, rule, list(r.sigmas), episode, shape, compile=compile)
    decoder = networks.tiny.decode_stream() if tiny and networks.tiny else None
    return VideoStream(stream, video, reference, decoder)


def drawn(session: Session, source: ClipBatch) -> list[Tensor]:
    """The drawn control of the first chunk and of any later one (the path then rests), on the device."""
    networks, chunk = session.episodes.networks, session.settings.rollout.chunk
    whole = heatmap(source.trajectory, networks.video.stride, networks.control).to(session.device)
    first = whole[:, :, : 4 * chunk - 3]
    return [first, first[:, :, -1:].repeat(1, 1, 4 * chunk, 1, 1)]


@torch.no_grad()
def first_frame(session: Session, repeats: int, compile: str = "none", tiny: bool = False) -> Rows:
    """Seconds from image, prompt and path to the first pixel frame of one sample, by part."""
    timer, source, found = PhaseTimer(session.synchronize), clip(session), []
    control = drawn(session, source)[0]
    for _ in range(repeats + 1):
        timer.reset()
        stream = begin(session, source, timer, compile, tiny)
        with timer.phase("control"):
            condition = stream.condition(control)
        with timer.phase("denoise"):
            latents = stream.stream.step(condition)
        with timer.phase("decode"):
            stream.decode(latents)
        found.append({name: seconds for name, seconds in timer.seconds().items() if name in PARTS})
    rows: Rows = [{"part": name, **percentiles([row[name] for row in found[1:]])} for name in PARTS]
    without = [sum(row.values()) - row["text"] for row in found[1:]]
    whole = {"part": "until the first frame, prompt aside", **percentiles(without)}
    return [*rows, whole | {"samples": len(without), "GPU aim": FIRST_GOAL}]


@torch.no_grad()
def steady(session: Session, frames: int, compile: str = "none", tiny: bool = False) -> Rows:
    """Once the window is full: pixel frames per second without waiting, and seconds from a control to its frames."""
    source, quiet = clip(session), PhaseTimer()
    pieces = drawn(session, source)
    rule = session.actor.causality
    warm = (rule.window + rule.sink) // rule.chunk + 2
    stream = begin(session, source, quiet, compile, tiny)
    for i in range(warm):
        stream.step(pieces[min(i, 1)])
    last = pieces[1]
    session.synchronize()
    began = time.perf_counter()
    pending = [stream.submit(last) for _ in range(frames)]
    for made in pending:
        made.result()
    session.synchronize()
    seconds = time.perf_counter() - began
    latencies = []
    for _ in range(frames):
        began = time.perf_counter()
        stream.step(last)
        session.synchronize()
        latencies.append(time.perf_counter() - began)
    rate = 4 * rule.chunk * frames / seconds
    return [
        {
            "chunks": frames,
            "seconds a chunk": seconds / frames,
            "pixel frames per s": rate,
            "GPU aim": RATE_GOAL,
            **{f"control to frame {name}, s": value for name, value in percentiles(latencies).items()},
            "mean, s": statistics.mean(latencies),
        }
    ]


def facts(session: Session) -> dict[str, Any]:
    """What the numbers of live generation depend on, beside the conditions of all."""
    model = session.settings.model
    networks = session.episodes.networks
    return {
        "transformer": str(networks.transformer.compute_dtype).removeprefix("torch."),
        "VAE": f"{networks.video.vae.dtype}, base width {networks.video.vae.config.base_dim}",
        "tiny VAE": model.tiny_vae if networks.tiny else "none",
        "weights": "random" if getattr(model, "random", False) else "loaded",
    }
