"""How an update runs on the hardware, by name. The plain engine is the reference that the others must equal."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from runtime.team import Team, join

if TYPE_CHECKING:
    from torch import nn

    from runtime.settings import Optimizer
    from runtime.trainer import Trainer

PRECISIONS = ("fp32", "bf16")
OFFLOADS = ("none", "optimizer", "parameters")


@dataclass(frozen=True)
class Plain:
    """PyTorch alone. Several processes (torchrun) add up their gradients.

    Attributes:
        threads: CPU threads that torch uses; none leaves torch's own choice.
        accumulation: parts that the samples of a mini-batch are cut into, in each process; more need less memory, and
            the update is the same.
        precision: of the transformer's arithmetic: `fp32`, or `bf16` (autocast). Weights, optimizer and log-probs are
            float32 with both.
        activation_checkpointing: compute a block's activations again in the backward pass instead of keeping them.
    """

    distributed: ClassVar[bool] = False

    threads: int | None = None
    accumulation: int = 1
    precision: str = "fp32"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"engine.threads must be at least 1, got {self.threads}")
        if self.accumulation < 1:
            raise ValueError(f"engine.accumulation must be at least 1, got {self.accumulation}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"engine.precision must be {' or '.join(PRECISIONS)}, got {self.precision!r}")

    def check(self) -> None:
        """Look whether what the engine needs is installed, without importing it.

        Raises:
            ValueError: it is not.
        """

    def join(self, device: str) -> Team:
        """Meet the other processes; called once, before anything is computed.

        Args:
            device: `cpu`, `cuda` or `cuda:<number>`.
        """
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return join("nccl" if device.startswith("cuda") else "gloo", alone=self.distributed)

    def shape(self, network: nn.Module) -> None:
        """Give a transformer the engine's precision and checkpointing, in place."""
        import torch

        if self.precision == "bf16":
            network.autocast_dtype = torch.bfloat16  # type: ignore[assignment]
        if self.activation_checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]

    def trainer(
        self, network: nn.Module, critic: nn.Module | None, optimizer: Optimizer, critic_lr: float, team: Team
    ) -> Trainer:
        """What takes the optimizer's steps.

        Args:
            network: the policy's network; what of it requires gradient trains.
            critic: trains beside it, where there is one.
            optimizer: settings of AdamW.
            critic_lr: learning rate of the critic.
            team: the processes.
        """
        from runtime.trainer import PlainTrainer

        return PlainTrainer(network, critic, optimizer, critic_lr, team)


@dataclass(frozen=True)
class DeepSpeed(Plain):
    """DeepSpeed's ZeRO: optimizer states (1), gradients too (2), weights too (3) are split over the processes.

    Attributes:
        stage: of ZeRO: 1, 2 or 3.
        offload: what lies in the CPU's memory instead of the GPU's: `none`, `optimizer` (its states) or `parameters`
            (stage 3: the weights as well).
    """

    distributed: ClassVar[bool] = True

    stage: int = 2
    offload: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (1, 2, 3):
            raise ValueError(f"engine.stage must be 1, 2 or 3, got {self.stage}")
        if self.offload not in OFFLOADS:
            raise ValueError(f"engine.offload must be one of {', '.join(OFFLOADS)}, got {self.offload!r}")
        if self.offload == "parameters" and self.stage != 3:
            raise ValueError(
                f"engine.offload=parameters needs engine=deepspeed_z3, not stage {self.stage}; "
                f"use engine.offload=optimizer"
            )

    def check(self) -> None:
        """See `Plain.check`."""
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"engine=deepspeed_z{self.stage} needs DeepSpeed: pip install -e '.[deepspeed]'; or use engine=plain"
            )

    def join(self, device: str) -> Team:
        """See `Plain.join`."""
        if device == "cpu":  # DeepSpeed would otherwise look for a GPU, and does so on import
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return super().join(device)

    def trainer(
        self, network: nn.Module, critic: nn.Module | None, optimizer: Optimizer, critic_lr: float, team: Team
    ) -> Trainer:
        """See `Plain.trainer`."""
        from runtime.deepspeed import DeepSpeedTrainer

        return DeepSpeedTrainer(self, network, critic, optimizer, critic_lr, team)
