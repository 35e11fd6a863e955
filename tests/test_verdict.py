"""The verdict on a run: differences clip by clip, and words that claim no more than they show."""

from __future__ import annotations

import math
from typing import Any

import pytest

from runtime import report, verdict
from runtime.outcome import closing
from runtime.verdict import paired, relative

# Clips differ by far more than any run changes them.
BEFORE = [1.0, 4.0, 9.0, 16.0, 25.0]


def test_a_change_that_every_clip_shows_is_clear_however_much_the_clips_differ() -> None:
    drops = [0.5, 0.6, 0.4, 0.55, 0.45]
    found = paired(BEFORE, [b - d for b, d in zip(BEFORE, drops, strict=True)])
    assert found is not None and found.clips == 5 and found.mean == pytest.approx(-0.5)
    # Standard deviation of the drops 0.0790569; t with 4 degrees of freedom 2.776.
    assert found.half == pytest.approx(2.776 * 0.0790569 / math.sqrt(5), rel=0.01)
    assert found.verdict == "better" and found.text.endswith("px (95 % interval, 5 clips): clearly better")
    worse = paired(BEFORE, [b + d for b, d in zip(BEFORE, drops, strict=True)])
    assert worse is not None and worse.verdict == "worse" and "clearly worse" in worse.text


def test_a_change_that_clips_disagree_on_is_not_told_apart() -> None:
    found = paired(BEFORE, [b + c for b, c in zip(BEFORE, [-2.0, 1.0, -1.5, 1.2, 0.3], strict=True)])
    assert found is not None and found.verdict == "" and "not told apart from no change" in found.text
    same = paired(BEFORE, BEFORE)
    assert same is not None and same.verdict == ""


def test_a_clip_counts_where_both_errors_are_finite() -> None:
    found = paired([1.0, None, 3.0, math.nan, 5.0], [0.0, 1.0, None, 1.0, 3.0])
    assert found is not None and (found.clips, found.mean) == (2, -1.5)
    # Two clips that fell by 1 and by 2: t with 1 degree of freedom is 12.7.
    assert found.half == pytest.approx(12.706 * 0.5, rel=1e-3) and found.verdict == ""
    one = paired([2.0, None], [1.0, 1.0])
    assert one is not None and one.half == math.inf and one.verdict == "" and "1 clip has no interval" in one.text
    assert paired([None], [1.0]) is None and paired([], []) is None
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (127, 1.979)])
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert verdict.t95(freedom) == pytest.approx(quantile, rel=0.01)


def test_percent_has_no_sign_where_a_word_says_the_direction() -> None:
    assert relative(4.0, 3.0) == "25.0 % better" and relative(4.0, 4.524) == "13.1 % worse"
    assert relative(4.0, 4.0) == "unchanged" and relative(math.nan, 1.0) == relative(0.0, 1.0) == ""


def evaluation(after: list[float | None], found_by: dict[str, int]) -> dict[str, object]:
    rows = [
        {"update": update, "motion_error_px": error, "aesthetic": 4.0, "frechet": 0.5}
        for update, error in ((0, 2.0), (9, 2.262))
    ]
    errors = {"0": [1.5, 2.5], "9": after}
    shared = {"truth": {"motion_error_px": 0.1}, "tracker": "LucasKanade", "found_by": found_by}
    return {"before": rows[0], "after": rows[1], "clip_errors_px": errors, **shared}


def test_the_closing_line_says_worse_of_a_run_that_got_worse() -> None:
    line = closing(evaluation([1.762, 2.762], {}))
    assert "2.000 -> 2.262 px; 13.1 % worse; clip by clip +0.262" in line and "better" not in line.split("clearly")[0]
    assert "true clips 0.100 px; aesthetic" in line
    assert "not told apart" in closing(evaluation([1.0, 3.524], {}))
    assert "clip by clip" not in closing(evaluation([None, None], {}))
    assert "true clips 0.100 px (by construction)" in closing(evaluation([1.762, 2.762], {"LucasKanade": 2}))


def test_the_headline_claims_no_more_than_the_numbers() -> None:
    def ends(before: float, after: float, *errors: list[float | None]) -> dict[str, Any]:
        rows = [{"update": u, "motion_error_px": v} for u, v in ((0, before), (5, after))]
        found = {str(row["update"]): e for row, e in zip(rows, errors, strict=False)}
        return {"before": rows[0], "after": rows[1], "clip_errors_px": found}

    def said(found: dict[str, Any]) -> tuple[str, str]:
        return report.headline(found)[1], report.changes(found)["motion_error_px"].verdict

    assert report.headline(ends(1.0, 2.0)) == ["The motion error rose from 1.00 to 2.00 px (+100.0 %)."]
    sentence, word = said(ends(2.0, 1.5, [1.0, 3.0, 2.0], [0.5, 2.5, 1.5]))
    assert sentence.endswith("clearly better.") and word == "better"
    sentence, word = said(ends(2.0, 2.5, [1.0, 3.0, 2.0], [1.5, 3.5, 2.5]))
    assert sentence.endswith("clearly worse.") and word == "worse"
    for errors in (([1.0, 3.0, 2.0], [2.0, 1.0, 1.5]), ([2.0, None], [1.5, None])):
        sentence, word = said(ends(2.0, 1.5, *errors))
        assert sentence.endswith("not told apart from no change.") and word == ""
    assert report.headline({"after": {"motion_error_px": 1.5}}) == ["The motion error is 1.50 px."]
    assert report.headline({"before": {"motion_error_px": 1.5}, "after": {"motion_error_px": math.nan}}) == []
    assert report.headline({}) == []
