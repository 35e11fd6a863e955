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


def credited(reward: Tensor, credit: str, chunk: int = 1) -> Tensor:
    """What each frame answers for, `[B, M]`: `per_frame` its own reward (AR-Drag Eq. 13), `return_to_go` the sum of its
    own and all later ones, `clip` the sum over the clip.

    Frames of a chunk see each other while they are denoised, and end together: none of them is later than another, so
    `return_to_go` is the same for all of them. `chunk` divides M.
    """
    reward = reward.float()
    if credit == "return_to_go":
        paid = reward.unflatten(1, (-1, chunk)).sum(2)
        return paid.flip(1).cumsum(1).flip(1).repeat_interleave(chunk, 1)
    return reward.sum(1, keepdim=True).expand_as(reward) if credit == "clip" else reward


def group_advantage(
    score: Tensor,
    group_size: int,
    std: str = "unbiased",
    normalize: str = "group",
    eps: float = 1e-4,
    valid: Tensor | None = None,
) -> Tensor:
    """Advantage relative to the group, for each latent frame on its own (AR-Drag section 3.3, below Eq. 13).

    `A[b, m] = (R[b, m] - mean) / (std + eps)`, the mean over the samples of b's group. A group without spread gets
    exactly 0.

    Args:
        score: `[B, M]`; samples of a group stand together.
        group_size: G of 2 or more, dividing B.
        std: `unbiased` divides by G - 1, `biased` by G; at G = 4 they differ by 15 %.
        normalize: `group`: the spread of b's group at frame m; `global`: the root mean square of the groups' spreads,
            one number for the batch, so that a group without spread does not blow up its noise.
        eps: added to the standard deviation, in units of reward.
        valid: `[B, M]` bool, whole groups; the others have no part in the global spread. None: all are valid.

    Raises:
        ValueError: a group of one, a B that G does not divide, or an unknown convention.
    """
    if group_size < 2 or score.shape[0] % group_size:
        raise ValueError(f"advantages need groups of 2 or more that divide {score.shape[0]} samples, got {group_size}")
    if std not in STD:
        raise ValueError(f"unknown std convention {std!r}; choose one of {', '.join(STD)}")
    grouped = score.float().unflatten(0, (-1, group_size))
    # Measured from the first sample: the mean of equal numbers is rounded, and eps would blow up what is left.
    grouped = grouped - grouped[:, :1]
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    spread = grouped.std(dim=1, keepdim=True, unbiased=std == "unbiased")
    if normalize == "global":
        kept = spread.new_ones(spread.shape) if valid is None else valid[::group_size, None].to(spread)
        spread = ((spread.square() * kept).sum() / kept.sum().clamp(min=1)).sqrt()
    return (centred / (spread + eps)).flatten(0, 1)


def last_finished(frames: int, chunk: int) -> Tensor:
    """The frame that was finished last when frame m began, for m = `chunk` .. `frames` - 1: m - 1 where chunks are of
    one frame, else the last of the chunk before, `[frames - chunk]` int64.
    """
    import torch

    return torch.arange(chunk, frames) // chunk * chunk - 1


def without_history(score: Tensor, reward: Tensor, valid: Tensor, group_size: int, chunk: int = 1) -> Tensor:
    """Take out of each frame's score what the frame finished before it already decided: `S[b, m] - beta R[b, m - 1]`.

    A reward that adds up mistakes, such as that of a drag, is mostly a matter of the history, and the action of frame m
    has no part in that. The previous frame's reward is known before the action, so this is a baseline: the
    expected gradient stays and its variance falls by the share that beta explains. One beta for the whole batch, by
    least squares on deviations from the group's mean; 0 where the previous frame's rewards have no spread. Beta is
    found on the batch it serves, which biases the gradient by the order of one over the number of samples.

    Args:
        score: `[B, M]`, see `credited`; samples of a group stand together.
        reward: `[B, M]`, of each frame.
        valid: `[B, M]` bool, whole groups; the others have no part in beta.
        group_size: G, dividing B.
        chunk: frames that are denoised together; for all of them it is the last frame of the chunk before.

    Returns:
        `[B, M]`; the first chunk is as it was.
    """
    import torch

    def centred(values: Tensor) -> Tensor:
        grouped = values.float().unflatten(0, (-1, group_size))
        return (grouped - grouped.mean(dim=1, keepdim=True)).flatten(0, 1)

    past = last_finished(reward.shape[1], chunk).to(reward.device)
    both = valid[:, chunk:] & valid[:, past]
    now, before = centred(score)[:, chunk:].where(both, 0), centred(reward)[:, past].where(both, 0)
    energy = before.square().sum()
    beta = torch.where(energy > 0, (now * before).sum() / energy, 0.0)
    return torch.cat([score[:, :chunk], score[:, chunk:] - beta * reward[:, past]], dim=1)


def typical_spread(score: Tensor, group_size: int, valid: Tensor) -> float:
    """Root mean square, over frames and groups without a failure, of the standard deviation of `score [B, M]` inside a
    group; 0 where no group is valid.
    """
    inside = score.float().unflatten(0, (-1, group_size)).std(dim=1)[valid[::group_size, 0]]
    return float(inside.square().mean().sqrt()) if inside.numel() else 0.0


def pair_roles(score: Tensor, group_size: int, pairs: int, margin: float) -> Tensor:
    """Pair the best sample of a group with the worst, the second best with the second worst, and so on.

    Args:
        score: `[B, M]`; samples of a group stand together.
        group_size: G, dividing B.
        pairs: K, at most G / 2.
        margin: pairs whose scores differ by no more than this are left out; equal scores are never a pair.

    Returns:
        `[B, M, K]`: 1 for the preferred sample of pair k, -1 for the other, 0 elsewhere.

    Raises:
        ValueError: the group has fewer than 2 K samples.
    """
    import torch

    if 2 * pairs > group_size:
        raise ValueError(f"algorithm.pairs={pairs} needs groups of {2 * pairs} or more, got {group_size}")
    grouped = score.float().unflatten(0, (-1, group_size))
    order = grouped.argsort(dim=1, stable=True)
    low, high = order[:, :pairs], order.flip(1)[:, :pairs]
    apart = (grouped.gather(1, high) - grouped.gather(1, low)) > margin
    role = torch.zeros(*grouped.shape, pairs, device=score.device)
    for k in range(pairs):
        role[..., k].scatter_(1, high[:, k : k + 1], apart[:, k : k + 1].float())
        role[..., k].scatter_(1, low[:, k : k + 1], -apart[:, k : k + 1].float())
    return role.flatten(0, 1)


def shuffle_in_groups(advantage: Tensor, group_size: int, seed: int) -> Tensor:
    """Permute whole rows of `advantage [B, M]` inside each group: the control in which nothing can be learned."""
    import torch

    draws = torch.Generator().manual_seed(seed)
    rows = [g * group_size + torch.randperm(group_size, generator=draws) for g in range(len(advantage) // group_size)]
    return advantage[torch.cat(rows)]
