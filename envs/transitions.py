"""Denoising kernels: how a latent moves from noise level sigma to sigma' < sigma, with which probability.

Convention (AR-Drag Eq. 4): `x_sigma = (1 - sigma) x0 + sigma eps`, velocity `v = eps - x0`, so
`x0 = x - sigma v` and `eps = x + (1 - sigma) v`. A kernel is a Gaussian `N(mean, std^2)` over the next
latent. Arguments broadcast: for latents `[..., C, h, w]` pass `sigma` and `sigma_next` as `[..., 1, 1, 1]`.
All functions are pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

# Below this share of signal per step length the score coefficient 1 / (1 - sigma) is a singularity.
_SINGULAR = 0.02


class Transition(Protocol):
    """A kernel. `name` is its word in configurations; `learnable`: there is a log-prob to learn from."""

    name: ClassVar[str]
    learnable: ClassVar[bool]

    def moments(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return `mean` (shape of x and v) and `std` (shape of the noise levels, broadcasts with mean)."""
        ...


def ode_mean(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Deterministic Euler step `x + v (sigma' - sigma)` = `(1 - sigma') x0 + sigma' eps`."""
    return x + v * (sigma_next - sigma)


@dataclass(frozen=True)
class ODE:
    """Deterministic step; there is nothing to learn a policy gradient from."""

    name: ClassVar[str] = "ode"
    learnable: ClassVar[bool] = False

    def moments(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Euler step and std 0 in the shape of the noise levels."""
        return ode_mean(x, v, sigma, sigma_next), (sigma - sigma_next) * 0.0


@dataclass(frozen=True)
class FlowSDE:
    """Stochastic step of the paper (AR-Drag Eq. 4; Flow-GRPO): s = eta sqrt(sigma / (1 - sigma)).

    Its first-order step leaves more noise than sigma' asks for; see `excess_noise`.

    Attributes:
        eta: strength of the noise, positive.
    """

    name: ClassVar[str] = "flow_sde"
    learnable: ClassVar[bool] = True
    eta: float = 0.7

    def __post_init__(self) -> None:
        _check_eta(self.name, self.eta)

    def moments(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of Eq. 4."""
        rate = self.eta * (sigma / (1 - _away_from_one(sigma, sigma_next))) ** 0.5
        return _sde_moments(x, v, sigma, sigma_next, rate)


@dataclass(frozen=True)
class DanceSDE:
    """Stochastic step of DanceGRPO: as `FlowSDE` with the constant rate s = eta.

    Attributes:
        eta: strength of the noise, positive.
    """

    name: ClassVar[str] = "dance_sde"
    learnable: ClassVar[bool] = True
    eta: float = 0.3

    def __post_init__(self) -> None:
        _check_eta(self.name, self.eta)

    def moments(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of the constant-rate SDE step."""
        return _sde_moments(x, v, sigma, sigma_next, self.eta)


@dataclass(frozen=True)
class CPS:
    """Coefficient-preserving step (FlowCPS): part of eps is replaced by fresh noise, the total stays sigma'.

    `std = sigma' sin(eta pi / 2)`, `mean = (1 - sigma') x0 + sigma' cos(eta pi / 2) eps`. eta = 1 re-noises
    the predicted x0, the sampler of Self-Forcing and CausVid. At sigma' = 0 it is deterministic.

    Attributes:
        eta: share of fresh noise, in (0, 1].
    """

    name: ClassVar[str] = "cps"
    learnable: ClassVar[bool] = True
    eta: float = 0.9

    def __post_init__(self) -> None:
        _check_eta(self.name, self.eta)
        if self.eta > 1:
            raise ValueError(f"cps.eta must be at most 1 (re-noising), got {self.eta}")

    def moments(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std; `mean`'s coefficients and std preserve the marginal of sigma'."""
        angle = self.eta * math.pi / 2
        x0, eps = x - sigma * v, x + (1 - sigma) * v
        return (1 - sigma_next) * x0 + sigma_next * math.cos(angle) * eps, sigma_next * math.sin(angle)


def log_prob(action: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density with its normaliser, averaged over the last three dimensions, in float32.

    The mean (not the sum) tempers the probability ratio of AR-Drag Eq. 14 by 1 / D for latents of D = C h w
    values.

    Args:
        action, mean: `[..., C, h, w]`.
        std: broadcasts with mean, such as `[..., 1, 1, 1]`. Where it is 0 the step is
            deterministic and its log-prob 0.

    Returns:
        `[...]` float32.
    """
    import torch

    action, mean, std = action.float(), mean.float(), std.float()
    random = std > 0
    safe = torch.where(random, std, 1.0)
    density = -0.5 * ((action - mean) / safe) ** 2 - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(random, density, 0.0).mean((-3, -2, -1))


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL of Gaussians with one std: mean over the last three dimensions of `(mean - mean_ref)^2 / (2 std^2)`.

    Shapes as in `log_prob`; 0 where std is 0.
    """
    import torch

    mean, mean_ref, std = mean.float(), mean_ref.float(), std.float()
    random = std > 0
    safe = torch.where(random, std, 1.0)
    return torch.where(random, 0.5 * ((mean - mean_ref) / safe) ** 2, 0.0).mean((-3, -2, -1))


def excess_noise(transition: Transition, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Noise left after one step with the exact velocity, as a multiple of the sigma' it should be.

    1 is exact; inf where noise is left at sigma' = 0. Shape of the noise levels.
    """
    import torch

    # With x0 = 0 and eps = 1 the mean is the coefficient of the old noise.
    mean, std = transition.moments(sigma, torch.ones_like(sigma), sigma, sigma_next)
    left = (mean**2 + std**2) ** 0.5
    return torch.where(left == sigma_next, 1.0, left / sigma_next)


def gradient_scale(transition: Transition, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Scale k = |d mean / d v| / std of a step's policy gradient (inf where std is 0).

    Shape of the noise levels.
    """
    import torch

    # Moments are linear in (x, v), so the mean at x = 0, v = 1 is the derivative.
    slope, std = transition.moments(torch.zeros_like(sigma), torch.ones_like(sigma), sigma, sigma_next)
    return slope.abs() / std


def _sde_moments(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, rate: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Euler-Maruyama step of the reverse SDE whose noise rate is s (AR-Drag Eq. 4)."""
    dt = sigma_next - sigma
    drift = rate**2 / (2 * sigma)
    mean = x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt
    return mean, rate * (-dt) ** 0.5


def _away_from_one(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Replace sigma by sigma' where it is 1 up to rounding (0.9999, bfloat16): the table's first step.

    Judged against the length of the step, so fine tables whose second level is 0.999 are left as they are.
    """
    import torch

    return torch.where(1 - sigma < _SINGULAR * (sigma - sigma_next), sigma_next, sigma)


def _check_eta(name: str, eta: float) -> None:
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"{name}.eta must be positive, got {eta} (transition=ode is the deterministic one)")
