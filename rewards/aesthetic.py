"""The aesthetic reward (AR-Drag, Eq. 15): a linear score on the CLIP embedding of a frame."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from metrics.features import check_tower, tower
from rewards.base import RewardContext, RewardTerm, check_weight, finite_samples, latent_frames
from tracking.weights import read_weights

if TYPE_CHECKING:
    from torch import Tensor

    from data.clip import ClipBatch


@dataclass(frozen=True)
class Aesthetic:
    """Score of L2-normalised CLIP image embeddings by a LAION head, averaged over frames.

    Attributes:
        weight: factor in the weighted sum.
        model: folder of a CLIP vision model with projection, under the assets folder or a path of its own.
        head: file of the head (LAION's .pth or .safetensors); None takes `head.safetensors` of the model's
            folder.
        sha256: the head file's checksum in hex; None does not check.
        frames: how many pixel frames of a latent frame are scored, its last ones; 1 to 4.
        clamp: cut scores to LAION's range [1, 10]; off gives raw scores.
    """

    weight: float = 1.0
    model: str = "aesthetic"
    head: str | None = None
    sha256: str | None = None
    frames: int = 1
    clamp: bool = False

    def __post_init__(self) -> None:
        check_weight("aesthetic", self.weight)
        if not 1 <= self.frames <= 4:
            raise ValueError(f"reward.aesthetic.frames must be 1 to 4 (a latent frame has 4), got {self.frames}")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ValueError(f"the sha256 of an aesthetic head must be 64 hex digits, got {self.sha256}")

    def check(self, assets: Path) -> None:
        """Look whether tower and head are there; loads nothing.

        Raises:
            FileNotFoundError: a file is missing.
        """
        check_tower(tower(assets, self.model))
        _check_head(self.head_file(assets))

    def prepare(self, context: RewardContext) -> None:
        """Load the network and the head.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the checksum differs, or the head does not fit the embedding.
        """
        from metrics.clip_vision import ClipVision

        folder, path = tower(context.assets, self.model), self.head_file(context.assets)
        vision = ClipVision(folder).to(context.device)
        w, b = load_head(path, self.sha256)
        if w.shape[0] != vision.width:
            raise ValueError(f"{path} scores embeddings of {w.shape[0]} dimensions but {folder} gives {vision.width}")
        object.__setattr__(self, "_scorer", (vision, w.to(context.device), b))

    def head_file(self, assets: Path) -> Path:
        """Where the head is."""
        return Path(self.head).expanduser() if self.head else tower(assets, self.model) / "head.safetensors"

    def score(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        """See `Reward.score`. Every latent frame has this term, the first too."""
        import torch
        from torch.nn.functional import normalize

        if not hasattr(self, "_scorer"):
            raise ValueError("the aesthetic reward has no network; call prepare(context) before score")
        vision, w, b = self._scorer
        blocks = latent_frames(video.shape[2])
        last = 4 * torch.arange(blocks)[:, None]
        picks = (last - torch.arange(self.frames)).clamp(min=0)  # frame 0 stands alone: its picks repeat
        chosen = video.nan_to_num(0.0, 0.0, 0.0)[:, :, picks.flatten()].transpose(1, 2).flatten(0, 1)
        scores = normalize(vision(chosen), dim=-1) @ w + b
        if self.clamp:
            scores = scores.clamp(1, 10)
        value = scores.reshape(len(video), blocks, self.frames).mean(-1).to(video.device)
        valid = finite_samples(video)[:, None] & value.isfinite()
        return RewardTerm(value.where(valid, 0), valid)


def load_head(path: Path, sha256: str | None = None) -> tuple[Tensor, float]:
    """Read a linear head, or a stack of linear layers without activations, as one affine map `(w [D], b)`.

    LAION's V2 predictor is such a stack (768-1024-128-64-16-1, dropout only), its V1 a single layer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the checksum differs, or the file holds something else.
    """
    import torch

    _check_head(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest() if sha256 else ""
    if sha256 and found != sha256.lower():
        raise ValueError(f"{path} has SHA-256 {found}, not {sha256.lower()}; the file is damaged or another one")
    state = read_weights(path)
    layers = [key.removesuffix("weight") for key in state if key.endswith("weight")]
    shapes = [tuple(state[f"{layer}weight"].shape) for layer in layers]
    linear = all(
        len(shape) == 2 and f"{layer}bias" in state and state[f"{layer}bias"].shape == shape[:1]
        for layer, shape in zip(layers, shapes, strict=True)
    )
    if not layers or not linear or any(a[0] != b[1] for a, b in pairwise(shapes)) or shapes[-1][0] != 1:
        raise ValueError(
            f"{path} is not an aesthetic head: its layers are {shapes}, expected linear ones, with biases, down to 1"
        )
    w, b = torch.eye(shapes[0][1], dtype=torch.float64), torch.zeros(shapes[0][1], dtype=torch.float64)
    for layer in layers:
        matrix = state[f"{layer}weight"].double()
        w, b = matrix @ w, matrix @ b + state[f"{layer}bias"].double()
    return w[0].float(), float(b[0])


def _check_head(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"no aesthetic head at {path}; name a .pth or .safetensors file: reward.aesthetic.head, or of the judge "
            "+evaluation.scorer_head"
        )
