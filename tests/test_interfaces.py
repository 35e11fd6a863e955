"""What is asked of a component is what protocols and bases have, and one that lacks it is refused in one line."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

import pytest
from hydra import compose

from runtime import rules, schema
from runtime.config import plain
from runtime.interfaces import MEMBERS, whole
from runtime.models import Pretrained
from runtime.settings import Settings

pytestmark = pytest.mark.usefixtures("hydra_tree")


@dataclasses.dataclass(frozen=True)
class Nothing:
    """A component without members."""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(Pretrained, "check", lambda self, frames: None)
    settings: Settings = schema.build(Settings, plain(compose("grpo", ["+interpolator=flow", "+extractor=clip"])))
    return settings


def replaced(settings: Settings, kind: str, part: Any) -> Settings:
    if kind == "reward":
        return dataclasses.replace(settings, reward={"own": part})
    if kind in ("extractor", "interpolator"):
        return dataclasses.replace(settings, evaluation=dataclasses.replace(settings.evaluation, **{kind: part}))
    return dataclasses.replace(settings, **{kind: part})


@pytest.mark.parametrize("kind", MEMBERS)
def test_what_lacks_something_is_refused_before_anything_loads(built: Settings, kind: str) -> None:
    whole(built)
    members, where = MEMBERS[kind]
    lacks = re.escape(f"{', '.join(members)}; see {where}")
    with pytest.raises(ValueError, match=f"{kind}.*=Nothing lacks {lacks}"):
        rules.check(replaced(built, kind, Nothing()))


@pytest.mark.parametrize("kind", MEMBERS)
def test_what_is_asked_for_is_what_the_named_class_has(kind: str) -> None:
    members, where = MEMBERS[kind]
    module, _, name = where.rpartition(".")
    named = getattr(importlib.import_module(module), name)
    has = {*dir(named), *(key for base in named.__mro__ for key in getattr(base, "__annotations__", {}))}
    left_open = {"prepare", "group_relative", "needs_log_prob"} if kind == "algorithm" else set()
    assert set(members) - left_open <= has
