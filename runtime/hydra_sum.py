"""Weighted sums as a choice of the `reward` group: `reward=motion+0.5*aesthetic`.

Importing this module registers a Hydra config source for the scheme `sum://` and puts it on the search path.
The source answers `reward/motion+0.5*aesthetic` with what one would otherwise write into a file:

    # @package reward
    defaults: [/reward@motion: motion, /reward@aesthetic: aesthetic, _self_]
    aesthetic: {weight: 0.5}

so sweeps, `hydra.compose()`, `--info defaults` and later overrides (`reward.motion.weight=2`) simply work.
"""

from __future__ import annotations

import math
import re
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

GROUP = "reward"

_NAME = re.compile(r"[A-Za-z_]\w*")


def parse_sum(text: str) -> dict[str, float | None]:
    """Parse `motion+0.5*aesthetic` into `{"motion": None, "aesthetic": 0.5}`; None keeps the weight of the
    term's own file.

    Raises:
        ConfigCompositionException: an empty term, a name twice, or a weight that is not a finite number.
            One line.
    """
    terms: dict[str, float | None] = {}
    for term in _split(text):
        head, star, tail = term.partition("*")
        name = (tail if star else head).strip()
        if not _NAME.fullmatch(name):
            raise _refused(text, f"{name!r} is not the name of a reward" if name else "a term is empty")
        if name in terms:
            raise _refused(text, f"{name!r} stands there twice; give it one weight, such as 2*{name}")
        terms[name] = _weight(text, head.strip()) if star else None
    return terms


def _split(text: str) -> list[str]:
    # the + of an exponent (1e+3*motion) belongs to its number
    return re.findall(r"(?:^|\+)((?:\s*-?[\d.]+[eE]\+\d+\s*\*)?[^+]*)", text)


def _weight(text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _refused(text, f"the weight {number!r} is not a finite number")
    return value


def _refused(text: str, why: str) -> ConfigCompositionException:
    return ConfigCompositionException(f"{GROUP}={text}: {why}; write sums as motion+0.5*aesthetic")


class SumConfigSource(ConfigSource):
    """Answers names of the reward group that hold a `+` or a `*`."""

    @staticmethod
    def scheme() -> str:
        """Return `sum`."""
        return "sum"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the synthetic config of a sum. Unknown names are refused by Hydra, which lists the known
        ones.
        """
        terms = parse_sum(_sum_of(config_path) or "")
        defaults: list[Any] = [{f"/{GROUP}@{name}": name} for name in terms]
        weights = {name: {"weight": weight} for name, weight in terms.items() if weight is not None}
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create({"defaults": [*defaults, "_self_"], **weights}),
            header={"package": GROUP},
        )

    def is_group(self, config_path: str) -> bool:
        """Return False: sums add choices to a group that exists."""
        return False

    def is_config(self, config_path: str) -> bool:
        """Return whether `config_path` is a sum."""
        return _sum_of(config_path) is not None

    def available(self) -> bool:
        """Return True: there is nothing to find."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return no names: there are endlessly many sums."""
        return []


def _sum_of(config_path: str) -> str | None:
    group, _, name = config_path.rstrip("/").removesuffix(".yaml").partition("/")
    return name if group == GROUP and ("+" in name or "*" in name) else None


class SumSearchPath(SearchPathPlugin):
    """Appends `sum://` to the search path of every Hydra application of this process."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the source."""
        search_path.append(provider="ardrag", path="sum://")


Plugins.instance().register(SumConfigSource)
Plugins.instance().register(SumSearchPath)
