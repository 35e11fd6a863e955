"""The one trajectory type: where the user drags, how hard, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """Tracks in pixel coordinates of a frame of known size. Leading batch dimensions are allowed.

    Attributes:
        xy: `[..., K, T, 2]` float32, x to the right and y down, in pixels; pixel centres are integers.
        intensity: `[..., K, T]` touch force in [0, 1].
        presence: `[..., K, T]` bool, True where a position is asked for.
        height: frame height in pixels.
        width: frame width in pixels.
        fps: frames per second of the time axis.
    """

    xy: Tensor
    intensity: Tensor
    presence: Tensor
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        shape = self.xy.shape[:-1]
        if self.xy.shape[-1] != 2 or self.intensity.shape != shape or self.presence.shape != shape:
            raise ValueError(
                f"trajectory shapes disagree: xy {tuple(self.xy.shape)}, intensity "
                f"{tuple(self.intensity.shape)}, presence {tuple(self.presence.shape)}; "
                f"expected [..., K, T, 2], [..., K, T], [..., K, T]"
            )

    @property
    def num_frames(self) -> int:
        """Number of pixel frames T."""
        return int(self.xy.shape[-2])

    def normalized(self) -> Tensor:
        """Positions `[..., K, T, 2]` in [0, 1]: (x / (W-1), y / (H-1))."""
        return self.xy / self.xy.new_tensor([self.width - 1, self.height - 1])

    def to(self, device: torch.device | str) -> Trajectory:
        """Move the tensors to `device`."""
        return replace(
            self,
            xy=self.xy.to(device),
            intensity=self.intensity.to(device),
            presence=self.presence.to(device),
        )

    def row(self, index: int) -> Trajectory:
        """The trajectory of one sample of a batch."""
        return replace(self, xy=self.xy[index], intensity=self.intensity[index], presence=self.presence[index])

    @staticmethod
    def stack(items: Sequence[Trajectory]) -> Trajectory:
        """Stack `[K, T]` trajectories of one frame size into `[B, K, T]`; missing tracks are padded as absent."""
        import torch
        from torch.nn.functional import pad

        sizes = {(t.height, t.width, t.num_frames) for t in items}
        if len(sizes) != 1:
            raise ValueError(f"cannot stack trajectories of different sizes: {sorted(sizes)}")
        tracks = max(t.xy.shape[-3] for t in items)
        extra = [tracks - t.xy.shape[-3] for t in items]
        return replace(
            items[0],
            xy=torch.stack([pad(t.xy, (0, 0, 0, 0, 0, e)) for t, e in zip(items, extra, strict=True)]),
            intensity=torch.stack([pad(t.intensity, (0, 0, 0, e)) for t, e in zip(items, extra, strict=True)]),
            presence=torch.stack([pad(t.presence, (0, 0, 0, e)) for t, e in zip(items, extra, strict=True)]),
        )
