"""DeepSpeed's ZeRO behind the interface of `runtime/trainer.py`.

The policy's optimizer is DeepSpeed's; the critic, which is small, keeps a plain one. Checkpoints are this project's:
DeepSpeed's own are pickles. Read: DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`, `stage3.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runtime.checkpoint import optimizer_tensors, restore_optimizer
from runtime.team import Team
from runtime.trainer import CRITIC, PlainTrainer, adamw

if TYPE_CHECKING:
    from runtime.engines import DeepSpeed
    from runtime.settings import Optimizer


class DeepSpeedTrainer:
    """AdamW whose state (and gradients, and weights) DeepSpeed splits over the processes."""

    sharded = True

    def __init__(
        self,
        settings: DeepSpeed,
        network: nn.Module,
        critic: nn.Module | None,
        optimizer: Optimizer,
        critic_lr: float,
        team: Team,
    ) -> None:
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        # It would be compiled at the first start, for collectives that nothing here uses; a start that is killed
        # meanwhile leaves a lock that all later ones wait for, and a killed run leaves its buffers in memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.team, self.stage, self._deepspeed = team, settings.stage, deepspeed
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        own = adamw([{"params": self.parameters, "initial_lr": optimizer.lr}], optimizer)
        self.engine, *_ = deepspeed.initialize(
            model=network, optimizer=own, config=_config(settings, optimizer, team), dist_init_required=False
        )
        self.engine.eval()
        self.network = self.engine
        self.critic = CriticTrainer(critic, optimizer, critic_lr, team) if critic is not None else None

    def groups(self) -> list[dict[str, Any]]:
        """See `Trainer`."""
        more = self.critic.groups() if self.critic is not None else []
        return [*self.engine.optimizer.param_groups, *more]

    def backward(self, losses: Mapping[str, Tensor], last: bool = True) -> None:
        """See `Trainer`. DeepSpeed takes the mean over processes, not the sum."""
        policy = {name: loss for name, loss in losses.items() if self.critic is None or name != CRITIC}
        loss: Any = self.team.size * sum(policy.values())
        if self.critic is not None:
            self.critic.backward({CRITIC: losses[CRITIC]})
            if last and not self.critic.finite():
                loss = loss * math.nan  # DeepSpeed then leaves the policy's step out as well
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """See `Trainer`. To DeepSpeed a gradient that is not finite is an overflow: it changes nothing."""
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        overflow = bool(self.engine.optimizer.overflow) or not math.isfinite(norm)
        if self.critic is not None:
            self.critic.clear() if overflow else self.critic.step()
        return math.inf if overflow else norm

    def tensors(self) -> dict[str, Tensor]:
        """See `Trainer`: `<partition>.<name>` of this process, and the critic's as `critic.<...>`."""
        state = self.engine.optimizer.optimizer.state
        found = {
            f"{i}.{name}": torch.as_tensor(value)
            for i, flat in enumerate(self._partitions())
            for name, value in state.get(flat, {}).items()
        }
        if self.critic is not None:
            found |= {f"critic.{name}": value for name, value in optimizer_tensors(self.critic.optimizer).items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Trainer`.

        Raises:
            ValueError: the tensors are of other partitions.
        """
        partitions, state = self._partitions(), self.engine.optimizer.optimizer.state
        if self.critic is not None:
            own = {k.removeprefix("critic."): v for k, v in tensors.items() if k.startswith("critic.")}
            restore_optimizer(self.critic.optimizer, own)
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            if index == "critic":
                continue
            if int(index) >= len(partitions) or (value.ndim and value.shape != partitions[int(index)].shape):
                raise ValueError(f"optimizer state {key} {tuple(value.shape)} is of another split of the weights")
            flat = partitions[int(index)]
            state[flat][name] = value.clone().to(flat.device if value.ndim else value.device)

    @contextmanager
    def gathered(self, write: bool = False) -> Iterator[None]:
        """See `Trainer`."""
        if self.stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(self.parameters, modifier_rank=0 if write else None):
            yield

    def _partitions(self) -> list[Tensor]:
        """The float32 weights that this process updates, flat, as the optimizer knows them."""
        optimizer = self.engine.optimizer
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(optimizer, name))


class CriticTrainer(PlainTrainer):
    """The plain trainer on a critic alone, whose gradient is known to be finite before its step."""

    def __init__(self, critic: nn.Module, optimizer: Optimizer, lr: float, team: Team) -> None:
        super().__init__(critic, None, optimizer, lr, team)
        self.optimizer.param_groups[0]["initial_lr"] = lr

    def finite(self) -> bool:
        """Whether the gradient is finite in all processes."""
        mine = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return not self.team.any(not all(bool(g.isfinite().all()) for g in mine))

    def clear(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)


def _config(settings: DeepSpeed, optimizer: Optimizer, team: Team) -> dict[str, Any]:
    """What `deepspeed.initialize` is told. Parts and their boundaries are set by hand, hence no accumulation here."""
    zero: dict[str, Any] = {"stage": settings.stage, "overlap_comm": False}
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": team.size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
