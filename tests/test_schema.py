"""The strict builder of settings, and what docstrings say of fields."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from runtime import schema


@dataclasses.dataclass(frozen=True)
class Inner:
    """Inner.

    Attributes:
        size: how
            large.
        kind: which.
    """

    size: int
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    pair: tuple[int, float]
    names: list[str]
    ratio: float | None = None
    table: dict[str, int] = dataclasses.field(default_factory=dict)


def test_builder_types() -> None:
    node = {"inner": {"size": 3}, "pair": [1, 2], "names": ["x"], "ratio": 1, "table": {"k": 2}}
    assert schema.build(Outer, node) == Outer(Inner(3), (1, 2.0), ["x"], 1.0, {"k": 2})
    wrong = [
        {"inner": {"size": True}},
        {"inner": {"size": 1.0}},
        {"inner": {"size": 1, "kind": "c"}},
        {"inner": 3},
    ]
    wrong += [
        {"pair": [1]},
        {"names": "x"},
        {"ratio": "1"},
        {"ratio": True},
        {"table": {"k": "v"}},
        {"nam": 1},
    ]
    for key, bad in [item for case in wrong for item in case.items()]:
        with pytest.raises(ValueError, match=key):
            schema.build(Outer, {**node, key: bad})
    with pytest.raises(ValueError, match="inner is missing"):
        schema.build(Outer, {k: v for k, v in node.items() if k != "inner"})


def test_attributes_of_a_docstring() -> None:
    assert schema.attributes(Inner) == {"size": "how large.", "kind": "which."}
