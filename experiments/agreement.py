"""How much of an update is signal: `python experiments/agreement.py updates=16 rollout.group_size=16 reward=motion`.

Rolls out and scores `updates` times at fixed weights, each time other clips, and compares gradients of single groups of
samples. What two groups of one prompt agree on is the policy gradient of that prompt, the rest is noise of sampling:
their mean cosine is the share of signal `within` a prompt. The two come from the two halves of its samples, which
differ in all that a group shares when it acts: which steps are stochastic, initial noise. What groups of two prompts
agree on (`across`) is the part that helps other clips too. It tells within minutes what a reward, an advantage, a
schedule or a choice of layers can teach this policy. Done for groups of 4, 8, ... samples, up to half of
`rollout.group_size`; the result is `<run_dir>/agreement.json`. Among it are the same shares of `REPLICATES` resamples
of the prompts, the same resamples in every run of as many prompts, so that two runs can be compared pair by pair.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli import main, setup_phase
from runtime.config import Plan

if TYPE_CHECKING:
    from tensordict import TensorDict, TensorDictBase
    from torch import Tensor

    from data.clip import ClipBatch
    from runtime.episodes import Episodes
    from runtime.session import Session

SMALLEST, REPLICATES = 4, 200
KINDS = ("within", "across")


def agreement(gradients: Tensor) -> dict[str, dict[str, Any]]:
    """Share of a group's gradient that is signal: mean inner product of two groups over mean energy of one.

    Each coordinate is divided by its root mean square first, as Adam does.

    Args:
        gradients: `[n, k, D]` of k groups, an even number, of n prompts, 2 or more.

    Returns:
        For pairs of groups, of the two halves of a prompt's (`within`) and of two prompts (`across`): `share`, its
        jackknife standard error over prompts `error`, and `replicates`: shares of resampled prompts.
    """
    import numpy as np
    import torch

    n, k, _ = gradients.shape
    scale = gradients.square().mean((0, 1)).sqrt()
    total, own, energy = torch.zeros(n, n).double(), torch.zeros(n).double(), torch.zeros(n).double()
    for part, unit in zip(gradients.split(1 << 14, 2), scale.split(1 << 14), strict=True):  # never all in float64
        scaled = (part[..., unit > 0] / unit[unit > 0]).double()
        first, second = (half.sum(1) for half in scaled.split(k // 2, 1))
        sums = first + second
        total = total + sums @ sums.T
        own = own + (first * second).sum(1)
        energy = energy + scaled.square().sum((1, 2))
    norm, inner = (energy / k).numpy(), (own / (k // 2) ** 2).numpy()
    cross = (total / k**2).fill_diagonal_(0.0).numpy()  # a prompt drawn twice is no pair of prompts

    def shares(times: Any) -> dict[str, float]:
        power, pairs = float(times @ norm), times.sum() ** 2 - np.square(times).sum()
        across = times @ cross @ times / pairs * times.sum() / power if pairs else float("nan")
        return {"within": float(times @ inner / power), "across": float(across)}

    without = [shares(1.0 - row) for row in np.eye(n)]
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=REPLICATES).astype(float)
    drawn, found = [shares(row) for row in draws], {}
    for kind, share in shares(np.ones(n)).items():
        left = np.array([row[kind] for row in without])
        error = float(np.sqrt((n - 1) / n * np.square(left - left.mean()).sum()))
        found[kind] = {"share": share, "error": error, "replicates": [float(f"{row[kind]:.5g}") for row in drawn]}
    return found


def group_sizes(samples: int) -> list[int]:
    """Doublings of the smallest group of which two fit into `samples`; half of them where they are few."""
    found = [SMALLEST * 2**k for k in range(samples.bit_length()) if 2 * SMALLEST * 2**k <= samples]
    return found or [samples // 2]


def gradients(session: Session, rollout: TensorDictBase, sizes: list[int]) -> dict[int, Tensor]:
    """Gradients of the objective of single groups; the weights stay.

    Args:
        session: its `rollout.group_size` is a multiple of every size.
        rollout: scored.
        sizes: samples of a group.

    Returns:
        By size `[P, k, D]`: of each of the k groups of that size that a prompt's samples make.
    """
    import torch

    compared, settings = {}, session.settings
    for size in sizes:
        compared[size] = rollout.clone(recurse=False)
        settings.algorithm.prepare(compared[size], size, settings.rollout.chunk)
        session.loss_module.begin(compared[size])
    found: dict[int, list[Tensor]] = {size: [] for size in sizes}
    for rows in torch.arange(len(rollout)).split(settings.rollout.group_size):
        for size, batch in compared.items():
            found[size].append(torch.stack([_gradient(session, batch[part]) for part in rows.split(size)]))
    return {size: torch.stack(prompts) for size, prompts in found.items()}


def _gradient(session: Session, batch: TensorDictBase) -> Tensor:
    """Gradient `[D]` of the objective. Weights that take no part have gradient 0."""
    import torch

    loss = session.loss_module(batch)["loss_objective"]
    each = torch.autograd.grad(loss, session.parameters, allow_unused=True)
    pairs = zip(session.parameters, each, strict=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten().cpu() for p, g in pairs])


def _halved(episodes: Episodes) -> Episodes:
    """Episodes whose prompts are each begun twice, with half of the samples: two draws of whatever a group shares."""
    from runtime.episodes import Episodes

    class Halved(Episodes):
        def begin(
            self, clips: ClipBatch, group_size: int, seed: int, iteration: int, first_prompt: int = 0
        ) -> tuple[TensorDict, ClipBatch]:
            return super().begin(clips.repeat(2), group_size // 2, seed, iteration, first_prompt)

    return Halved(**vars(episodes))


def measure(session: Session, rollouts: int) -> dict[str, Any]:
    """Signal by group size, spread of returns, quality of the rollouts and seconds per sample, at fixed weights."""
    import torch
    from rich.progress import track

    r = session.settings.rollout
    sizes = group_sizes(r.group_size)
    session.episodes = _halved(session.episodes)
    found: dict[int, list[Tensor]] = {size: [] for size in sizes}
    rows, seconds = [], {"rollout": 0.0, "update": 0.0}
    for i in track(range(rollouts), "rollouts"):
        session.iteration, began = i, time.perf_counter()
        rollout = session.rollout()
        seconds["rollout"] += time.perf_counter() - began
        metrics = session.score(rollout, session.decode(rollout))
        returns = rollout["reward"].sum(1).unflatten(0, (-1, r.group_size))
        rows.append({**metrics, "return_std": float(returns.std(1).mean())})
        began = time.perf_counter()
        one = rollout[: r.group_size]
        session.loss_module.begin(one)
        _gradient(session, one)
        seconds["update"] += time.perf_counter() - began
        for size, parts in gradients(session, rollout, sizes).items():
            found[size].append(parts)
    prompts = rollouts * r.prompts
    return {
        "prompts": prompts,
        "signal": {str(size): agreement(torch.cat(parts)) for size, parts in found.items()},
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
        samples = settings.rollout.group_size
        if rollouts * settings.rollout.prompts < 3:
            raise ValueError(f"updates={rollouts}: gradients of at least 3 prompts are compared; try updates=16")
        if samples < 4 or any(samples % (2 * size) for size in group_sizes(samples)):
            raise ValueError(
                f"rollout.group_size={samples}: its halves are not groups of {group_sizes(samples)}; try 16 or 64"
            )
        session = Session(settings, plan.config)
    found = measure(session, rollouts)
    sigma = torch.tensor(settings.rollout.sigmas)
    excess = excess_noise(settings.transition, sigma[:-2], sigma[1:-1]).tolist()
    folder = Path(str(settings.run_dir))
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(
        folder / "agreement.json", json.dumps({**found, "excess_noise": excess, "config": plan.config}, indent=1)
    )
    for size, kinds in found["signal"].items():
        values = ", ".join(f"{kinds[kind]['share']:.4f} ± {kinds[kind]['error']:.4f} {kind}" for kind in KINDS)
        print(f"{found['prompts']} prompts, groups of {size}: share of a group's gradient that is signal: {values}")


if __name__ == "__main__":
    main("agreement", run)
