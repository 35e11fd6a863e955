"""How much of an update is signal: `python experiments/agreement.py updates=16 reward=motion adaptation=attention`.

Rolls out and scores `updates` times at fixed weights, each time other clips, and compares the gradients of single
prompts. The mean cosine between two of them is the share of an update's energy that every prompt agrees on; the rest is
noise. It tells within minutes whether a reward, an advantage, a schedule or a choice of layers can teach this policy
anything. Done for groups of 4, 8, ... samples up to `rollout.group_size`; the result is `<run_dir>/agreement.json`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli import main, setup_phase
from runtime.config import Plan

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torch import Tensor

    from runtime.session import Session

SMALLEST = 4


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


def group_sizes(largest: int) -> list[int]:
    """Doublings of the smallest group up to `largest`, which is among them: `[4, 8, 12]` for 12."""
    found = [SMALLEST * 2**k for k in range(largest.bit_length()) if SMALLEST * 2**k < largest]
    return [*found, largest]


def gradients(session: Session, rollout: TensorDictBase, size: int) -> Tensor:
    """Gradient `[P, D]` of every prompt's objective from the first `size` samples of its group; the weights stay.

    Advantages are those of an update of all prompts with groups of this size.
    """
    import torch

    settings = session.settings
    count, group = settings.rollout.prompts, settings.rollout.group_size
    rows = torch.arange(count * group).view(count, group)[:, :size]
    part = rollout[rows.flatten()]
    settings.algorithm.prepare(part, size, settings.rollout.chunk)
    session.loss_module.begin(part)
    found = []
    for prompt in part.split(size):
        loss = session.loss_module(prompt)["loss_objective"]
        each = torch.autograd.grad(loss, session.parameters, allow_unused=True)
        found.append(
            torch.cat(
                [
                    torch.zeros(p.numel()) if g is None else g.flatten().cpu()
                    for p, g in zip(session.parameters, each, strict=True)
                ]
            )
        )
    return torch.stack(found)


def measure(session: Session, rollouts: int) -> dict[str, Any]:
    """Signal by group size, spread of returns, quality of the rollouts and seconds per sample, at fixed weights."""
    import torch
    from rich.progress import track

    r = session.settings.rollout
    found: dict[int, list[Tensor]] = {size: [] for size in group_sizes(r.group_size)}
    rows, seconds = [], {"rollout": 0.0, "update": 0.0}
    for i in track(range(rollouts), "rollouts"):
        session.iteration, began = i, time.perf_counter()
        rollout = session.rollout()
        seconds["rollout"] += time.perf_counter() - began
        metrics = session.score(rollout, session.decode(rollout))
        returns = rollout["reward"].sum(1).unflatten(0, (-1, r.group_size))
        rows.append({**metrics, "return_std": float(returns.std(1).mean())})
        for size, parts in found.items():
            began = time.perf_counter()
            parts.append(gradients(session, rollout, size))
            seconds["update"] += time.perf_counter() - began if size == r.group_size else 0.0
    signal = {size: agreement(torch.cat(parts)) for size, parts in found.items()}
    samples = rollouts * r.prompts * r.group_size
    return {
        "prompts": rollouts * r.prompts,
        "signal": {str(size): {"share": share, "error": error} for size, (share, error) in signal.items()},
        "metrics": {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]},
        "seconds_per_sample": {name: value / samples for name, value in seconds.items()},
    }


def run(plan: Plan) -> None:
    """Measure, print, and write `agreement.json`."""
    import torch

    from envs.transitions import excess_noise
    from runtime.checkpoint import replace_text
    from runtime.session import Session

    settings, rollouts = plan.settings, plan.settings.updates
    with setup_phase():
        if rollouts * settings.rollout.prompts < 3:
            raise ValueError(f"updates={rollouts}: gradients of at least 3 prompts are compared; try updates=16")
        session = Session(settings, plan.config)
    found = measure(session, rollouts)
    sigma = torch.tensor(settings.rollout.sigmas)
    excess = excess_noise(settings.transition, sigma[:-2], sigma[1:-1]).tolist()
    folder = Path(str(settings.run_dir))
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(
        folder / "agreement.json", json.dumps({**found, "excess_noise": excess, "config": plan.config}, indent=1)
    )
    for size, value in found["signal"].items():
        print(
            f"{found['prompts']} prompts, groups of {size}: {value['share']:.4f} ± {value['error']:.4f} of a prompt's "
            f"gradient is signal"
        )


if __name__ == "__main__":
    main("agreement", run)
