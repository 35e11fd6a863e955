"""The most memory that a phase takes, and the fastest that a device multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.timing import PhaseTimer

# Dense peak in TFLOP/s as the makers state it for bfloat16, by a part of the name that the driver gives.
NOMINAL = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "RTX 4090": 165.2, "L40S": 362.0}


class PeakTimer(PhaseTimer):
    """A `PhaseTimer` that also keeps each phase's peak memory in GB: of the GPU, otherwise of the process.

    Args:
        device: torch device.
    """

    def __init__(self, device: str) -> None:
        self._device, self.peaks = device, dict[str, float]()
        cuda = device.startswith("cuda")
        super().__init__((lambda: torch.cuda.synchronize(device)) if cuda else None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as `name`; see `PhaseTimer.phase`."""
        forget_peak(self._device)
        with super().phase(name):
            yield
        self.peaks[name] = max(peak_gb(self._device), self.peaks.get(name, 0.0))


def forget_peak(device: str) -> None:
    """Begin to look for a new peak. Outside Linux a process keeps its old one."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb(device: str) -> float:
    """The peak since `forget_peak`, in GB (10^9 bytes); nan where it cannot be known."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return found[0] * 1024 / 1e9 if found else float("nan")


def matmul_rate(device: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of the product of two large square matrices, the best of a few."""
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def nominal_rate(name: str, dtype: torch.dtype) -> float | None:
    """The maker's FLOP/s of a GPU for bfloat16; None where it is not known or for another type."""
    found = [rate for part, rate in NOMINAL.items() if part in name]
    return found[0] * 1e12 if found and dtype == torch.bfloat16 else None
