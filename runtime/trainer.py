"""What takes the steps of the optimizer: the plain one, and what every other must offer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from runtime.checkpoint import optimizer_tensors, restore_optimizer
from runtime.team import Team

if TYPE_CHECKING:
    from runtime.settings import Optimizer

# The loss of the critic, whose weights are a group of their own.
CRITIC = "loss_critic"


class Trainer(Protocol):
    """Gradients, steps, and the state of the optimizer.

    Attributes:
        network: what is called in place of the policy's network.
        sharded: the optimizer's state differs between processes.
    """

    network: nn.Module
    sharded: bool

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups: `lr` is to be set, `initial_lr` is what it begins with."""
        ...

    def backward(self, losses: Mapping[str, Tensor], last: bool) -> None:
        """Add the gradient of the sum of losses (scalars). Over processes and parts they add up to the mini-batch's.

        Args:
            losses: terms by name.
            last: this is the mini-batch's last part.
        """
        ...

    def step(self) -> float:
        """Clip each group's gradient to its largest L2 norm, update the weights, clear the gradient.

        Returns:
            The norm of the policy's gradient before clipping. Where any gradient in any process is not finite, all
            weights and states stay as they were, and the norm returned is not finite.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, this process's part of it."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned; the weights are in place already."""
        ...

    def gathered(self, write: bool = False) -> Any:
        """Context in which the network's weights are whole; with `write`, changes made in it stay."""
        ...


class PlainTrainer:
    """AdamW on every process; gradients are added up over them."""

    sharded = False

    def __init__(
        self, network: nn.Module, critic: nn.Module | None, optimizer: Optimizer, critic_lr: float, team: Team
    ) -> None:
        self.network, self.team, self.max_norm = network, team, optimizer.grad_clip
        trained = [p for p in network.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained, "initial_lr": optimizer.lr}]
        if critic is not None:
            groups.append({"params": list(critic.parameters()), "initial_lr": critic_lr})
        self.optimizer = adamw(groups, optimizer)

    def groups(self) -> list[dict[str, Any]]:
        """See `Trainer`."""
        return self.optimizer.param_groups

    def backward(self, losses: Mapping[str, Tensor], last: bool = True) -> None:
        """See `Trainer`."""
        sum(losses.values()).backward()  # type: ignore[union-attr]

    def step(self) -> float:
        """See `Trainer`. The norm is the policy's, or the one that is not finite."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.team.add([p.grad for p in weights if p.grad is not None])
        norms = [float(clip_grad_norm_(group["params"], self.max_norm)) for group in self.optimizer.param_groups]
        if all(map(math.isfinite, norms)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return next((norm for norm in norms if not math.isfinite(norm)), norms[0])

    def tensors(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return optimizer_tensors(self.optimizer)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        restore_optimizer(self.optimizer, tensors)

    @contextmanager
    def gathered(self, write: bool = False) -> Iterator[None]:
        """See `Trainer`."""
        yield


def adamw(groups: list[dict[str, Any]], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW as the settings say."""
    betas = (settings.betas[0], settings.betas[1])
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay)
