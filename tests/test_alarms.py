"""Alarms for reward hacking: what a cheating policy does to its videos sets them off, and learning does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.train import run
from metrics.signs import signs
from runtime.alarms import Watch, sentences, summary
from runtime.settings import Alarms
from tests.moving import line, render
from tests.test_training import history, plan

CLIP = render(line((8.0, 9.0), (0.7, 0.6)))[None]


def group(clip: torch.Tensor, spread: float = 0.05) -> torch.Tensor:
    noise = torch.randn(4, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    return (clip + spread * noise).clamp(-1, 1)


def test_signs_by_hand() -> None:
    ramp = torch.arange(8.0).expand(1, 3, 2, 6, 8) / 8 - 0.5  # 1/16 brighter per pixel, in [0, 1]
    found = signs(ramp.repeat(2, 1, 1, 1, 1) + torch.tensor([0.0, 0.2])[:, None, None, None, None], 2)
    assert found["edges"] == pytest.approx(1 / 16) and found["motion"] == 0
    assert found["diversity"] == pytest.approx(0.1 / 2**0.5)
    moving = torch.stack([torch.zeros(3, 6, 8), torch.ones(3, 6, 8)], 1)[None]
    assert signs(moving, 1) == {"edges": 0.0, "motion": pytest.approx(0.5)}


def test_cheats_set_alarms_off_and_small_changes_do_not() -> None:
    honest = group(CLIP)
    noise = torch.rand(honest.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    cheats = {
        "edges": (honest + 4 * noise).clamp(-1, 1),
        "motion": honest[:, :, :1].expand_as(honest),
        "diversity": CLIP.expand_as(honest),
    }

    def named(video: torch.Tensor) -> dict[str, float]:
        return {f"signs/{name}": value for name, value in signs(video, 4).items()}

    for name, video in {"honest": honest * 0.95, **cheats}.items():
        watch = Watch(Alarms(warmup=2))
        assert not watch.check(named(honest)) and not watch.check(named(honest)), "nothing to compare with yet"
        alarms = watch.check(named(video))
        assert (f"alarm/{name}" in alarms) == (name != "honest"), (name, alarms)
    assert Watch(Alarms(kl=0.1)).check({"kl": 0.2}) == {"alarm/kl": 0.2}
    assert Watch(Alarms(kl=0.3)).check({"kl": 0.2}) == Watch(Alarms()).check({"kl": 0.04}) == {}
    assert Watch(Alarms()).check({"kl": 0.2}) == {"alarm/kl": 0.2}
    assert Watch(Alarms()).check({"pairs": 0.0}) == {"alarm/pairs": 0.0} and not Watch(Alarms()).check({"pairs": 1.0})


def test_a_reward_that_fails_is_an_alarm() -> None:
    found = Watch(Alarms()).check({"smoothness/failed": 0.25, "motion/failed": 0.0})
    assert found == {"alarm/smoothness/failed": 0.25}
    assert sentences(found) == ["reward smoothness failed for 25% of the samples"]
    assert summary([{"step": 7, **found}]) == "Alarms for reward smoothness failed (from update 7, 1 times)."


def test_a_resumed_run_compares_with_the_same_first_updates() -> None:
    rows = [{"step": n, "signs/edges": value} for n, value in enumerate((1.0, 1.2, 5.0))]
    whole, resumed = Watch(Alarms(warmup=2)), Watch(Alarms(warmup=2), rows)
    for row in rows:
        whole.check(row)
    later = {"signs/edges": 3.0}
    assert whole.check(later) == resumed.check(later) == {"alarm/edges": pytest.approx(3.0 / 1.1)}


def test_a_number_that_is_not_finite_is_no_base_to_compare_with() -> None:
    watch = Watch(Alarms(warmup=2))
    for value in (1.0, float("nan"), 1.0):
        assert not watch.check({"signs/edges": value})
    assert watch.check({"signs/edges": 3.0}) == {"alarm/edges": pytest.approx(3.0)}


def test_alarms_in_words() -> None:
    assert sentences({"alarm/edges": 2.5, "alarm/kl": 0.21, "kl": 0.21}) == ["edges x 2.50", "KL 0.21"]
    rows = [{"step": 3, "alarm/edges": 2.0}, {"step": 4, "alarm/edges": 2.0, "alarm/kl": 1.0}, {"step": 5}]
    assert (
        summary(rows) == "Look at the videos: alarms for edges (from update 3, 2 times); KL (from update 4, 1 times)."
    )
    assert summary([{"step": 1}]) == ""
    assert sentences({"alarm/pairs": 0.0}) == ["no pair of samples, nothing learned"]
    assert summary([{"step": 1, "alarm/pairs": 0.0}]).startswith("Alarms for updates without a pair of samples (lower")


def test_a_run_logs_signs_and_reports_alarms(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(plan(model, tmp_path, "alarms.kl=1e-30", "updates=3", "algorithm.kl_weight=0.01", "reward=aesthetic"))
    rows = [row for row in history(tmp_path) if "reward" in row]
    assert all({"signs/edges", "signs/motion", "signs/diversity"} <= set(row) for row in rows)
    assert any("alarm/kl" in row for row in rows) and "ALARM KL" in capsys.readouterr().err
    assert "alarms for KL (from update" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_run_says_where_dpo_finds_no_pair(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["algorithm=dpo", "reward=1e-6*aesthetic", "rollout.group_size=4"]
    run(plan(model, tmp_path / "reward", *options))
    assert "ALARM no pair of samples" in capsys.readouterr().err
    run(plan(model, tmp_path / "spread", *options, "algorithm.margin_in=spread"))
    assert "ALARM" not in capsys.readouterr().err
    rows = [next(row for row in history(tmp_path / name) if "pairs" in row) for name in ("reward", "spread")]
    assert rows[0]["pairs"] == 0 and "grad_norm" not in rows[0] and rows[1]["pairs"] > 0 < rows[1]["grad_norm"]
