"""What prompts and reference images look like to the network, computed once and kept on disk by content.

The large encoders (UMT5-XXL, CLIP) are loaded when something is asked for that no file holds yet, and not before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.draws import Stream, normal
from policies.codecs import ImageCodec, TextCodec


class TextEncoder(Protocol):
    """Whatever turns prompts into `[B, L, D]`."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to `[B, L, D]`, zero beyond the prompt."""
        ...


class ImageEncoder(Protocol):
    """Whatever turns reference images into tokens."""

    def encode(self, images: Tensor) -> Tensor:
        """Encode `[B, 3, H, W]` in [-1, 1] to `[B, I, E]`."""
        ...


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features, each in a safetensors file that is named by the SHA-256 of what it was made from.

    Attributes:
        folder: made when the first feature is written; None keeps nothing.
    """

    folder: Path | None

    def fetch(self, contents: Sequence[bytes], make: Callable[[list[int]], Sequence[Tensor]]) -> list[Tensor]:
        """The feature of each content, on the CPU; `make(rows)` computes those that no file holds, each once.

        A file that cannot be read is made again.
        """
        names = [hashlib.sha256(content).hexdigest() for content in contents]
        found = {name: self._read(name) for name in dict.fromkeys(names)}
        rows = [names.index(name) for name, value in found.items() if value is None]
        for row, value in zip(rows, make(rows) if rows else [], strict=True):
            found[names[row]] = value.detach().cpu().contiguous()
            self._write(names[row], value)
        return [value for value in (found[name] for name in names) if value is not None]

    def _read(self, name: str) -> Tensor | None:
        if self.folder is None or not (self.folder / f"{name}.safetensors").is_file():
            return None
        try:
            return load_file(self.folder / f"{name}.safetensors")["feature"]
        except Exception:  # safetensors raises an error class of its own
            return None

    def _write(self, name: str, value: Tensor) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name}.{os.getpid()}.part"
        save_file({"feature": value.detach().cpu().contiguous()}, part)
        os.replace(part, self.folder / f"{name}.safetensors")


class StoredText:
    """A `TextCodec` behind a `FeatureStore`; prompts are kept without their padding.

    Args:
        store: holds features.
        identity: tells encoders apart.
        load: makes the codec; called at the first prompt that the store does not hold.
        length: tokens that every prompt is padded to.
        device: where the features go.
    """

    def __init__(
        self, store: FeatureStore, identity: str, load: Callable[[], TextCodec], length: int, device: str
    ) -> None:
        self._store, self._identity, self._load = store, identity, load
        self._length, self._device = length, device

    @cached_property
    def codec(self) -> TextCodec:
        """The encoder, loaded."""
        return self._load()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""

        def make(rows: list[int]) -> list[Tensor]:
            found = []
            for row in rows:  # one by one, so that a feature does not depend on its neighbours
                count = int(self.codec.tokens([prompts[row]])[1].sum())
                found.append(self.codec.encode([prompts[row]])[0, :count])
            return found

        contents = [f"text\0{self._identity}\0{self._length}\0{prompt}".encode() for prompt in prompts]
        parts = self._store.fetch(contents, make)
        padded = [torch.nn.functional.pad(part, (0, 0, 0, self._length - len(part))) for part in parts]
        return torch.stack(padded).to(self._device)


class StoredImages:
    """An `ImageCodec` behind a `FeatureStore`; arguments as of `StoredText`."""

    def __init__(self, store: FeatureStore, identity: str, load: Callable[[], ImageCodec], device: str) -> None:
        self._store, self._identity, self._load, self._device = store, identity, load, device

    @cached_property
    def codec(self) -> ImageCodec:
        """The encoder, loaded."""
        return self._load()

    def encode(self, images: Tensor) -> Tensor:
        """See `ImageEncoder`."""
        own = images.detach().float().cpu().contiguous()
        head = f"image\0{self._identity}\0{tuple(images.shape[1:])}\0".encode()
        contents = [head + image.numpy().tobytes() for image in own]
        parts = self._store.fetch(contents, lambda rows: [self.codec.encode(own[row : row + 1])[0] for row in rows])
        return torch.stack(parts).to(self._device)


@dataclass(frozen=True)
class RandomText:
    """Noise in place of prompt features, for measurements of speed: a function of the prompt alone.

    Attributes:
        length, width: tokens and dimensions.
        device: where the features go.
    """

    length: int
    width: int
    device: str

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""
        keys = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7]) for prompt in prompts]
        rows = [normal(Stream.TRAINING, (key, 14), (self.length, self.width)) for key in keys]
        return torch.stack(rows).to(self.device)


def identity_of(*folders: Path) -> str:
    """Tell encoders apart by their files: names, sizes, times of the last change, and contents of the small ones."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for file in folder.iterdir() if file.is_file()):
        facts = file.stat()
        digest.update(f"{file.parent.name}/{file.name} {facts.st_size} ".encode())
        digest.update(file.read_bytes() if facts.st_size < 1 << 16 else str(facts.st_mtime_ns).encode())
    return digest.hexdigest()
