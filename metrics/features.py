"""Feature extractors for Frechet distances. Each has a name that stands beside every number made with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class FeatureExtractor(Protocol):
    """Turns videos `[B, 3, T, H, W]` in [-1, 1] into feature vectors.

    One that needs files or packages may have `check(assets)`, which looks for them before anything heavy loads.
    """

    @property
    def name(self) -> str:
        """What the numbers are made with, such as `tiny-clip`."""
        ...

    def prepare(self, assets: Path, device: str) -> None:
        """Load the network; called once."""
        ...

    def frames(self, video: Tensor) -> Tensor:
        """One vector per frame: `[B, T, D]`, for a distance like FID."""
        ...

    def videos(self, video: Tensor) -> Tensor:
        """One vector per video: `[B, D']`, for a distance like FVD."""
        ...


def tower(assets: Path, model: str) -> Path:
    """Folder of a vision tower: one of that name under the assets, or a path of its own."""
    folder = assets / model
    return folder if folder.is_dir() else Path(model)


def check_tower(folder: Path) -> None:
    """Look whether there is a vision tower; loads nothing.

    Raises:
        FileNotFoundError: a file is missing.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}; expected a CLIP vision model with projection: reward.aesthetic.model, "
                "evaluation.scorer or evaluation.extractor.model"
            )


@dataclass(frozen=True)
class ClipFeatures:
    """Features of a CLIP vision tower.

    A frame's vector is its L2-normalised embedding. A video's is the mean over its frames beside the mean
    absolute change from frame to frame: what it looks like, and how much of that moves. Their distances are
    not a paper's FID and FVD, which use Inception and I3D.

    Attributes:
        model: folder of a CLIP vision model with projection, under the assets folder or a path of its own.
        label: name of the extractor in every output.
    """

    model: str = "aesthetic"
    label: str = "tiny-clip"

    @property
    def name(self) -> str:
        """The label."""
        return self.label

    def check(self, assets: Path) -> None:
        """See `check_tower`."""
        check_tower(tower(assets, self.model))

    def prepare(self, assets: Path, device: str) -> None:
        """Load the tower.

        Raises:
            FileNotFoundError: there is none.
        """
        from metrics.clip_vision import ClipVision

        object.__setattr__(self, "_tower", ClipVision(tower(assets, self.model)).to(device))

    def frames(self, video: Tensor) -> Tensor:
        """See `FeatureExtractor.frames`."""
        from torch.nn.functional import normalize

        if not hasattr(self, "_tower"):
            raise ValueError(f"the feature extractor {self.name} has no network; call prepare(assets, device) first")
        embedded = self._tower(video.transpose(1, 2).flatten(0, 1))
        return normalize(embedded, dim=-1).unflatten(0, (len(video), -1))

    def videos(self, video: Tensor) -> Tensor:
        """See `FeatureExtractor.videos`; a video of one frame does not move."""
        import torch

        features = self.frames(video)
        change = features.diff(dim=1).abs().sum(1) / max(1, features.shape[1] - 1)
        return torch.cat([features.mean(1), change], -1)
