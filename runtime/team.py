"""The processes of a run: who they are, and what they tell each other.

Control messages (flags, small numbers, rewards) go over gloo on the CPU, gradients over the device's own backend. In a
run of one process nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torch import Tensor

T = TypeVar("T")

# What a rank needs of the others' rows is small: rewards, masks, ids. These are the large entries of three or fewer
# dimensions; larger ones are left out by their number of dimensions.
_HEAVY = ("text", "image")


def ranks() -> int:
    """Number of processes that the launcher (torchrun, deepspeed) says there are; needs no torch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Team:
    """The processes that compute one update together.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        control: process group of control messages; None in a run of one process.
    """

    rank: int = 0
    size: int = 1
    control: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes the run's folder and talks to people."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; the same answer in all."""
        if self.size == 1:
            return flag
        import torch
        import torch.distributed as dist

        told = torch.tensor([int(flag)])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.control)
        return bool(told)

    def share(self, value: T) -> T:
        """The first process's value, in all."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def collect(self, value: T) -> list[T]:
        """The values of all processes by rank, in all."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """Means over the processes that have a metric."""
        if self.size == 1:
            return metrics
        rows = self.collect(metrics)
        names = list(dict.fromkeys(name for row in rows for name in row))
        having = {name: [row[name] for row in rows if name in row] for name in names}
        return {name: sum(values) / len(values) for name, values in having.items()}

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of the device by their sums over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        import torch
        import torch.distributed as dist

        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def rows(self, rollout: TensorDictBase) -> TensorDictBase:
        """The light entries of all processes' rollouts, in the order of the prompts; in a run of one process the
        rollout itself.
        """
        if self.size == 1:
            return rollout
        import torch
        from tensordict import TensorDict

        light = {k: v for k, v in rollout.items(True, True) if v.ndim <= 3 and k not in _HEAVY}
        parts = self.collect({k: v.detach().cpu() for k, v in light.items()})
        whole = {k: torch.cat([part[k] for part in parts]).to(v.device) for k, v in light.items()}
        return TensorDict(whole, batch_size=[self.size * len(rollout)], device=rollout.device)

    def own(self, whole: TensorDictBase, rollout: TensorDictBase) -> None:
        """Put this process's rows of what `rows` returned, and of what was added to it since, into its rollout."""
        if self.size > 1:
            first = self.rank * len(rollout)
            rollout.update(whole[first : first + len(rollout)])


def join(backend: str, alone: bool = False) -> Team:
    """Meet the other processes that the launcher has started.

    Args:
        backend: of the device: gloo or nccl.
        alone: make a process group also in a run of one process (DeepSpeed wants one).
    """
    if ranks() == 1 and not alone:
        return Team()
    import torch.distributed as dist

    if not dist.is_initialized():
        if ranks() == 1:
            here = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            os.environ |= {key: os.environ.get(key, value) for key, value in here.items()}
            store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    size = dist.get_world_size()
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")
    return Team(dist.get_rank(), size, control if size > 1 else None)
