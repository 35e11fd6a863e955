"""Imports between rooms go one way: docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from runtime.models import ROOT

ROOMS = (
    ("tracking",),
    ("data", "metrics"),
    ("policies", "rewards", "envs"),
    ("algorithms", "runtime"),
    ("experiments",),
)
HEIGHT = {room: height for height, rooms in enumerate(ROOMS) for room in rooms}


def imported(tree: ast.AST) -> Iterator[str]:
    """First names of all modules that a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)


@pytest.mark.parametrize("room", HEIGHT)
def test_a_room_imports_nothing_from_above(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        above = {name for name in imported(ast.parse(file.read_text())) if HEIGHT.get(name, 0) > HEIGHT[room]}
        assert not above, f"{file.relative_to(ROOT)} imports from {', '.join(sorted(above))}"
