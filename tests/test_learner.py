"""Mini-batches cut into processes and parts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.learner import pieces_of
from runtime.team import Team


@given(st.data())
def test_every_row_counts_once_and_no_part_is_larger_than_planned(data: st.DataObject) -> None:
    block, ranks, parts = (data.draw(st.integers(1, 4)) for _ in range(3))
    held = data.draw(st.integers(1, 6))  # blocks of a process
    drawn = data.draw(st.lists(st.integers(0, ranks * held - 1), min_size=1, unique=True))
    indices = (torch.tensor(drawn)[:, None] * block + torch.arange(block)).flatten()
    found = [pieces_of(indices, Team(rank, ranks), held * block, parts, block) for rank in range(ranks)]

    assert len({len(pieces) for pieces in found}) == 1, "all processes go through the network equally often"
    counted = [rows + rank * held * block for rank, pieces in enumerate(found) for rows, counts in pieces if counts]
    assert sorted(torch.cat(counted).tolist()) == sorted(indices.tolist())
    planned = block * -(-len(drawn) // (ranks * parts))
    assert all(len(rows) <= planned for pieces in found for rows, _ in pieces)
    assert len(found[0]) == parts or ranks > 1
