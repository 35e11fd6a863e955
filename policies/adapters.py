"""What of the network trains, and the frozen policy that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data.draws import Stream, seed_of

if TYPE_CHECKING:
    from tensordict import TensorDict, TensorDictBase
    from torch import nn

    from policies.actor import Actor

KINDS = ("full", "layers", "lora")
ADAPTER = "policy"


@dataclass(frozen=True)
class Adaptation:
    """Which weights train: all of them, those of some layers, or low-rank adapters (LoRA, through peft) beside some.

    Attributes:
        kind: `full`, `layers` or `lora`.
        rank: rank of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        targets: names (or their ends) of the linear layers that train (`layers`) or get an adapter (`lora`).
    """

    kind: str = "full"
    rank: int = 16
    alpha: float = 16.0
    targets: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    )

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"adaptation.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.rank < 1:
            raise ValueError(f"adaptation.rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"adaptation.alpha must be positive, got {self.alpha}")
        if not self.targets:
            raise ValueError("adaptation.targets is empty; name the layers to adapt, such as to_q")

    def apply(self, transformer: Any, seed: int = 0) -> None:
        """Choose the trainable parameters of a diffusers model, in place; adapters start as the identity.

        Raises:
            ValueError: no layer of the model has one of the names in `targets`.
        """
        if self.kind == "full":
            transformer.requires_grad_(True)
            return
        missing = [t for t in self.targets if not any(_ends(n, t) for n, _ in transformer.named_modules())]
        if missing:
            raise ValueError(f"adaptation.targets names no layer of the model: {', '.join(missing)}")
        transformer.requires_grad_(False)
        if self.kind == "layers":
            for name, layer in transformer.named_modules():
                if any(_ends(name, t) for t in self.targets):
                    layer.requires_grad_(True)
            return
        import torch
        from peft import LoraConfig

        # peft draws its initial weights from the global generator.
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(Stream.TRAINING, seed))
            config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.targets)
            transformer.add_adapter(config, adapter_name=ADAPTER)
        for parameter in transformer.parameters():
            if parameter.requires_grad:  # beside weights in bfloat16, which would round small updates away
                parameter.data = parameter.data.float()


def merged(transformer: Any) -> Any:
    """The transformer without adapters that computes the same: a copy with theirs added to its weights, or itself."""
    if not getattr(transformer, "peft_config", None):
        return transformer
    plain = deepcopy(transformer)
    plain.fuse_lora(adapter_names=[ADAPTER])
    plain.unload_lora()
    return plain


def _identity(transformer: Any) -> bool:
    """Whether adapters change nothing: the second factor of each is zero."""
    return not any(bool(p.any()) for name, p in transformer.named_parameters() if ".lora_B." in name)


def _ends(name: str, target: str) -> bool:
    """Whether a layer is meant by a target, by the rule of peft."""
    return name == target or name.endswith("." + target)


class ReferencePolicy:
    """The policy as it was before training, for a KL term.

    Where adapters are still the identity it is the same network with them switched off. Otherwise (no adapters, or
    those of a checkpoint that the run starts from) a frozen copy, so make it before the first update and before a run
    is resumed.

    Args:
        actor: the policy; its `transformer` must not be wrapped yet.
        adaptation: how the policy trains.
    """

    def __init__(self, actor: Actor, adaptation: Adaptation) -> None:
        self._actor = actor
        self._shares = adaptation.kind == "lora" and _identity(actor.transformer)
        self._network: Any = actor.transformer
        if not self._shares:
            self._network = deepcopy(actor.transformer).requires_grad_(False).eval()

    def evaluate(self, rollout: TensorDictBase) -> TensorDict:
        """Score a rollout without gradient; returns as `policies.actor.evaluate`."""
        import torch

        from policies.actor import evaluate

        with torch.no_grad(), self.network() as network:
            return evaluate(network, self._actor.transition, self._actor.causality, rollout)

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """The initial network, for as long as the context lasts."""
        if not self._shares:
            yield self._network
            return
        self._network.disable_adapters()
        try:
            yield self._actor.transformer  # by now maybe a wrapper of the network
        finally:
            self._network.enable_adapters()
