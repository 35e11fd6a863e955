"""The share of an update that is signal: known mixtures of one direction and noise."""

from __future__ import annotations

import pytest
import torch

from experiments.agreement import agreement


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_finds_the_share_of_the_common_direction(share: float) -> None:
    """g = s + noise with |s|^2 = share, |noise|^2 = 1 - share in every coordinate; scales of coordinates differ."""
    draws = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (4000,), generator=draws).float() * 2 - 1
    noise = torch.randn(24, 4000, generator=draws)
    gradients = share**0.5 * sign + (1 - share) ** 0.5 * noise
    found, error = agreement(gradients)
    assert abs(found - share) < 4 * error + 0.01 and error < 0.02
    rescaled, _ = agreement(gradients * torch.logspace(-6, 6, 4000))
    assert rescaled == pytest.approx(found, abs=1e-4)


def test_equal_gradients_are_all_signal_and_dead_weights_do_not_count() -> None:
    same = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(4, 50).clone()
    same[:, :10] = 0
    assert agreement(same)[0] == pytest.approx(1)
