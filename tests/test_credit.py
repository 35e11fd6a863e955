"""Credit, advantages and the weights of pairs, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from algorithms.advantages import credited, group_advantage, pair_roles, without_history
from tests.scored import random


def test_credit_by_hand() -> None:
    reward = torch.tensor([[1.0, 2.0, 4.0]])
    assert credited(reward, "per_frame").tolist() == [[1, 2, 4]]
    assert credited(reward, "return_to_go").tolist() == [[7, 6, 4]]
    assert credited(reward, "clip").tolist() == [[7, 7, 7]]


def test_global_spread_is_one_number_for_the_valid_groups() -> None:
    score = torch.tensor([[0.0, 5.0], [2.0, 5.0], [0.0, 5.0], [6.0, 5.0], [0.0, 0.0], [99.0, 7.0]])
    valid = torch.tensor([True, True, True, True, False, False])[:, None].expand(6, 2)
    # Standard deviations sqrt(2), 0, 3 sqrt(2), 0: root mean square sqrt(5).
    found = group_advantage(score, 2, normalize="global", eps=1e-9, valid=valid)
    expected = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-3.0, 0.0], [3.0, 0.0]]) / math.sqrt(5)
    torch.testing.assert_close(found[:4], expected)


def test_history_of_returns_is_the_reward_of_the_frame_before() -> None:
    """What is taken out of a return-to-go must be known before the action; the return of the frame before is not."""
    reward = random(4096 * 4, 3)
    valid = torch.ones_like(reward, dtype=torch.bool)
    score = credited(reward, "return_to_go")
    kept = without_history(score, reward, valid, 4)
    torch.testing.assert_close(kept, score, atol=0.2, rtol=0)  # rewards are independent: nothing to take out
    assert kept[:, 0].equal(score[:, 0])


def test_pairs_by_hand() -> None:
    score = torch.tensor([[3.0], [1.0], [2.0], [0.0]])
    assert pair_roles(score, 4, 2, 0.0)[:, 0].tolist() == [[1, 0], [0, -1], [0, 1], [-1, 0]]
    assert pair_roles(score, 4, 2, 1.0)[:, 0].tolist() == [[1, 0], [0, 0], [0, 0], [-1, 0]]
    assert pair_roles(torch.ones(4, 2), 4, 2, 0.0).abs().max() == 0, "equal scores are no preference"
    with pytest.raises(ValueError, match=r"algorithm\.pairs=3 needs groups of 6"):
        pair_roles(score, 4, 3, 0.0)
