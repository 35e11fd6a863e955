"""How much of an update is signal: `python experiments/agreement.py updates=16 reward=motion adaptation=attention`.

Rolls out and scores `updates` times at fixed weights, each time other clips, and compares the gradients of single
prompts. The mean cosine between two of them is the share of an update's energy that every prompt agrees on; the rest is
noise. It tells within minutes whether a reward, an advantage, a schedule or a choice of layers can teach this policy
anything. Done for groups of 4, 8, ... samples up to `rollout.group_size`: a rollout's samples are compared in all its
groups of that size. The result is `<run_dir>/agreement.json`; among it are the same shares of `REPLICATES` resamples of
the prompts, the same resamples in every run of as many prompts, so that two runs can be compared pair by pair.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli import main, setup_phase
from runtime.config import Plan

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torch import Tensor

    from policies.actor import Actor
    from runtime.session import Session

SMALLEST, REPLICATES = 4, 200
Signal = dict[str, Any]


def agreement(whole: Tensor, first: Tensor, second: Tensor) -> Signal:
    """Share of a prompt's gradient that prompts agree on: mean inner product of two prompts over mean energy of one.

    Each coordinate is divided by its root mean square over prompts first, as Adam does. That and the energy come from
    different groups where there are several: otherwise noise in the one would count as signal in the other.

    Args:
        whole: gradients `[n, D]` of n prompts, 3 or more, each the mean over the prompt's groups.
        first, second: gradients `[n, D]` of one group of each prompt, and of another; the same where it has only one.

    Returns:
        `share`, its jackknife standard error `error`, and `replicates`: shares of resampled prompts.
    """
    import numpy as np

    scale = first.square().mean(0).sqrt()
    alive = scale > 0
    energy = (second[:, alive] / scale[alive]).square().sum(1).double().numpy()
    scaled = (whole[:, alive] / scale[alive]).double()
    gram = (scaled @ scaled.T).numpy()
    np.fill_diagonal(gram, 0.0)  # a prompt says nothing about its agreement with itself, drawn twice or not

    def share(times: Any) -> float:
        pairs = times.sum() ** 2 - np.square(times).sum()
        return float(times @ gram @ times / pairs * times.sum() / (times @ energy)) if pairs else float("nan")

    n = len(gram)
    without = np.array([share(1.0 - row) for row in np.eye(n)])
    error = float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum()))
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=REPLICATES).astype(float)
    return {"share": share(np.ones(n)), "error": error, "replicates": [float(f"{share(row):.5g}") for row in draws]}


def group_sizes(largest: int) -> list[int]:
    """Doublings of the smallest group up to `largest`, which is among them: `[4, 8, 12]` for 12."""
    found = [SMALLEST * 2**k for k in range(largest.bit_length()) if SMALLEST * 2**k < largest]
    return [*found, largest]


@contextmanager
def scored_once(actor: Actor, batch: TensorDictBase) -> Iterator[None]:
    """Within this, samples of `batch` are scored in one pass whose graph is kept, however often they are asked for."""
    from functools import cache

    evaluate = actor.evaluate
    scores, keys = cache(lambda: evaluate(batch)), batch["key"]

    def remembered(part: TensorDictBase) -> TensorDictBase:
        return scores()[(part["key"][:, None] == keys).all(-1).nonzero()[:, 1]]

    setattr(actor, "evaluate", remembered)  # noqa: B010 - the instance's, which hides the method
    try:
        yield
    finally:
        delattr(actor, "evaluate")


def gradients(session: Session, rollout: TensorDictBase, sizes: list[int]) -> dict[int, list[Tensor]]:
    """Gradients of every prompt's objective where its samples are compared in groups of each size; the weights stay.

    Args:
        session: its `rollout.group_size` is a multiple of every size.
        rollout: scored.
        sizes: samples of a group.

    Returns:
        By size what `agreement` takes, `[P, D]` each: of all groups of a prompt, of its first, of its second.
    """
    import torch

    compared = {}
    for size in sizes:
        compared[size] = rollout.clone(recurse=False)
        session.settings.algorithm.prepare(compared[size], size)
        session.loss_module.begin(compared[size])
    found: dict[int, list[list[Tensor]]] = {size: [] for size in sizes}
    for rows in torch.arange(len(rollout)).split(session.settings.rollout.group_size):
        with scored_once(session.actor, rollout[rows]):
            for size, batch in compared.items():
                parts = [rows, rows[:size], rows[size : 2 * size]] if size < len(rows) else [rows]
                each = [_gradient(session, batch[part]) for part in parts]
                found[size].append(each if len(each) > 1 else 3 * each)
    return {size: [torch.stack(each) for each in zip(*prompts, strict=True)] for size, prompts in found.items()}


def _gradient(session: Session, batch: TensorDictBase) -> Tensor:
    """Gradient `[D]` of the objective; its graph stays. Weights that take no part have gradient 0."""
    import torch

    loss = session.loss_module(batch)["loss_objective"]
    each = torch.autograd.grad(loss, session.parameters, allow_unused=True, retain_graph=True)
    pairs = zip(session.parameters, each, strict=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten().cpu() for p, g in pairs])


def measure(session: Session, rollouts: int) -> dict[str, Any]:
    """Signal by group size, spread of returns, quality of the rollouts and seconds per sample, at fixed weights."""
    import torch
    from rich.progress import track

    r = session.settings.rollout
    sizes = group_sizes(r.group_size)
    found: dict[int, list[list[Tensor]]] = {size: [] for size in sizes}
    rows, seconds = [], {"rollout": 0.0, "update": 0.0}
    for i in track(range(rollouts), "rollouts"):
        session.iteration, began = i, time.perf_counter()
        rollout = session.rollout()
        seconds["rollout"] += time.perf_counter() - began
        metrics = session.score(rollout, session.decode(rollout))
        returns = rollout["reward"].sum(1).unflatten(0, (-1, r.group_size))
        rows.append({**metrics, "return_std": float(returns.std(1).mean())})
        began = time.perf_counter()
        gradients(session, rollout[: r.group_size], [r.group_size])
        seconds["update"] += time.perf_counter() - began
        for size, parts in gradients(session, rollout, sizes).items():
            found[size].append(parts)
    signal = {size: agreement(*map(torch.cat, zip(*parts, strict=True))) for size, parts in found.items()}
    prompts = rollouts * r.prompts
    return {
        "prompts": prompts,
        "signal": {str(size): value for size, value in signal.items()},
        "metrics": {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]},
        "seconds_per_sample": {
            "rollout": seconds["rollout"] / (prompts * r.group_size),
            "update": seconds["update"] / (rollouts * r.group_size),
        },
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
        sizes, largest = group_sizes(settings.rollout.group_size), settings.rollout.group_size
        if any(largest % size for size in sizes):
            raise ValueError(f"rollout.group_size={largest}: groups of {sizes} are compared; try 8, 16 or 32")
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
