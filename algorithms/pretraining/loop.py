"""The one optimisation loop of the supervised stages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from policies.ema import EMA

EVERY = 500  # steps between two writings of the state


@dataclass(frozen=True)
class Fit:
    """How a supervised stage is optimised.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate: linear warm-up over 100 steps, then cosine to 2 %.
        betas: AdamW's.
        weight_decay: AdamW's.
        clip: largest gradient norm.
        share: learning rate of a step as a share of `lr`, in place of that warm-up and cosine.
    """

    steps: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-3
    clip: float = 1.0
    share: Callable[[int], float] | None = None


class Interrupted(Exception):
    """Training was asked to stop, and its state is kept."""


# Takes the number of steps done and what is to be logged of the last one.
Record = Callable[[int, dict[str, float]], None]


def never() -> bool:
    """Nobody asks to stop."""
    return False


def unread(line: str) -> None:
    """Nobody reads lines of progress."""


def unrecorded(step: int, metrics: dict[str, float]) -> None:
    """Nobody keeps metrics."""


def optimizers(weights: list[nn.Parameter], matrices: Iterable[nn.Parameter], fit: Fit) -> list[Optimizer]:
    """AdamW, and Muon for `matrices`: a tiny transformer learns more per step when the updates of its hidden layers are
    orthogonal (docs/notebook.md). Muon's steps are scaled to the size of AdamW's, so both share the learning rate.
    """
    import torch

    hidden = list(matrices)
    known = {id(p) for p in hidden}
    others = [p for p in weights if id(p) not in known]
    found: list[Optimizer] = []
    if others:
        found.append(torch.optim.AdamW(others, lr=fit.lr, betas=fit.betas, weight_decay=fit.weight_decay))
    if hidden:
        muon = torch.optim.Muon(hidden, lr=fit.lr, weight_decay=fit.weight_decay, adjust_lr_fn="match_rms_adamw")
        found.append(muon)
    return found


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weight matrices of the blocks that train: what Muon is for. The factors of adapters are not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2]
    return [p for name, p in named if name.startswith("blocks.") and ".lora_" not in name]


def learning_rate(fit: Fit, step: int) -> float:
    """Learning rate of a step (0-based)."""
    if fit.share is not None:
        return fit.lr * fit.share(step)
    return fit.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * math.cos(0.5 * math.pi * step / fit.steps) ** 2)


def optimise(
    parameters: Iterable[nn.Parameter],
    fit: Fit,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    name: str,
    report: Callable[[str], None],
    ema: EMA | None = None,
    matrices: Iterable[nn.Parameter] = (),
    state: Path | None = None,
    stop: Callable[[], bool] = never,
    record: Record = unrecorded,
) -> float:
    """Minimise `loss_of(step)`; report every 100 steps.

    Args:
        parameters: all that is trained.
        loss_of: gives the loss of a step and what to report beside it; a function of the step and the weights alone.
        ema: updated after every step.
        matrices: those of the parameters that Muon updates; the others are AdamW's.
        state: file that is written every `EVERY` steps and after the last; where it exists, training goes on from it.
        stop: asked before every step; where it says so the state is kept, and `Interrupted` raised.
        record: takes every step's metrics: loss, norm of its gradient before clipping, learning rate, what `loss_of`
            reports, and seconds.

    Returns:
        Seconds of training, over all parts of an interrupted run.
    """
    weights = list(parameters)
    steppers = optimizers(weights, matrices, fit)
    begin, spent = restore(state, weights, steppers, ema)
    started = time.perf_counter() - spent
    for step in range(begin, fit.steps):
        if stop():
            if state is not None and step > begin:
                keep(state, step, weights, steppers, ema, time.perf_counter() - started)
            raise Interrupted(f"{name}: stopped before step {step}")
        rate, watch = learning_rate(fit, step), Stopwatch()
        for group in (group for optimizer in steppers for group in optimizer.param_groups):
            group["lr"] = rate
        loss, extra = loss_of(step)
        value = float(loss.detach())  # a GPU has computed the loss, not just been asked to, before its seconds are read
        watch.lap("loss")
        norm = descend(loss, weights, steppers, fit.clip, f"{name}: the gradient of step {step}")
        if ema is not None:
            ema.update()
        watch.lap("update")
        record(step + 1, {"loss": value, "grad_norm": norm, "lr": rate, **extra, **watch.laps})
        if step % 100 == 0 or step == fit.steps - 1:
            values = " ".join(f"{k} {v:.4f}" for k, v in {"loss": value, **extra}.items())
            report(f"{name} {step}/{fit.steps} {values} {time.perf_counter() - started:.0f}s")
        if state is not None and ((step + 1) % EVERY == 0 or step == fit.steps - 1):
            keep(state, step + 1, weights, steppers, ema, time.perf_counter() - started)
    return time.perf_counter() - started


def descend(loss: Tensor, weights: list[nn.Parameter], steppers: list[Optimizer], clip: float, name: str) -> float:
    """Take a step down the gradient of a loss; its norm before clipping.

    Raises:
        FloatingPointError: the norm is not finite; `name` says whose.
    """
    import torch

    for optimizer in steppers:
        optimizer.zero_grad()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(weights, clip))
    if not math.isfinite(norm):
        raise FloatingPointError(f"{name} is not finite; the weights are as before it")
    for optimizer in steppers:
        optimizer.step()
    return norm


class Stopwatch:
    """Seconds of the phases of a step, as they are logged: `seconds/<phase>`."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """A phase ends, and the next begins."""
        now = time.perf_counter()
        self.laps[f"seconds/{phase}"], self._since = now - self._since, now


def keep(
    state: Path,
    step: int,
    weights: list[nn.Parameter],
    steppers: list[Optimizer],
    ema: EMA | None,
    seconds: float,
) -> None:
    """Write everything that training goes on from, whole or not at all; `seconds` is how long it has taken so far."""
    import torch

    content = {
        "step": step,
        "seconds": seconds,
        "weights": [p.detach() for p in weights],
        "optimizers": [optimizer.state_dict() for optimizer in steppers],
        "ema": ema.state_dict() if ema is not None else None,
    }
    torch.save(content, state.with_suffix(".new"))
    state.with_suffix(".new").replace(state)


def restore(
    state: Path | None, weights: list[nn.Parameter], steppers: list[Optimizer], ema: EMA | None
) -> tuple[int, float]:
    """Put back what `keep` wrote; return the step to go on with, and the seconds that those before it took."""
    import torch

    if state is None or not state.is_file():
        return 0, 0.0
    content = torch.load(state, weights_only=True, map_location="cpu")
    with torch.no_grad():
        for weight, kept in zip(weights, content["weights"], strict=True):
            weight.copy_(kept)
    for optimizer, kept in zip(steppers, content["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    if ema is not None:
        ema.load_state_dict(content["ema"])
    return int(content["step"]), float(content.get("seconds", 0.0))  # older states do not say
