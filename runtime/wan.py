"""Wan2.1 at full size: which checkpoint, in which layout, at which precision.

Imports nothing heavy: what can be checked about files is checked before torch is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.control import MASK_CHANNELS, MODES, NOTE
from runtime.models import shipped
from runtime.settings import require

if TYPE_CHECKING:
    from policies.causal_dit import CausalWanTransformer3DModel
    from runtime.networks import Networks

KINDS = ("i2v", "t2v")
IMAGE_FRAMES = ("first", "all", "none")
PRECISIONS = ("float32", "bfloat16")
RANDOM = "random"
LATENT, ROTARY = 16, 1024
PARTS = {"vae": "config.json", "text_encoder": "config.json", "tokenizer": "tokenizer.json"}


@dataclass(frozen=True)
class Architecture:
    """Shape of the networks. The defaults are the released 1.3B model; a checkpoint must agree.

    Attributes:
        layers: transformer blocks.
        heads: attention heads; the width is heads x head_dim.
        head_dim: channels of a head.
        ffn: width of the feed-forward layers.
        text_dim: width of prompt features.
        frequencies: channels of the timestep embedding.
        image_dim: width of image features; 0 for a model without image tokens.
        vae_dim: width of a VAE with random weights; a VAE from a folder has its own.
        image_layers: layers of an image encoder with random weights; one from a folder has its own.
    """

    layers: int = 30
    heads: int = 12
    head_dim: int = 128
    ffn: int = 8960
    text_dim: int = 4096
    frequencies: int = 256
    image_dim: int = 1280
    vae_dim: int = 96
    image_layers: int = 32

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_dim", "ffn", "text_dim", "frequencies", "vae_dim", "image_layers"):
            require(getattr(self, name) >= 1, f"architecture.{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.image_dim >= 0 and self.image_dim % 80 == 0,
            f"architecture.image_dim must be a multiple of 80 (CLIP's heads) or 0, got {self.image_dim}",
        )


@dataclass(frozen=True)
class Wan:
    """Wan2.1 with control, from a folder in diffusers' layout, a hub id or the original single file.

    Attributes:
        kind: `i2v`: the network takes noise, mask, reference and control; `t2v`: noise and control, its first latent
            frame is the image itself.
        path: folder that holds transformer/, vae/, text_encoder/, tokenizer/ and, for image tokens, image_encoder/;
            or a hub id, of which the local cache is used unless `download` says otherwise.
        transformer: name of a folder in `path`, a folder of its own, or a .safetensors file in the original layout.
        download: fetch a hub id that the local cache does not hold.
        random: random weights instead of a checkpoint, to measure speed.
        control: how a dragged path is drawn before the VAE encodes it: `presence`, or `grayscale` (the paper).
        text_length: tokens a prompt is padded to.
        image_frames: which frames see the image tokens: `first` (the paper), `all` (diffusers' pipelines), `none`.
        precision: of the transformer's weights, `float32` or `bfloat16`; adapters stay float32. Arithmetic in bfloat16
            on float32 weights is `engine.precision=bf16`.
        vae_precision: `float32` or `bfloat16`, also of the tiny VAE.
        tiny_vae: a second, tiny decoder for live generation: a .safetensors file in the layout of TAEHV (`taew2_1`),
            `random` together with `random`, or none. Rollouts, rewards and training decode with the full VAE.
        encoder_device: torch device of the text and image encoders; none: that of the transformer.
        features: folder that keeps prompt and image features; none keeps nothing.
        assets: folder of the small networks that rewards and evaluation use.
        architecture: shape of the networks.
    """

    kind: str
    path: str | None = None
    transformer: str = "transformer"
    download: bool = False
    random: bool = False
    control: str = "grayscale"
    text_length: int = 512
    image_frames: str = "first"
    precision: str = "bfloat16"
    vae_precision: str = "float32"
    tiny_vae: str | None = None
    encoder_device: str | None = "cpu"
    features: str | None = "outputs/features"
    assets: str = "assets/tiny"
    architecture: Architecture = field(default_factory=Architecture)

    def __post_init__(self) -> None:
        choices = {"kind": KINDS, "control": MODES, "image_frames": IMAGE_FRAMES, "precision": PRECISIONS}
        for name, allowed in (choices | {"vae_precision": PRECISIONS}).items():
            value = getattr(self, name)
            require(value in allowed, f"model.{name} must be one of {', '.join(allowed)}, got {value!r}")
        require(self.text_length >= 1, f"model.text_length must be at least 1, got {self.text_length}")
        tokens = self.image_frames != "none"
        require(
            self.kind == "i2v" or not tokens,
            f"model.image_frames={self.image_frames}: text-to-video Wan has no image tokens; use none",
        )
        require(
            self.kind == "i2v" or not self.architecture.image_dim,
            "model.architecture.image_dim: text-to-video Wan has no image embedder; use 0",
        )
        require(
            bool(self.architecture.image_dim) or not tokens,
            "model.architecture.image_dim=0 leaves no image tokens to see; use model.image_frames=none",
        )
        require(
            not (self.random and self.path),
            f"model.random=true loads nothing from model.path={self.path}; take one out",
        )
        require(
            self.tiny_vae is None or (self.tiny_vae == RANDOM) == self.random,
            f"model.tiny_vae={self.tiny_vae} with model.random={str(self.random).lower()}: the tiny VAE is a file "
            f"beside a loaded model and {RANDOM!r} beside a random one",
        )
        require(
            self.tiny_vae in (None, RANDOM) or str(self.tiny_vae).endswith(".safetensors"),
            f"model.tiny_vae={self.tiny_vae} is not a .safetensors file; nothing else is read",
        )

    @property
    def folder(self) -> Path:
        """The folder of the small networks that rewards and evaluation use, absolute."""
        return shipped(self.assets)

    @property
    def pixel_multiple(self) -> int:
        """Height and width of a frame in pixels are multiples of this: the VAE's stride times the patch."""
        return 16

    @property
    def label(self) -> str:
        """What a plan calls the model."""
        return f"wan2.1 {self.kind}, {'random weights' if self.random else f'{self.path}/{self.transformer}'}"

    @property
    def network(self) -> Path:
        """The transformer's folder or file.

        Raises:
            FileNotFoundError: see `source`.
        """
        own = Path(self.transformer).expanduser()
        return own.resolve() if own.is_file() or (own / "config.json").is_file() else self.source() / self.transformer

    def tiny_file(self) -> Path | None:
        """The file of the tiny VAE, where one is to be loaded.

        Raises:
            FileNotFoundError: it is not there.
        """
        if self.tiny_vae in (None, RANDOM):
            return None
        here = shipped(str(self.tiny_vae))
        if here.is_file():
            return here
        raise FileNotFoundError(
            f"model.tiny_vae={self.tiny_vae}: no such file; taew2_1.safetensors is what TAEHV publishes for Wan2.1"
        )

    def source(self) -> Path:
        """The local folder behind `path`.

        Raises:
            FileNotFoundError: there is none; says what to set.
        """
        if self.path is None:
            raise FileNotFoundError(
                "model.path is not set; give a folder as diffusers writes it or a hub id such as "
                f"{HUB[self.kind]}, or measure speed with model.random=true"
            )
        here = shipped(self.path)
        if here.is_dir():
            return here
        if self.path.count("/") != 1 or self.path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"model.path={self.path}: no such folder")
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.path, local_files_only=not self.download))
        except Exception as error:
            reason = "cannot be fetched" if self.download else "is neither a folder nor in the local hub cache"
            hint = "" if self.download else "; model.download=true fetches it"
            raise FileNotFoundError(f"model.path={self.path} {reason} ({type(error).__name__}){hint}") from error

    def config(self) -> dict[str, Any]:
        """Arguments of the transformer's class, control channels included."""
        shape = self.architecture
        image = shape.image_dim or None
        return {
            "patch_size": (1, 2, 2),
            "num_attention_heads": shape.heads,
            "attention_head_dim": shape.head_dim,
            "in_channels": LATENT + (MASK_CHANNELS + LATENT) * (self.kind == "i2v") + LATENT,
            "out_channels": LATENT,
            "text_dim": shape.text_dim,
            "freq_dim": shape.frequencies,
            "ffn_dim": shape.ffn,
            "num_layers": shape.layers,
            "image_dim": image,
            "added_kv_proj_dim": shape.heads * shape.head_dim if image else None,
            "rope_max_seq_len": ROTARY,
        }

    def check(self, frames: int = 1) -> None:
        """Look whether the networks are there and of the right shape, without loading them.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: the checkpoint has another shape or was trained on another control.
        """
        require(frames <= ROTARY, f"rollout.frames={frames}: Wan's rotary table has {ROTARY} frames")
        if self.random:
            return
        self.tiny_file()
        folder, network = self.source(), self.network
        parts = PARTS | ({"image_encoder": "config.json"} if self.image_frames != "none" else {})
        missing = [f"{part}/{file}" for part, file in parts.items() if not (folder / part / file).is_file()]
        if not network.is_file() and not (network / "config.json").is_file():
            missing.insert(0, f"{self.transformer}/config.json")
        if missing:
            raise FileNotFoundError(f"model.path={self.path} has no {', '.join(missing)}; see docs/full_size.md")
        if network.is_dir():
            self._compare(json.loads((network / "config.json").read_text()))
        note = folder / NOTE
        trained = json.loads(note.read_text())["control"] if note.is_file() else self.control
        require(trained == self.control, f"model.control={self.control}, but {self.path} was trained on {trained}")

    def load(self, device: str) -> Networks:
        """Load what a rollout needs; text and image encoders come when something is to be encoded.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a part cannot be read or does not fit; lists every missing and unexpected weight.
        """
        from runtime.wan_networks import load_networks

        return load_networks(self, device)

    def load_transformer(self, device: str) -> CausalWanTransformer3DModel:
        """Load the transformer alone; raises as `load`."""
        from runtime.wan_networks import load_transformer

        return load_transformer(self, device)

    def _compare(self, found: dict[str, Any]) -> None:
        """Refuse a config.json of another shape; its input channels may or may not count control."""
        wanted = self.config()
        plain = wanted["in_channels"] - LATENT
        odd = [
            f"{key} {found[key]} (not {value})"
            for key, value in wanted.items()
            if key not in ("in_channels", "patch_size", "rope_max_seq_len") and key in found and found[key] != value
        ]
        if found.get("in_channels", plain) not in (plain, plain + LATENT):
            odd.insert(0, f"in_channels {found['in_channels']} (not {plain}, or {plain + LATENT} with control)")
        require(
            not odd, f"model.transformer={self.transformer} is another model than kind={self.kind}: {', '.join(odd)}"
        )


HUB = {"i2v": "weizhou03/Wan2.1-Fun-1.3B-InP-Diffusers", "t2v": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}
