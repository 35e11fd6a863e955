"""Offline DPO: files of pairs are read as people wrote them, and the policy comes to prefer what they preferred."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from algorithms.preferences import EncodedPairs, flow_errors, learn_preferences
from algorithms.pretraining import loop
from algorithms.pretraining.loop import Fit
from data.pairs import load_pairs, read_pairs
from experiments import dpo
from policies.causality import Causality
from runtime import runlog
from runtime.config import CONF, Plan, validate
from runtime.journal import Journal
from runtime.session import Session
from runtime.videos import write
from tests.scored import network
from tests.students import timeless

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "preferences" / "example.csv"


def clip(path: Path, level: int, frames: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    video = np.full((frames, 24, 32, 3), level, dtype=np.uint8)
    video[:, :, :16] = 255 - level
    write(path, video, fps=8)
    return path


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Three pairs; the clips of the first two stand beside the list, those of the third where it says."""
    for name, level in (("a.mp4", 30), ("b.mp4", 90), ("far/c.mp4", 150)):
        clip(tmp_path / name, level)
    rows = [
        "path_A,path_B,prompt,VQ,MQ",
        'videos/a.mp4,b.mp4,"a cat, sitting",A,B',
        "a.mp4,b.mp4,nothing,same,same",
        "far/c.mp4,a.mp4,a dog,B,A",
        "far/c.mp4,a.mp4,a dog,B,A",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "pairs.csv"


def test_pairs_are_read_as_they_were_judged(listed: Path) -> None:
    motion, looks = read_pairs(listed, "MQ"), read_pairs(listed, "VQ")
    assert [(p.better.name, p.worse.name, p.prompt) for p in motion] == [
        ("b.mp4", "a.mp4", "a cat, sitting"),
        ("c.mp4", "a.mp4", "a dog"),
    ]
    assert [(p.better.name, p.worse.name) for p in looks] == [("a.mp4", "b.mp4"), ("a.mp4", "c.mp4")]
    batch = load_pairs(motion, (16, 16), 5, None)
    assert batch.video.shape == (4, 3, 5, 16, 16) and not batch.trajectory.presence.any()
    assert batch.names == ["pairs/b.mp4", "pairs/c.mp4", "pairs/a.mp4", "pairs/a.mp4"]
    assert batch.prompts == 2 * ["a cat, sitting", "a dog"]
    levels = (batch.video[:, :, :, :, 12:].mean((1, 2, 3, 4)) + 1) * 127.5
    torch.testing.assert_close(levels, torch.tensor([90.0, 150.0, 30.0, 30.0]), atol=6, rtol=0)


def test_a_drag_may_be_given(listed: Path) -> None:
    tracks = np.stack([np.linspace(4, 28, 12), np.full(12, 12.0)], -1)[None, :, None]
    np.save(listed.parent / "path.npy", tracks)
    listed.write_text("path_A,path_B,prompt,MQ,tracks\na.mp4,b.mp4,x,A,path.npy\n")
    (pair,) = read_pairs(listed, "MQ")
    found = load_pairs([pair], (24, 32), 9, None).trajectory
    assert found.presence.all()
    torch.testing.assert_close(found.xy[0, 0, :, 0].double(), torch.from_numpy(tracks[0, :9, 0, 0]), atol=0.6, rtol=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path_A,path_B\n1,2\n", "no column prompt, MQ"),
        ("path_A,path_B,prompt,MQ\na.mp4,b.mp4,x,C\n", "line 2: MQ is 'C'"),
        ("path_A,path_B,prompt,MQ\na.mp4,b.mp4,x,same\n", "every MQ is 'same'"),
        ("path_A,path_B,prompt,MQ\na.mp4,z.mp4,x,A\n", "line 2: no file at z.mp4"),
        ("", "no column"),
    ],
)
def test_bad_lists_are_refused(listed: Path, text: str, words: str) -> None:
    listed.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
        read_pairs(listed, "MQ")
    assert "\n" not in str(refused.value)


def test_short_clips_are_refused(listed: Path) -> None:
    with pytest.raises(ValueError, match="12 frames at 8 fps, but 13 are needed"):
        load_pairs(read_pairs(listed, "MQ"), (16, 16), 13, None)
    with pytest.raises(ValueError, match="6 frames at 4 fps"):
        load_pairs(read_pairs(listed, "MQ"), (16, 16), 9, 4.0)


def encoded(pairs: int = 3) -> EncodedPairs:
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, pairs, 3, 2, 4, 4, generator=draw)
    # `network` takes two channels of condition: a control alone.
    condition = torch.randn(2, pairs, 3, 2, 4, 4, generator=draw)
    return EncodedPairs(latents, condition, torch.randn(pairs, 2, 1, generator=draw))


def test_the_policy_comes_to_prefer_what_people_preferred() -> None:
    model, pairs, lines = network(), encoded(), list[str]()
    before = [p.detach().clone() for p in model.parameters()]
    sigma, eps = torch.full((3, 3), 0.755), torch.randn(3, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))

    def errors() -> torch.Tensor:
        with torch.no_grad():
            return flow_errors(model, pairs, torch.arange(3), sigma, eps, Causality())

    start = errors()
    fit = Fit(60, 2e-3, weight_decay=0.0)
    learn_preferences(3, 5.0, fit, model, pairs, Causality(), [1.0, 0.755, 0.522, 0.0], report=lines.append)
    gain = start - errors()
    assert (gain[0] > gain[1]).all(), "what was preferred has become likelier than what was not"
    first, last = lines[0], lines[-1]
    assert f"loss {math.log(2):.4f}" in first and "preference_accuracy 1.0000" in last
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def plan(model: Path, run_dir: Path, *overrides: str) -> Plan:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        names = ["stage=pairs", "rollout.frames=3", "world.sizes=[16x16]", "evaluation.clips=3", "logger=local"]
        return validate(compose("dpo", [*names, f"model.path={model}", f"run_dir={run_dir}", *overrides]))


@pytest.mark.parametrize("adaptation", ["lora", "attention"])
def test_the_experiment_runs_and_leaves_a_transformer(
    model: Path, tmp_path: Path, listed: Path, adaptation: str
) -> None:
    made = plan(model, tmp_path / "run", f"stage.file={listed}", "updates=3", f"adaptation={adaptation}")
    dpo.run(made)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["before"]["motion_error_px"] > 0 and (tmp_path / "run" / "transformer" / "config.json").is_file()
    first, *rows, last = runlog.read(tmp_path / "run")
    assert [row["step"] for row in (first, *rows, last)] == [0, 1, 2, 3, 3]
    for row, name in ((first, "before"), (last, "after")):
        assert row["eval/motion_error_px"] == found[name]["motion_error_px"]
    assert (tmp_path / "run" / "report.html").is_file()
    assert all({"loss", "grad_norm", "preference_accuracy", "preference_margin"} <= set(row) for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and rows[0]["grad_norm"] > 0


def test_offline_learning_follows_the_optimizer_and_beta(model: Path, tmp_path: Path, listed: Path) -> None:
    def after(name: str, *options: str) -> tuple[float, list[dict[str, Any]]]:
        made = plan(model, tmp_path / name, f"stage.file={listed}", "stage.batch=2", "updates=3", *options)
        session = Session(made.settings, made.config)
        before = [p.detach().clone() for p in session.parameters]
        with Journal(session, 3) as journal:
            journal.folder.mkdir(parents=True)
            dpo.learn(session, dpo.encode(session), journal)
        moved = max(float((p.detach() - q).abs().max()) for p, q in zip(session.parameters, before, strict=True))
        return moved, runlog.read(session.run_dir)

    base, rows = after("base", "optimizer.lr=1e-3", "optimizer.decay=0")
    assert base == pytest.approx(3e-3, rel=0.2), "AdamW's first steps are as long as its learning rate"
    slow, _ = after("slow", "optimizer.lr=1e-4", "optimizer.decay=0")
    falling, _ = after("falling", "optimizer.lr=1e-3", "optimizer.decay=1")
    assert slow < 0.2 * base and 0.5 * base < falling < 0.8 * base
    _, steep = after("steep", "optimizer.lr=1e-3", "optimizer.decay=0", "algorithm.beta=500")
    assert steep[0]["grad_norm"] == pytest.approx(10 * rows[0]["grad_norm"], rel=1e-3)


def test_a_run_of_pairs_goes_on_with_its_metrics(
    model: Path, tmp_path: Path, listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [f"stage.file={listed}", "stage.batch=1", "updates=3"]
    dpo.run(plan(model, tmp_path / "whole", *whole))
    kept = loop.keep
    with monkeypatch.context() as patch:  # stop after two steps, as a kill would
        patch.setattr(loop, "EVERY", 2)
        patch.setattr(loop, "keep", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt(kept(*a))))
        with pytest.raises(KeyboardInterrupt):
            dpo.run(plan(model, tmp_path / "parts", *whole))
    assert [row["step"] for row in runlog.read(tmp_path / "parts")] == [0, 1, 2]
    dpo.run(plan(model, tmp_path / "parts", *whole, "resume=true"))
    ours, theirs = ([timeless(row) for row in runlog.read(tmp_path / name)] for name in ("parts", "whole"))
    assert ours == theirs


def test_what_is_wrong_is_refused_in_one_line_before_anything_loads(model: Path, tmp_path: Path, listed: Path) -> None:
    for options, words in (
        ([], r"stage\.file is missing"),
        (["stage.file=nosuch.csv"], r"stage\.file: no file at nosuch\.csv"),
        ([f"stage.file={listed}", "stage.criterion=TA"], "no column TA"),
        ([f"stage.file={listed}", "algorithm.pairs=3"], r"algorithm\.pairs=3 has no effect with stage=pairs"),
        ([f"stage.file={listed}", "algorithm=grpo"], "stage=pairs is DPO, not GRPO"),
        ([f"stage.file={listed}", "optimizer.ema=0.5"], r"optimizer\.ema=0\.5 has no effect"),
        ([f"stage.file={listed}", "saving.every=5"], r"saving\.every=5 has no effect"),
        ([f"stage.file={listed}", "rollout.prompts=2"], r"rollout\.prompts=2 has no effect here; set stage\.batch"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
            plan(model, tmp_path / "run", *options)
        assert "\n" not in str(refused.value)


@pytest.mark.skipif(not REAL.is_file(), reason="no real pairs here")
def test_the_real_pairs() -> None:
    assert [(p.better.stem, p.worse.stem) for p in read_pairs(REAL, "MQ")] == [("example_1_B", "example_1_A")]
    looks = read_pairs(REAL, "VQ")
    assert [p.better.stem for p in looks] == ["example_1_B", "example_3_A"]
    batch = load_pairs(looks, (32, 48), 33, 16.0)
    assert batch.video.shape == (4, 3, 33, 32, 48) and batch.video.std() > 0.1
