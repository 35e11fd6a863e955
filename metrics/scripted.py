"""The networks of papers, from local files: Inception for FID, I3D for FVD, as TorchScript.

A TorchScript file brings its own program, so one is run only if its SHA-256 is named: that very file, on purpose.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Clips or frames that go through a network together.
BATCH = 16


@dataclass(frozen=True)
class Scripted:
    """Features of two TorchScript networks with the interface of the files that most papers use.

    Frames go as uint8 `[n, 3, H, W]` through `network(frames, return_features=True)` (StyleGAN2-ADA's
    `inception-2015-12-05.pt`: 2048 numbers), videos as float 0..255 `[n, 3, T, H, W]` through `network(videos,
    rescale=True, resize=True, return_features=True)` (StyleGAN-V's `i3d_torchscript.pt`: 400 numbers, from 10 frames).

    Attributes:
        frames_file: network of frames.
        frames_sha256: its checksum in hex.
        videos_file: network of videos.
        videos_sha256: its checksum in hex.
        label: name of the extractor in every output; the checksums' beginnings are added.
    """

    frames_file: str
    frames_sha256: str
    videos_file: str
    videos_sha256: str
    label: str = "inception+i3d"

    @property
    def name(self) -> str:
        """The label and the files' checksums."""
        return f"{self.label}:{self.frames_sha256[:8]}:{self.videos_sha256[:8]}"

    def check(self, assets: Path) -> None:
        """Look at the files, which are named whole; runs nothing.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: a checksum is not one, or the file has another.
        """
        for kind in ("frames", "videos"):
            path, expected = Path(getattr(self, f"{kind}_file")).expanduser(), getattr(self, f"{kind}_sha256")
            if not path.is_file():
                raise FileNotFoundError(f"evaluation.extractor.{kind}_file: no file at {path}")
            if not re.fullmatch(r"[0-9a-fA-F]{64}", expected):
                raise ValueError(
                    f"evaluation.extractor.{kind}_sha256 must be the file's SHA-256 (sha256sum {path}): it brings code "
                    f"of its own, so name the one you trust"
                )
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != expected.lower():
                raise ValueError(f"{path} has SHA-256 {found}, not evaluation.extractor.{kind}_sha256={expected}")

    def prepare(self, assets: Path, device: str) -> None:
        """Check the files and load the networks."""
        import torch

        self.check(assets)
        files = (Path(path).expanduser() for path in (self.frames_file, self.videos_file))
        loaded = tuple(torch.jit.load(str(path), map_location=device).eval() for path in files)
        object.__setattr__(self, "_networks", (*loaded, device))

    def frames(self, video: Tensor) -> Tensor:
        """See `FeatureExtractor.frames`."""
        network, _, device = self._loaded()
        pixels = to_pixels(video).round().byte().transpose(1, 2).flatten(0, 1)
        return _batched(lambda part: network(part.to(device), return_features=True), pixels).unflatten(
            0, (len(video), -1)
        )

    def videos(self, video: Tensor) -> Tensor:
        """See `FeatureExtractor.videos`."""
        _, network, device = self._loaded()
        return _batched(
            lambda part: network(part.to(device), rescale=True, resize=True, return_features=True), to_pixels(video)
        )

    def _loaded(self) -> Any:
        if not hasattr(self, "_networks"):
            raise ValueError(f"the feature extractor {self.name} has no network; call prepare(assets, device) first")
        return self._networks


def to_pixels(video: Tensor) -> Tensor:
    """Values in [-1, 1] as 0..255, float."""
    return (video.float().clamp(-1, 1) + 1) * 127.5


def _batched(network: Any, inputs: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        return torch.cat([network(part).float().flatten(1).cpu() for part in inputs.split(BATCH)])
