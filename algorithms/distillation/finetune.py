"""The bidirectional model: image-to-video without control, then fine-tuned to follow a drag (AR-Drag Eq. 7).

A bidirectional pass is the parallel pass with one chunk that covers the clip: diffusers' own forward, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from algorithms.distillation.losses import flow_matching_loss
from algorithms.distillation.noise import noised, shifted
from algorithms.distillation.pool import LatentPool
from algorithms.distillation.settings import FineTune
from algorithms.pretraining.loop import Fit, Record, matrices, never, optimise, unrecorded
from data.draws import Stream, generator, seed_of
from envs.control import MASK_CHANNELS
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.ema import EMA, averaged

if TYPE_CHECKING:
    from pathlib import Path


def bidirectional(frames: int) -> Causality:
    """The rule under which every frame sees every other: one chunk."""
    return Causality(chunk=frames, window=0)


def fresh(model: CausalWanTransformer3DModel, seed: int) -> CausalWanTransformer3DModel:
    """A model of the same shape with random weights and no control: its channels' weights are zero."""
    channels = model.config.out_channels
    plain = {**model.config, "in_channels": 2 * channels + MASK_CHANNELS}
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(Stream.TRAINING, seed))
        return add_control(type(model).from_config(plain))


def add_control(model: CausalWanTransformer3DModel) -> CausalWanTransformer3DModel:
    """A copy whose patch embedding takes the control latent too, through weights that start at zero: the same function.

    Raises:
        ValueError: the model has control already.
    """
    old, channels = model.config, model.config.out_channels
    plain = 2 * channels + MASK_CHANNELS
    if old.in_channels != plain:
        raise ValueError(f"a model without control takes {plain} channels, this one {old.in_channels}")
    with torch.random.fork_rng():  # a new model draws weights, which are replaced
        wide = type(model).from_config({**old, "in_channels": plain + channels})
    wide = wide if model.dtype == wide.dtype else wide.to(model.dtype)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    embedding = weights["patch_embedding.weight"]
    extra = embedding.new_zeros(embedding.shape[0], channels, *embedding.shape[2:])
    weights["patch_embedding.weight"] = torch.cat([embedding, extra], 1)
    wide.load_state_dict(weights)
    return wide


def velocity(model: CausalWanTransformer3DModel, x: Tensor, sigma: Tensor, condition: Tensor, text: Tensor) -> Tensor:
    """Bidirectional velocity `[B, M, C, h, w]` of noisy frames at noise levels `sigma [B, M]`."""
    inputs = torch.cat([x, condition], 2)
    return model.parallel(inputs, inputs, sigma, text, causality=bidirectional(x.shape[1]))


def finetune(
    pools: list[LatentPool],
    stage: FineTune,
    model: CausalWanTransformer3DModel,
    negative: Tensor,
    steps: int,
    seed: int = 0,
    report: Callable[[str], None] = print,
    state: Path | None = None,
    stop: Callable[[], bool] = never,
    record: Record = unrecorded,
) -> tuple[CausalWanTransformer3DModel, float]:
    """Train `model` in place by flow matching on clips of every frame size in turn.

    Args:
        pools: encoded clips, one pool per frame size.
        stage: settings.
        model: whatever of it requires gradient trains.
        negative: embedding of the shared negative prompt, `[1, L, D]`.
        steps: optimizer steps.
        seed: of clips and noise.
        report: takes a line of progress.
        state, stop, record: see `optimise`.

    Returns:
        The model with its averaged weights, and the seconds of training.
    """
    ema = EMA(model, stage.ema)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x0, condition, text = pools[step % len(pools)].sample((seed, 7, step), stage.batch)
        if not stage.control:
            condition = torch.cat([condition[:, :, : -x0.shape[2]], torch.zeros_like(x0)], 2)
        rng = generator(Stream.TRAINING, seed, 8, step)
        dropped = torch.from_numpy(rng.uniform(size=len(x0)) < stage.text_dropout).to(x0.device)
        text = torch.where(dropped[:, None, None], negative, text)
        u = torch.from_numpy(rng.uniform(size=(len(x0), 1))).float().to(x0.device)
        sigma = shifted(u, stage.shift).expand(x0.shape[:2])
        eps = torch.from_numpy(rng.standard_normal(tuple(x0.shape), dtype="float32")).to(x0.device)
        v = velocity(model, noised(x0, eps, sigma), sigma, condition, text)
        return flow_matching_loss(v, x0, eps)[0], {}

    trained = [p for p in model.parameters() if p.requires_grad]
    fit, shaped = Fit(steps, stage.lr), matrices(model)
    seconds = optimise(trained, fit, loss_of, "finetune", report, ema, shaped, state, stop, record)
    return averaged(model, ema), seconds
