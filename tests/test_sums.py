"""Sums of rewards on the command line: `reward=motion+0.5*aesthetic`."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hydra import compose
from hydra.errors import ConfigCompositionException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from runtime.config import CONF, plain
from runtime.hydra_sum import parse_sum

REWARDS = sorted(p.stem for p in (CONF / "reward").glob("*.yaml"))


pytestmark = pytest.mark.usefixtures("hydra_tree")


def weights(config: Any) -> dict[str, float]:
    return {name: term["weight"] for name, term in config["reward"].items()}


finite = st.floats(-1e6, 1e6).map(lambda x: round(x, 6))
sums = st.lists(
    st.tuples(st.sampled_from(REWARDS), st.none() | finite), min_size=1, max_size=3, unique_by=lambda t: t[0]
)


@settings(max_examples=12)
@given(sums)
def test_a_sum_is_its_terms_with_their_weights(terms: list[tuple[str, float | None]]) -> None:
    text = "+".join(name if weight is None else f"{weight}*{name}" for name, weight in terms)
    found = weights(plain(compose("train", [f"reward={text}"])))
    own = {name: OmegaConf.load(CONF / "reward" / f"{name}.yaml").weight for name, _ in terms}
    assert found == {name: own[name] if weight is None else weight for name, weight in terms}


@given(st.text(st.sampled_from("abe_2+*. -nf1")) | st.text())
def test_any_text_is_a_sum_or_refused_in_one_line(text: str) -> None:
    try:
        terms = parse_sum(text)
    except ConfigCompositionException as error:
        assert str(error).startswith("reward=") and "\n" not in str(error).replace(text, "")
    else:
        assert terms and all(w is None or math.isfinite(w) for w in terms.values())
        again = "+".join(name if w is None else f"{w!r}*{name}" for name, w in terms.items())
        assert parse_sum(again) == terms


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("motion+", "empty"),
        ("+motion", "empty"),
        ("motion+motion", "twice"),
        ("motion+2*motion", "twice"),
        ("nan*motion", "finite"),
        ("inf*motion", "finite"),
        ("x*motion", "finite"),
        ("2**motion", "not the name"),
        ("motion*2", "name"),
    ],
)
def test_bad_sums_are_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(ConfigCompositionException, match=why):
        compose("train", [f"reward={text}"])


def test_unknown_terms_list_the_known_ones() -> None:
    with pytest.raises(ConfigCompositionException, match=r"(?s)Could not find 'reward/nosuch'.*" + ".*".join(REWARDS)):
        compose("train", ["reward=motion+nosuch"])


def test_a_later_override_beats_the_weight_of_a_sum_and_a_term_alone_is_the_plain_file() -> None:
    assert (
        weights(plain(compose("train", ["reward=motion+0.5*aesthetic", "reward.aesthetic.weight=3"])))["aesthetic"] == 3
    )
    alone, term = (plain(compose("train", [f"reward={r}"]))["reward"] for r in ("motion", "1.0*motion"))
    assert alone == term and list(alone) == ["motion"]


def test_exponents_keep_their_plus() -> None:
    assert parse_sum("1e+3*motion+2.5e-1*a2e+b") == {"motion": 1000.0, "a2e": 0.25, "b": None}
