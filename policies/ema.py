"""Exponential moving average of the weights that train."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class EMA:
    """Averaged float32 copy of a module's trainable weights: `shadow = decay shadow + (1 - decay) weight`.

    Args:
        module: its parameters with `requires_grad` at this moment are followed.
        decay: in [0, 1).

    Raises:
        ValueError: `decay` is out of range.
    """

    def __init__(self, module: nn.Module, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the weights; call once after each optimizer step."""
        for name, parameter in self._parameters.items():
            self.shadow[name].lerp_(parameter.float(), 1 - self.decay)

    @contextmanager
    def swap(self, writable: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
        """Put the averaged weights into the module for a `with` block; undone bit for bit after it.

        `writable` is the context in which the weights are whole and may be written, where they are split.
        """
        with writable():
            kept = {name: p.detach().clone() for name, p in self._parameters.items()}
            self._write(self.shadow)
        try:
            yield
        finally:
            with writable():
                self._write(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the shadow by parameter name."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the shadow.

        Raises:
            ValueError: names or shapes are not those of the module.
        """
        ours = {name: tuple(value.shape) for name, value in self.shadow.items()}
        theirs = {name: tuple(value.shape) for name, value in state.items()}
        if ours != theirs:
            wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ValueError(f"ema state belongs to another model: {wrong[0]} (and {len(wrong) - 1} more) do not match")
        for name, value in state.items():
            self.shadow[name].copy_(value)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def averaged(module: Module, ema: EMA) -> Module:
    """A copy of the module that `ema` follows, with the averaged weights."""
    with ema.swap():
        return copy.deepcopy(module)
