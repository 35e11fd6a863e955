"""Advantages: how good a sample was, compared with the others of its group."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

STD = ("unbiased", "biased")


def group_valid(valid: Tensor, group_size: int) -> Tensor:
    """Drop whole groups: `[B, M]` bool that is True where every sample and frame of the group is valid."""
    whole = valid.unflatten(0, (-1, group_size)).all(dim=2).all(dim=1)
    return whole.repeat_interleave(group_size)[:, None].expand_as(valid)


def group_advantage(reward: Tensor, group_size: int, std: str = "unbiased", eps: float = 1e-4) -> Tensor:
    """Advantage relative to the group, for each latent frame on its own (AR-Drag section 3.3, below Eq. 13).

    `A[b, m] = (R[b, m] - mean) / (std + eps)` over the samples of b's group. A group without spread gets exactly 0.

    Args:
        reward: `[B, M]`; samples of a group stand together.
        group_size: G of 2 or more, dividing B.
        std: `unbiased` divides by G - 1, `biased` by G; at G = 4 they differ by 15 %.
        eps: added to the standard deviation, in units of reward.

    Raises:
        ValueError: a group of one, a B that G does not divide, or an unknown convention.
    """
    if group_size < 2 or reward.shape[0] % group_size:
        raise ValueError(f"advantages need groups of 2 or more that divide {reward.shape[0]} samples, got {group_size}")
    if std not in STD:
        raise ValueError(f"unknown std convention {std!r}; choose one of {', '.join(STD)}")
    grouped = reward.float().unflatten(0, (-1, group_size))
    # Measured from the first sample: the mean of equal numbers is rounded, and eps would blow up what is left.
    grouped = grouped - grouped[:, :1]
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    spread = grouped.std(dim=1, keepdim=True, unbiased=std == "unbiased")
    return (centred / (spread + eps)).flatten(0, 1)


def without_history(reward: Tensor, valid: Tensor, group_size: int) -> Tensor:
    """Take out of each frame's reward what the frame before it already decided: `R[b, m] - beta R[b, m - 1]`.

    A reward that adds up mistakes, such as that of a drag, is mostly a matter of the history, and the action of frame m
    has no part in that. The previous frame's reward is known before the action, so this is a baseline: the
    expected gradient stays and its variance falls by the share that beta explains. One beta for the whole batch, by
    least squares on deviations from the group's mean; 0 where the previous frame's rewards have no spread. Beta is
    found on the batch it serves, which biases the gradient by the order of one over the number of samples.

    Args:
        reward: `[B, M]`; samples of a group stand together.
        valid: `[B, M]` bool, whole groups; the others have no part in beta.
        group_size: G, dividing B.

    Returns:
        `[B, M]`; frame 0 is as it was.
    """
    import torch

    grouped = reward.float().unflatten(0, (-1, group_size))
    centred = (grouped - grouped.mean(dim=1, keepdim=True)).flatten(0, 1)
    both = valid[:, 1:] & valid[:, :-1]
    now, before = centred[:, 1:].where(both, 0), centred[:, :-1].where(both, 0)
    energy = before.square().sum()
    beta = torch.where(energy > 0, (now * before).sum() / energy, 0.0)
    return torch.cat([reward[:, :1], reward[:, 1:] - beta * reward[:, :-1]], dim=1)


def shuffle_in_groups(advantage: Tensor, group_size: int, seed: int) -> Tensor:
    """Permute whole rows of `advantage [B, M]` inside each group: the control in which nothing can be learned."""
    import torch

    draws = torch.Generator().manual_seed(seed)
    rows = [g * group_size + torch.randperm(group_size, generator=draws) for g in range(len(advantage) // group_size)]
    return advantage[torch.cat(rows)]
