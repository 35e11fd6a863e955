"""One mini-batch, however it is cut: into processes, and into parts inside each. The update is the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from runtime.guard import NonFinite
from runtime.team import Team

if TYPE_CHECKING:
    from runtime.trainer import Trainer

# Metrics of which the largest counts, not the mean.
LARGEST = ("log_prob_gap", "ratio_deviation")
GAP = "log_prob_gap"


class Learner:
    """Takes one optimizer step per mini-batch.

    Every loss is a mean over some entries of the mini-batch: each part's is weighted by its share of them, so that
    parts and processes add up to the whole.

    Args:
        loss_module: of the algorithm.
        trainer: takes the steps.
        team: the processes.
        parts: that each process cuts its rows of a mini-batch into; see `pieces_of`.
        block: rows that must stay together.
        largest_gap: between log-probs of acting and of re-scoring, on the first mini-batch.
    """

    def __init__(
        self, loss_module: Any, trainer: Trainer, team: Team, parts: int, block: int, largest_gap: float
    ) -> None:
        self.loss_module, self.trainer, self.team = loss_module, trainer, team
        self.parts, self.block, self.largest_gap = parts, block, largest_gap

    def learn(
        self, rollout: TensorDictBase, whole: TensorDictBase, indices: Tensor, first: bool
    ) -> dict[str, float] | None:
        """Take a step on rows `indices` of all processes' rollouts.

        Args:
            rollout: this process's.
            whole: the light entries of all; see `Team.rows`.
            indices: rows of `whole`.
            first: the weights are those that acted.

        Returns:
            Losses and metrics, the same in all processes; None where no row of the mini-batch counts.

        Raises:
            NonFinite: a loss or a gradient is not finite; nothing has changed.
            RuntimeError: re-scored log-probs differ from those of acting by more than rounding, and `first`.
        """
        if not whole["mask"][indices].any():
            return None  # a step without gradient would still move the weights: AdamW has momentum
        split = self.team.size * self.parts > 1
        sizes = self.loss_module.sizes(whole[indices]) if split else {}
        rows = []
        pieces = pieces_of(indices, self.team, len(rollout), self.parts, self.block)
        for number, piece in enumerate(pieces):
            rows.append(self._part(rollout, piece, sizes, number == len(pieces) - 1))
        metrics = combined([row for mine in self.team.collect(rows) for row in mine])
        bad = sorted(k for k, v in metrics.items() if k.startswith("loss_") and not math.isfinite(v))
        if not bad and first and GAP in metrics:
            self._check_gap(metrics[GAP])
        norm = self.trainer.step()
        if bad or not math.isfinite(norm):
            raise NonFinite("loss" if bad else "gradient", ", ".join(bad) or f"its norm is {norm}", indices)
        return {**metrics, "grad_norm": norm}

    def _part(
        self, rollout: TensorDictBase, piece: tuple[Tensor, bool], sizes: Mapping[str, float], last: bool
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Add the gradient of one part; returns the shares of its metrics and the metrics."""
        rows, counts = piece
        batch = rollout[rows]
        found = self.loss_module(batch)
        losses = {k: v for k, v in found.items() if k.startswith("loss_")}
        share = {k: 1.0 for k in found.keys()}  # noqa: SIM118  a TensorDict
        if sizes:
            own = self.loss_module.sizes(batch)
            share = {k: counts * of(own, k) / max(of(sizes, k), 1.0) for k in share}
            losses = {k: v * share[k] for k, v in losses.items()}
        if not all(math.isfinite(float(v.detach())) for v in losses.values()):
            # An infinite loss may have a finite gradient: make sure that no process takes the step.
            losses = {k: v * math.nan for k, v in losses.items()}
        self.trainer.backward(losses, last)
        return share, {k: float(v.detach()) for k, v in found.items()}

    def _check_gap(self, gap: float) -> None:
        if not gap <= self.largest_gap:
            raise RuntimeError(
                f"re-scored log-probs differ from those of acting by {gap:.2e}, "
                f"more than the {self.largest_gap:.0e} of rounding: "
                f"policy and environment disagree, nothing learned from this is right"
            )


def pieces_of(indices: Tensor, team: Team, own: int, parts: int, block: int) -> list[tuple[Tensor, bool]]:
    """Cut this process's rows of a mini-batch into parts.

    A mini-batch is drawn from all rows, so a process may have more of them than others: there are then more parts than
    asked for, of no more rows than if it had its share, for memory is planned for these. A process goes through the
    network as often as the others do (ZeRO-3 waits for it): a part without rows computes some that do not count.

    Args:
        indices: rows of the mini-batch, among those of all processes; blocks stand together.
        team: the processes.
        own: rows of each process.
        parts: asked for, of a process's share.
        block: rows that must stay together.

    Returns:
        For each part its rows in this process, and whether they count.
    """
    blocks = indices.view(-1, block)
    owner = blocks[:, 0] // own
    largest = -(-len(blocks) // (team.size * parts))
    needed = -(-int(owner.bincount().max()) // largest)
    mine = blocks[owner == team.rank] - team.rank * own
    stand_in = torch.arange(block, device=indices.device)
    cut = [part.flatten() for part in mine.tensor_split(max(parts, needed))]
    return [(part, True) if len(part) else (stand_in, False) for part in cut]


def of(sizes: Mapping[str, float], name: str) -> float:
    """Entries that a loss or metric is the mean over."""
    return sizes.get(name, sizes[""])


def combined(rows: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, float]:
    """Metrics of a mini-batch from those of its parts and their shares."""
    if len(rows) == 1:
        return rows[0][1]
    out = {}
    for name in rows[0][1]:
        counted = [(share[name], row[name]) for share, row in rows if share[name] > 0 or not math.isfinite(row[name])]
        largest = name in LARGEST
        out[name] = max((v for _, v in counted), default=0.0) if largest else sum(s * v for s, v in counted)
    return out
