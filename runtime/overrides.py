"""What is wrong with overrides that Hydra would stumble over or not place, said before it composes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException

CONF = Path(__file__).resolve().parents[1] / "conf"


def check(overrides: Sequence[str]) -> None:
    """Refuse overrides that cannot be read, and those of a config group that are not the name of a choice.

    Raises:
        ConfigCompositionException: one line that begins with the override.
    """
    for text in overrides:
        override = _parsed(text)
        if override.key_or_group in _groups() and not override.is_delete():
            _check_choices(override)


def _parsed(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).partition("\n")[0]
        raise ConfigCompositionException(
            f"{text}: cannot be read ({reason}); write key=value, and quote a value that holds = [ ] {{ }} , or :"
        ) from error
    if not override.key_or_group:
        raise ConfigCompositionException(f"{text}: names no key before the =; write key=value")
    return override


def _check_choices(override: Override) -> None:
    """The choices of a sweep come one by one later."""
    if override.is_sweep_override():
        return
    value, group = override.value(), override.key_or_group
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in given):
        example = sorted(path.stem for path in (CONF / group).glob("*.yaml"))[0]
        raise ConfigCompositionException(
            f"{override.input_line}: a config group takes the name of a choice, such as {group}={example}"
        )


@lru_cache
def _groups() -> frozenset[str]:
    return frozenset(path.name for path in CONF.iterdir() if any(path.glob("*.yaml")))
