"""How much of an update is signal: `python experiments/agreement.py updates=16 reward=motion adaptation=attention`.

Rolls out and scores `updates` times at fixed weights, each time other clips, and compares the gradients. The mean
cosine between two of them is the share of an update's energy that every rollout agrees on; the rest is noise. It tells
within minutes whether a reward, an advantage, a schedule or a choice of layers can teach this policy anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.cli import main, setup_phase
from runtime.config import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.session import Session


def agreement(gradients: Tensor) -> tuple[float, float]:
    """Mean cosine between rows of `gradients [n, D]`, n of 3 or more, and its jackknife standard error.

    Each coordinate is divided by its root mean square over the rows first, as Adam does.
    """
    import torch

    scaled = gradients / gradients.square().mean(0).sqrt().clamp(min=torch.finfo(gradients.dtype).tiny)
    gram = (scaled @ scaled.T).double()

    def share(rows: Tensor) -> float:
        part = gram[rows][:, rows]
        n, energy = len(rows), part.trace()
        return float((part.sum() - energy) / (n - 1) / energy)

    n = len(gram)
    every = torch.arange(n)
    without = torch.tensor([share(every[every != i]) for i in range(n)])
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return share(every), float(error)


def gradient(session: Session, iteration: int) -> Tensor:
    """Gradient `[D]` of one update's objective on the clips of an iteration; the weights stay."""
    import torch

    session.iteration = iteration
    rollout = session.rollout()
    session.score(rollout, session.decode(rollout))
    session.loss_module.begin(rollout)
    loss = session.loss_module(rollout)["loss_objective"]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, session.parameters)])


def run(plan: Plan) -> None:
    """Print the agreement of the gradients of `updates` rollouts."""
    import torch
    from rich.progress import track

    from runtime.session import Session

    rollouts = plan.settings.updates
    with setup_phase():
        if rollouts < 3:
            raise ValueError(f"updates={rollouts}: gradients of at least 3 rollouts are compared; try updates=16")
        session = Session(plan.settings, plan.config)
    gradients = torch.stack([gradient(session, i) for i in track(range(rollouts), "rollouts")])
    share, error = agreement(gradients)
    print(f"{rollouts} rollouts, {gradients.shape[1]} weights: {share:.4f} ± {error:.4f} of an update is signal")


if __name__ == "__main__":
    main("agreement", run)
