"""A reward computed by another process, over HTTP: reward models with conflicting dependencies run in their own
environment. `experiments/serve.py` serves any local reward.

Requests and answers are safetensors: a JSON header and raw bytes, nothing that could run code.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rewards.base import RewardContext, RewardFailed, RewardTerm, are_metrics, check_weight, latent_frames

if TYPE_CHECKING:
    from torch import Tensor

    from data.clip import ClipBatch

FORMAT = "ardrag-reward-1"
TEXT = "text"
# Bytes of an answer beside its numbers: header and metrics.
SPARE = 2**16


@dataclass
class Breaker:
    """Stops asking a service that keeps failing.

    Attributes:
        after: failed calls in a row that open it.
        cooldown: seconds for which it then stays open; the next call is a trial.
    """

    after: int
    cooldown: float
    failures: int = 0
    opened: float = field(default=-math.inf)

    def check(self) -> None:
        """Raise `RewardFailed` while open."""
        left = self.opened + self.cooldown - time.monotonic()
        if self.failures >= self.after and left > 0:
            raise RewardFailed(f"not asked: {self.failures} calls in a row failed; next trial in {left:.0f} s")

    def note(self, failed: bool) -> None:
        """Remember how a call ended."""
        self.failures = self.failures + 1 if failed else 0
        self.opened = time.monotonic() if failed else -math.inf


@dataclass(frozen=True)
class Remote:
    """What a service at `url` says. Every call has a deadline; failed ones are repeated after growing, random pauses,
    and a service that keeps failing is left alone for a while. A reward that fails is never 0: its samples are invalid.

    Attributes:
        weight: factor in the weighted sum.
        url: of the service, such as http://127.0.0.1:8000.
        deadline: seconds for one call, all repetitions included.
        retries: repetitions of a failed call.
        breaker: failed calls in a row after which the service is left alone.
        cooldown: seconds for which it is left alone.
    """

    weight: float = 1.0
    url: str = "http://127.0.0.1:8000"
    deadline: float = 60.0
    retries: int = 3
    breaker: int = 3
    cooldown: float = 60.0

    def __post_init__(self) -> None:
        check_weight("remote", self.weight)
        if not _is_address(self.url):
            raise ValueError(f"reward.remote.url must be an address such as http://127.0.0.1:8000, got {self.url!r}")
        for name in ("deadline", "cooldown"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"reward.remote.{name} must be positive and finite, got {getattr(self, name)}")
        if self.retries < 0 or self.breaker < 1:
            raise ValueError("reward.remote.retries must not be negative, and breaker at least 1")
        object.__setattr__(self, "_breaker", Breaker(self.breaker, self.cooldown))

    def prepare(self, context: RewardContext) -> None:
        """Check the service's health: it must score a known clip, and the same twice, but for rounding.

        Raises:
            ValueError: it does not answer, or not as a reward service does, or cannot score.
        """
        clip, batch = known_clip()
        try:
            first, second = (self._ask(clip, batch) for _ in range(2))
        except RewardFailed as error:
            raise ValueError(f"reward.remote.url={self.url}: {error}; start it with experiments/serve.py") from error
        if not (first.valid.all() and first.value.isfinite().all()):
            raise ValueError(f"reward.remote.url={self.url}: does not score a known clip; its own messages say why")
        if not first.value.isclose(second.value, rtol=1e-3, atol=1e-4).all():
            raise ValueError(f"reward.remote.url={self.url}: scores one clip differently when asked twice")

    def score(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        """See `Reward.score`.

        Raises:
            RewardFailed: no answer within the deadline, or a wrong one.
        """
        breaker: Breaker = self._breaker  # type: ignore[attr-defined]
        breaker.check()
        try:
            term = self._ask(video, batch)
        except RewardFailed:
            breaker.note(failed=True)
            raise
        breaker.note(failed=False)
        device = video.device
        return RewardTerm(term.value.to(device), term.valid.to(device), term.metrics)

    def _ask(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        import httpx
        import tenacity

        body, ends = request(video, batch), time.monotonic() + self.deadline
        shape = (len(video), latent_frames(video.shape[2]))

        largest = SPARE + 16 * math.prod(shape)

        def call() -> bytes:
            return within(ends, lambda: post(f"{self.url.rstrip('/')}/score", body, ends, largest))

        again = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.retries + 1) | tenacity.stop_before_delay(self.deadline),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=self.deadline / 4),
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )
        try:
            return read_answer(again(call), *shape)
        except httpx.HTTPStatusError as error:
            line = " ".join(error.response.text.split())[:200]
            raise RewardFailed(f"the service answers {error.response.status_code}: {line}") from error
        except httpx.HTTPError as error:
            raise RewardFailed(f"no answer ({type(error).__name__}: {error}; deadline {self.deadline:g} s)") from error
        except ValueError as error:
            raise RewardFailed(f"a wrong answer: {error}") from error


def _is_address(url: str) -> bool:
    """Whether `url` names a host, and how to reach it over HTTP."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        host = parts.hostname or " "
        return url.isprintable() and parts.scheme in ("http", "https") and " " not in host and parts.port != 0
    except ValueError:
        return False


def _may_pass(error: BaseException) -> bool:
    """Whether a repetition may succeed: connections, time, too many requests, what the server calls its own fault."""
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(error, httpx.TransportError)


def post(url: str, body: bytes, ends: float, largest: int) -> bytes:
    """The answer to a POST, read until `ends` on the monotonic clock.

    Raises:
        httpx.HTTPError: no answer, or one that says that it failed.
        ValueError: it has more than `largest` bytes; the rest is not read.
    """
    import httpx

    found = bytearray()
    with httpx.stream("POST", url, content=body, timeout=max(1e-3, ends - time.monotonic())) as answer:
        for part in answer.iter_bytes():
            found += part
            if len(found) > largest:
                raise ValueError(f"more than {largest} bytes")
            if time.monotonic() > ends:
                raise httpx.ReadTimeout("out of time")
    whole = httpx.Response(answer.status_code, content=bytes(found), request=answer.request)
    return whole.raise_for_status().content


def within(ends: float, call: Callable[[], bytes]) -> bytes:
    """What `call` returns or raises, but no later than `ends` on the monotonic clock; what comes later is never seen.

    A timeout of httpx is one of a single read: a service that trickles would renew it for ever.

    Raises:
        httpx.ReadTimeout: too late.
    """
    import httpx

    done: queue.SimpleQueue[tuple[bytes, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:  # handed on to the caller's thread
            done.put((b"", error))

    threading.Thread(target=work, daemon=True).start()
    try:
        found, error = done.get(timeout=max(0.0, ends - time.monotonic()))
    except queue.Empty:
        raise httpx.ReadTimeout("out of time") from None
    if error is not None:
        raise error
    return found


def request(video: Tensor, batch: ClipBatch) -> bytes:
    """A request: the generated videos, the true first frames, what was asked for."""
    import torch
    from safetensors.torch import save

    asked = batch.trajectory
    tensors = {
        "video": video,
        "first": batch.video[:, :, :1],
        "xy": asked.xy,
        "intensity": asked.intensity,
        "presence": asked.presence,
    }
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    tensors["video"] = tensors["video"].to(torch.float16)  # finer than pixels, half the bytes
    text = {"prompts": batch.prompts, "names": batch.names, "found_by": batch.found_by, "fps": asked.fps}
    return save(tensors, {"format": FORMAT, TEXT: json.dumps(text)})


def read_request(body: bytes) -> tuple[Tensor, ClipBatch]:
    """The videos, and what was asked for; of the true clips frame 0 alone, repeated.

    Raises:
        ValueError: not a request of this format.
    """
    from data.clip import ClipBatch
    from tracking.trajectory import Trajectory

    tensors, text = _read(body, ("video", "first", "xy", "intensity", "presence"))
    video = tensors["video"].float()
    _check_batch({name: tuple(tensor.shape) for name, tensor in tensors.items()}, text)
    presence = tensors["presence"].bool()
    trajectory = Trajectory(
        tensors["xy"], tensors["intensity"], presence, video.shape[3], video.shape[4], float(text["fps"])
    )
    first = tensors["first"].float().expand(-1, -1, video.shape[2], -1, -1)
    return video, ClipBatch(first, trajectory, text["prompts"], presence, text["names"], text["found_by"])


def _check_batch(shapes: dict[str, tuple[int, ...]], text: dict[str, Any]) -> None:
    """Raise ValueError unless a request's parts belong to one batch of clips."""
    if len(shapes["video"]) != 5 or len(shapes["xy"]) != 4:
        raise ValueError(f"video {shapes['video']} and xy {shapes['xy']} are not a batch of clips")
    (batch, _, frames, height, width), tracks = shapes["video"], shapes["xy"][1]
    positions = (batch, tracks, frames)
    wanted = {
        "video": (batch, 3, frames, height, width),
        "first": (batch, 3, 1, height, width),
        "xy": (*positions, 2),
        "intensity": positions,
        "presence": positions,
    }
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} is {shapes[name]}, expected {shape} beside a video {shapes['video']}")
    for name in ("prompts", "names", "found_by"):
        texts = text.get(name)
        if not isinstance(texts, list) or len(texts) != batch or not all(isinstance(each, str) for each in texts):
            raise ValueError(f"{name} must be {batch} texts")
    fps = text.get("fps")
    if not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, got {fps!r}")


def answer(term: RewardTerm) -> bytes:
    """An answer: value, validity, metrics."""
    from safetensors.torch import save

    tensors = {"value": term.value.detach().float().cpu().contiguous(), "valid": term.valid.cpu().contiguous()}
    metrics = {name: value for name, value in term.metrics.items() if math.isfinite(value)}
    return save(tensors, {"format": FORMAT, TEXT: json.dumps({"metrics": metrics})})


def read_answer(body: bytes, samples: int, frames: int) -> RewardTerm:
    """Read an answer to a request of `samples` clips of `frames` latent frames.

    Raises:
        ValueError: not an answer of this format, or of other sizes.
    """
    tensors, text = _read(body, ("value", "valid"))
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if shapes != {(samples, frames)}:
        raise ValueError(f"values of shape {sorted(shapes)}, expected ({samples}, {frames})")
    if not are_metrics(text.get("metrics")):
        raise ValueError("its metrics are not numbers by name")
    return RewardTerm(tensors["value"].float(), tensors["valid"].bool(), text["metrics"])


def known_clip() -> tuple[Tensor, ClipBatch]:
    """A small clip, always the same: a bright square that moves to the right, and the path it takes."""
    import torch

    from data.clip import ClipBatch
    from tracking.trajectory import Trajectory

    video = torch.full((1, 3, 5, 32, 32), -0.5)
    for t in range(5):
        video[:, :, t, 12:20, 8 + 2 * t : 16 + 2 * t] = torch.linspace(-1, 1, 64).view(8, 8)
    xy = torch.stack([11.5 + 2.0 * torch.arange(5), torch.full((5,), 15.5)], -1)[None, None]
    here = torch.ones(1, 1, 5, dtype=torch.bool)
    return video, ClipBatch(video, Trajectory(xy, here.float(), here, 32, 32, 8.0), ["a square"], here, ["known"], [""])


def _read(body: bytes, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        size = int.from_bytes(body[:8], "little")
        note = json.loads(body[8 : 8 + size])["__metadata__"]
        tensors, text = load(body), json.loads(note[TEXT])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a message of {FORMAT} ({type(error).__name__})") from error
    if note.get("format") != FORMAT or set(tensors) != set(names) or not isinstance(text, dict):
        raise ValueError(f"not a message of {FORMAT}: {note.get('format')}, {', '.join(sorted(tensors))}")
    return tensors, text
