"""Clips and batches of clips, the currency of every world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from tracking.trajectory import Trajectory

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """One clip with its control.

    Attributes:
        video: `[3, T, H, W]` in [-1, 1].
        trajectory: the asked-for tracks, `[K, T]`.
        prompt: text.
        visible: `[K, T]` bool, the touched point can be seen in the true clip (all True where unknown).
        name: unique in its world, such as `sprites/train/00012`.
        found_by: the tracker that found the asked tracks in this very video; empty where they were given.
    """

    video: Tensor
    trajectory: Trajectory
    prompt: str
    visible: Tensor
    name: str
    found_by: str = ""


@dataclass(frozen=True)
class ClipBatch:
    """Clips of one size, stacked: `video [B,3,T,H,W]`, `trajectory [B,K,T]`, `visible [B,K,T]`."""

    video: Tensor
    trajectory: Trajectory
    prompts: list[str]
    visible: Tensor
    names: list[str]
    found_by: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    @staticmethod
    def stack(clips: Sequence[Clip]) -> ClipBatch:
        """Stack clips of one size; missing tracks are padded as absent."""
        import torch

        trajectory = Trajectory.stack([c.trajectory for c in clips])
        visible = torch.zeros_like(trajectory.presence)
        for row, clip in zip(visible, clips, strict=True):
            row[: clip.visible.shape[0]] = clip.visible
        return ClipBatch(
            video=torch.stack([c.video for c in clips]),
            trajectory=trajectory,
            prompts=[c.prompt for c in clips],
            visible=visible,
            names=[c.name for c in clips],
            found_by=[c.found_by for c in clips],
        )

    def select(self, indices: Sequence[int]) -> ClipBatch:
        """Return the clips at `indices`, in that order; an index may repeat (a prompt's group)."""
        rows = list(indices)
        t = self.trajectory
        return ClipBatch(
            video=self.video[rows],
            trajectory=replace(t, xy=t.xy[rows], intensity=t.intensity[rows], presence=t.presence[rows]),
            prompts=[self.prompts[i] for i in rows],
            visible=self.visible[rows],
            names=[self.names[i] for i in rows],
            found_by=[self.found_by[i] for i in rows],
        )

    @staticmethod
    def concat(batches: Sequence[ClipBatch]) -> ClipBatch:
        """Join batches of one size and one number of tracks."""
        import torch

        first = batches[0].trajectory
        trajectory = replace(
            first,
            xy=torch.cat([b.trajectory.xy for b in batches]),
            intensity=torch.cat([b.trajectory.intensity for b in batches]),
            presence=torch.cat([b.trajectory.presence for b in batches]),
        )
        return ClipBatch(
            video=torch.cat([b.video for b in batches]),
            trajectory=trajectory,
            prompts=[p for b in batches for p in b.prompts],
            visible=torch.cat([b.visible for b in batches]),
            names=[n for b in batches for n in b.names],
            found_by=[f for b in batches for f in b.found_by],
        )

    def split(self, size: int) -> Iterator[ClipBatch]:
        """Cut into batches of at most `size` clips, in order."""
        for begin in range(0, len(self), size):
            yield self.select(range(begin, min(begin + size, len(self))))

    def repeat(self, times: int) -> ClipBatch:
        """Repeat each clip `times` times in a row: the samples of a group stand together."""
        return self.select([i for i in range(len(self)) for _ in range(times)])


class World(Protocol):
    """A source of clips. Splits are `train`, `heldout`, `hard` and `benchmark`."""

    @property
    def frames(self) -> int:
        """Pixel frames of a clip: a setting, which follows `rollout.frames` (`${pixel_frames:${rollout.frames}}`)."""
        ...

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Frame sizes (H, W) that this world can produce."""
        ...

    def size(self, split: str) -> int | None:
        """Number of clips in a split; None where there are as many as one asks for."""
        ...

    def batch(self, split: str, indices: Sequence[int], bucket: tuple[int, int]) -> ClipBatch:
        """Produce clips by index; the same index gives the same clip."""
        ...
