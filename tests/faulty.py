"""Faults that tests and trials put into runs."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from algorithms.grpo import GRPO
from rewards.aesthetic import Aesthetic
from rewards.base import RewardFailed, RewardTerm

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torch import Tensor

    from data.clip import ClipBatch


@dataclass(frozen=True)
class FaultyGRPO(GRPO):
    """GRPO whose loss, or its gradient alone, is not finite in one iteration, for one prompt.

    Attributes:
        where: `loss`, `gradient` or nothing.
        iteration: in which.
        prompt: whose samples.
    """

    where: str = ""
    iteration: int = 0
    prompt: int = 0

    def loss(self, scores: Any, batch: TensorDictBase, transition: Any, initial: Any) -> Any:
        losses, metrics = super().loss(scores, batch, transition, initial)
        key = batch["key"]
        if bool(((key[:, 1] == self.iteration) & (key[:, 2] == self.prompt)).any()):
            if self.where == "loss":
                losses["objective"] = losses["objective"] * float("inf")
            elif self.where == "gradient":  # the root of 0 is 0, and its slope is infinite
                losses["objective"] = losses["objective"] + (scores["log_prob"].sum() * 0).sqrt()
        return losses, metrics


@dataclass(frozen=True)
class OneInTwo(Aesthetic):
    """The aesthetic reward, which cannot score every second sample."""

    def score(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        term = super().score(video, batch)
        term.valid[::2] = False
        return term


@dataclass(frozen=True)
class OutAtTimes(Aesthetic):
    """The aesthetic reward, which fails while a file is there.

    Attributes:
        outage: the file.
    """

    outage: str = ""

    def score(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        if Path(self.outage).exists():
            raise RewardFailed("the service does not answer")
        return super().score(video, batch)


def spoil(point: str, rank: int, iteration: int) -> None:
    """Make sessions of this process see a value that is not finite, in one process and one iteration."""
    import runtime.session as module
    from policies.codecs import VideoCodec
    from runtime.session import Session

    here = int(os.environ.get("RANK", "0")) == rank
    if point in ("latent", "log_prob"):
        sessions: list[Any] = []
        begin, collect = Session._next_start, module.RolloutCollector.collect

        def remembered(self: Any) -> Any:
            sessions[:] = [self]
            return begin(self)

        def collected(self: Any) -> Any:
            rollout = collect(self)
            if here and sessions[0].iteration == iteration:
                rollout["latents" if point == "latent" else "log_prob"][1] = float("nan")
            return rollout

        Session._next_start, module.RolloutCollector.collect = remembered, collected  # type: ignore[method-assign]
    if point == "video":
        decode = Session.decode

        def decoded(self: Any, rollout: Any) -> Any:
            real = VideoCodec.decode

            def broken(codec: Any, latents: Any) -> Any:
                video = real(codec, latents)
                if here and self.iteration == iteration:
                    video[1, 0, 2] = float("inf")
                return video

            VideoCodec.decode = broken  # type: ignore
            try:
                return decode(self, rollout)
            finally:
                VideoCodec.decode = real  # type: ignore[method-assign]

        Session.decode = decoded  # type: ignore[method-assign]
    if point == "reward":
        score = Session.score

        def scored(self: Any, rollout: Any, video: Any) -> Any:
            add = type(self.rewards).add

            def broken(composite: Any, terms: Any, group: Any = None) -> Any:
                found = add(composite, terms, group)
                if here and self.iteration == iteration:
                    found["reward"][1, 1] = float("nan")
                return found

            type(self.rewards).add = broken
            try:
                return score(self, rollout, video)
            finally:
                type(self.rewards).add = add

        Session.score = scored  # type: ignore[method-assign]


def full_disk(flag: Path) -> None:
    """While a file is there, tensors of this process find no space: half of a file is written, then it ends."""
    import safetensors.torch

    save = safetensors.torch.save_file

    def full(tensors: Any, filename: Any, *more: Any) -> None:
        if flag.exists():
            Path(filename).write_bytes(b"\0" * 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(filename))
        save(tensors, filename, *more)

    safetensors.torch.save_file = full  # type: ignore
