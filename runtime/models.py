"""Where the networks of a run come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from envs.control import MODES, NOTE

if TYPE_CHECKING:
    from policies.causal_dit import CausalWanTransformer3DModel
    from runtime.networks import Networks

ROOT = Path(__file__).resolve().parents[1]


def shipped(path: str) -> Path:
    """A folder as it is named, or that of this name beside the code where there is none; absolute."""
    here = Path(path).expanduser()
    return (here if here.exists() else ROOT / here).resolve()


@dataclass(frozen=True)
class Pretrained:
    """A folder in diffusers' layout: `transformer/`, `vae/`, `text_encoder/`, `tokenizer/`, each a config
    and safetensors.

    Attributes:
        path: the folder; relative paths are tried from the working directory, then from this repository.
        control: how a dragged path is drawn before the VAE encodes it: `presence` keeps "no force" and "not
            asked" apart, `grayscale` is the paper's single plane.
        transformer: which transformer in the folder: `transformer` (the few-step student) or `teacher` (many steps); or
            a folder of its own, such as outputs/distill/<run>/transformer.
        text_length: tokens a prompt is padded to.
    """

    path: str
    control: str = "presence"
    transformer: str = "transformer"
    text_length: int = 32

    def __post_init__(self) -> None:
        if self.control not in MODES:
            raise ValueError(f"model.control must be {' or '.join(MODES)}, got {self.control!r}")
        if self.text_length < 1:
            raise ValueError(f"model.text_length must be at least 1, got {self.text_length}")

    @property
    def folder(self) -> Path:
        """The folder, absolute."""
        return shipped(self.path)

    @property
    def label(self) -> str:
        """What a plan calls the model."""
        return f"{self.folder.name}/{self.transformer}"

    @property
    def network(self) -> Path:
        """The transformer's folder."""
        own = Path(self.transformer).expanduser()
        return own.resolve() if (own / "config.json").is_file() else self.folder / self.transformer

    def check(self, frames: int = 1) -> None:
        """Look whether the networks are there and fit the settings, without loading them.

        Args:
            frames: latent frames of the longest clip.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: the model was trained on another control, or cannot make clips of this length.
        """
        for part in (self.network, self.folder / "vae", self.folder / "text_encoder"):
            if not (part / "config.json").is_file():
                raise FileNotFoundError(f"model.path={self.path}: {part} has no config.json; train it with `make tiny`")
        longest = json.loads((self.network / "config.json").read_text()).get("rope_max_seq_len")
        if longest is not None and frames > longest:
            raise ValueError(
                f"rollout.frames={frames}: the rotary table of {self.path}/{self.transformer} has {longest} frames; "
                f"use at most that many"
            )
        note = self.folder / NOTE
        trained = json.loads(note.read_text())["control"] if note.is_file() else self.control
        if trained != self.control:
            raise ValueError(
                f"model.control={self.control}, but {self.path} was trained on {trained}; set model.control={trained}"
            )

    def load(self, device: str) -> Networks:
        """Load all parts, frozen, in evaluation mode.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a part cannot be read, or the transformer's channels do not fit the VAE's.
        """
        from runtime.networks import load_networks

        return load_networks(self, device)

    def load_transformer(self, device: str) -> CausalWanTransformer3DModel:
        """Load the transformer alone; raises as `load`."""
        from runtime.networks import load_transformer

        return load_transformer(self, device)
