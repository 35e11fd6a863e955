"""Denoising kernels against their defining properties and against reference values."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from envs.transitions import (
    CPS,
    ODE,
    DanceSDE,
    FlowSDE,
    Transition,
    excess_noise,
    gaussian_kl,
    gradient_scale,
    log_prob,
    ode_mean,
)

TABLE = torch.tensor([1.0, 0.755, 0.522, 0.0])
BEFORE, AFTER = TABLE[:-1], TABLE[1:]
STOCHASTIC = [FlowSDE(), FlowSDE(0.3), DanceSDE(), CPS(), CPS(1.0)]


def latents(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (5, 2, 3, 4)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("eta", [0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("sigma, after", [(1.0, 0.755), (0.755, 0.522), (0.522, 0.3), (0.2, 0.1)])
def test_cps_keeps_signal_and_noise_of_the_next_level(eta: float, sigma: float, after: float) -> None:
    x0, eps = latents(0, dtype=torch.float64), latents(1, dtype=torch.float64)
    s, t = torch.tensor(sigma, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
    mean, std = CPS(eta).moments((1 - s) * x0 + s * eps, eps - x0, s, t)
    old = ((mean - (1 - t) * x0) / eps).mean()
    torch.testing.assert_close(mean, (1 - t) * x0 + old * eps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(old**2 + std**2, t**2, rtol=1e-13, atol=0)


@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_flow_sde_leaves_the_noise_its_formula_says(eta: float) -> None:
    sigma, after = TABLE[:2].double(), TABLE[1:3].double()
    rate2 = eta**2 * sigma / (1 - torch.tensor([0.755, 0.755]).double())  # at sigma 1 the next level stands in
    step = sigma - after
    variance = (after - rate2 * step / (2 * sigma)) ** 2 + rate2 * step
    torch.testing.assert_close(excess_noise(FlowSDE(eta), sigma, after), variance.sqrt() / after)


@pytest.mark.parametrize(
    "kernel, expected",
    [
        (FlowSDE(0.7), [1.147, 1.264]),
        (FlowSDE(0.3), [1.021, 1.039]),
        (DanceSDE(0.3), [1.005, 1.012]),
        (CPS(0.7), [1.0, 1.0]),
        (CPS(1.0), [1.0, 1.0]),
        (ODE(), [1.0, 1.0]),
    ],
)
def test_excess_noise_reference_values(kernel: Transition, expected: list[float]) -> None:
    assert excess_noise(kernel, BEFORE, AFTER)[:2].tolist() == pytest.approx(expected, abs=5e-4)


def test_excess_noise_of_a_shifted_table_and_of_the_last_step() -> None:
    plain = torch.tensor([1.0, 2 / 3, 1 / 3, 0.0])
    shifted = 5 * plain / (1 + 4 * plain)
    assert excess_noise(FlowSDE(), shifted[:-1], shifted[1:])[:2].max().item() == pytest.approx(1.39, abs=5e-3)
    assert excess_noise(FlowSDE(), BEFORE, AFTER)[2].isinf()
    assert excess_noise(ODE(), BEFORE, AFTER)[2] == 1


def test_excess_noise_agrees_with_sampled_noise() -> None:
    """The analytic figure against 200,000 samples of one step with the exact velocity."""
    eps, fresh = latents(2, 200_000), latents(3, 200_000)
    x = 0.755 * eps  # x0 = 0, so everything left after the step is noise
    mean, std = FlowSDE().moments(x, eps, TABLE[1], TABLE[2])
    assert ((mean + std * fresh).std() / TABLE[2]).item() == pytest.approx(1.264, abs=0.01)


@pytest.mark.parametrize("kind", [FlowSDE, DanceSDE, CPS])
def test_vanishing_eta_is_the_ode(kind: type) -> None:
    x, v = latents(4), latents(5)
    for sigma, after in zip(BEFORE, AFTER, strict=True):
        mean, std = kind(1e-4).moments(x, v, sigma, after)
        torch.testing.assert_close(mean, ode_mean(x, v, sigma, after), rtol=0, atol=2e-6)
        assert std.max() < 2e-4
    mean, std = ODE().moments(x, v, TABLE[0], TABLE[1])
    assert torch.equal(mean, ode_mean(x, v, TABLE[0], TABLE[1])) and std == 0


def test_cps_with_eta_one_is_renoising() -> None:
    x, v, z = latents(6), latents(7), latents(8)
    mean, std = CPS(1.0).moments(x, v, TABLE[1], TABLE[2])
    renoised = (1 - TABLE[2]) * (x - TABLE[1] * v) + TABLE[2] * z
    torch.testing.assert_close(mean + std * z, renoised, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", STOCHASTIC)
@pytest.mark.parametrize("random_step", [0, 1])
def test_point_mass_ends_on_its_target(kernel: Transition, random_step: int) -> None:
    """One stochastic step with sigma' > 0 and the ODE elsewhere reach the target, whatever was drawn."""
    target = latents(9, dtype=torch.float64)
    x = latents(10, dtype=torch.float64)
    table = TABLE.double()
    for n in range(3):
        v = (x - target) / table[n]
        mean, std = (kernel if n == random_step else ODE()).moments(x, v, table[n], table[n + 1])
        x = mean + std * latents(11 + n, dtype=torch.float64)
    torch.testing.assert_close(x, target, rtol=0, atol=1e-12)


def test_flow_sde_at_the_last_step_leaves_noise() -> None:
    mean, std = FlowSDE().moments(TABLE[2], torch.tensor(1.0), TABLE[2], TABLE[3])
    assert (mean**2 + std**2).sqrt().item() == pytest.approx(0.59, abs=5e-3)


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_gradient_of_the_log_prob(kernel: Transition) -> None:
    """d log p / d v = (d mean / d v) (x' - mean) / (D std^2), and gradient_scale is |d mean / d v| / std."""
    x, v, action = latents(20), latents(21).requires_grad_(), latents(22)
    mean, std = kernel.moments(x, v, TABLE[1], TABLE[2])
    value = log_prob(action, mean, std)
    (gradient,) = torch.autograd.grad(value.sum(), v, retain_graph=True)
    (slope,) = torch.autograd.grad(mean.sum(), v)
    torch.testing.assert_close(gradient, slope * (action - mean).detach() / (24 * std**2))
    torch.testing.assert_close(
        gradient_scale(kernel, TABLE[1], TABLE[2]), (slope.abs() / std).mean(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kernel, ratio", [(CPS(0.7), 1.8), (FlowSDE(0.7), 1.4), (DanceSDE(0.3), 1.0)])
def test_gradient_scale_ratios(kernel: Transition, ratio: float) -> None:
    k = gradient_scale(kernel, BEFORE, AFTER)[:2]
    assert (k.max() / k.min()).item() == pytest.approx(ratio, abs=0.05)


@pytest.mark.parametrize("first", [1.0, 0.9999, 0.99609375])  # the last is the neighbour of 1 in bfloat16
def test_the_singularity_at_one_is_clamped_for_values_near_one_too(first: float) -> None:
    exact = FlowSDE().moments(latents(30), latents(31), TABLE[0], TABLE[1])
    near = FlowSDE().moments(latents(30), latents(31), torch.tensor(first), TABLE[1])
    torch.testing.assert_close(near[0], exact[0], rtol=0, atol=0.02)
    torch.testing.assert_close(near[1], exact[1], rtol=0.02, atol=0)


def test_a_fine_table_is_not_clamped_after_its_first_step() -> None:
    fine = torch.linspace(1, 0, 1001, dtype=torch.float64)
    _, std = FlowSDE().moments(fine[1], fine[1], fine[1], fine[2])
    assert std.item() == pytest.approx(0.7 * (0.999 / 0.001) ** 0.5 * 0.001**0.5, rel=1e-9)


def test_log_prob_is_the_mean_gaussian_density_and_zero_where_deterministic() -> None:
    action, mean = latents(40), latents(41)
    std = torch.tensor([0.5, 0.0, 2.0, 0.0, 1.0]).view(5, 1, 1, 1)
    value = log_prob(action, mean, std)
    for b in (0, 2, 4):
        density = torch.distributions.Normal(mean[b], std[b]).log_prob(action[b]).mean()
        torch.testing.assert_close(value[b], density)
    assert value[1] == 0 and value[3] == 0


def test_deterministic_steps_give_no_nan_gradient() -> None:
    mean = latents(42).requires_grad_()
    std = torch.tensor([0.5, 0.0, 2.0, 0.0, 1.0]).view(5, 1, 1, 1)
    total = log_prob(latents(43), mean, std).sum() + gaussian_kl(mean, latents(44), std).sum()
    (gradient,) = torch.autograd.grad(total, mean)
    assert gradient.isfinite().all() and not gradient[1].any() and gradient[0].any()


def test_log_prob_is_float32_for_half_precision_latents() -> None:
    value = log_prob(latents(45).bfloat16(), latents(46).bfloat16(), torch.full((5, 1, 1, 1), 0.5))
    assert value.dtype == torch.float32


def test_gaussian_kl_matches_torch() -> None:
    mean, other, std = latents(47), latents(48), torch.full((5, 1, 1, 1), 0.3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(other, std)).mean((1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, other, std), expected)


@pytest.mark.parametrize("kernel", [*STOCHASTIC, ODE()])
def test_noise_levels_broadcast_over_a_batch(kernel: Transition) -> None:
    x, v = latents(50, 3, 2, 3, 4), latents(51, 3, 2, 3, 4)
    mean, std = kernel.moments(x, v, BEFORE.view(3, 1, 1, 1), AFTER.view(3, 1, 1, 1))
    assert std.shape == (3, 1, 1, 1)
    for n in range(3):
        one_mean, one_std = kernel.moments(x[n], v[n], BEFORE[n], AFTER[n])
        torch.testing.assert_close(mean[n], one_mean)
        torch.testing.assert_close(std[n].squeeze(), one_std)


@pytest.mark.parametrize("kind, eta", [(FlowSDE, 0.0), (DanceSDE, -1.0), (CPS, 1.5), (CPS, float("nan"))])
def test_bad_eta_is_refused(kind: type, eta: float) -> None:
    with pytest.raises(ValueError, match=rf"^{kind.name}.eta must be"):
        kind(eta)


def test_components_load_without_torch() -> None:
    code = "import sys, envs.transitions, envs.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
