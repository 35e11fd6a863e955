"""The loop end to end at a very small size: runs, resumes bit for bit, refuses what disagrees, leaves its results."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from data.video_files import read_frames
from experiments.train import run
from runtime import videos
from runtime.cli import SetupError
from runtime.config import CONF, Plan, as_trained, validate
from runtime.session import Session
from tests.test_clips import PATH, frame_folder, pixels
from tracking.ncc import NCC

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clips"


def plan(model: Path, run_dir: Path, *overrides: str) -> Plan:
    """A plan of the default experiment at the smallest size."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "grpo",
            [
                "+debug=smoke",
                f"model.path={model}",
                f"run_dir={run_dir}",
                "world.sizes=[16x16]",
                "evaluation.clips=3",
                "optimizer.lr=1e-3",
                *overrides,
            ],
        )
    return validate(cfg)


def history(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock says."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]


@pytest.mark.parametrize("algorithm", [["algorithm=grpo"], ["algorithm=ppo", "reward=aesthetic"]])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    model: Path, tmp_path: Path, algorithm: list[str]
) -> None:
    options = ["algorithm.minibatches=2", "algorithm.epochs=2", "optimizer.ema=0.5", "optimizer.decay=0", *algorithm]
    run(plan(model, tmp_path / "whole", *options, "updates=3"))
    run(plan(model, tmp_path / "parts", *options, "updates=1"))
    run(plan(model, tmp_path / "parts", *options, "updates=3", "resume=true"))
    whole, parts = (tmp_path / name / "checkpoints" / "step_000003" for name in ("whole", "parts"))
    critic = ["critic"] if "algorithm=ppo" in algorithm else []
    for file in ("weights", "optimizer", "ema", *critic):
        ours, theirs = (load_file(folder / f"{file}.safetensors") for folder in (whole, parts))
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # The run that was told to end after one update evaluated there as well.
    updates = [[r for r in history(tmp_path / name) if "reward" in r] for name in ("whole", "parts")]
    assert len(updates[0]) == 3 and json.dumps(updates[0]) == json.dumps(updates[1])


def evaluated(run_dir: Path, *overrides: str) -> Session:
    """What `python experiments/evaluate.py checkpoint=...` measures."""
    given = [f"checkpoint={run_dir / 'checkpoints' / 'step_000001'}", "evaluation.clips=3", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = as_trained(compose("evaluate", [*given, f"run_dir={run_dir / 'measured'}"]), given)
        made = validate(cfg, "evaluate")
    return Session(made.settings, made.config)


@pytest.mark.parametrize(
    "options", [["adaptation=full"], ["adaptation=lora", "adaptation.rank=2"], ["rollout.chunk=3"]]
)
def test_a_checkpoint_measures_as_its_run_did(model: Path, tmp_path: Path, options: list[str]) -> None:
    run(plan(model, tmp_path / "run", *options, "optimizer.ema=0.5", "rollout.window=1"))
    last = json.loads((tmp_path / "run" / "evaluation.json").read_text())["curve"][-1]
    metrics, _ = evaluated(tmp_path / "run").evaluate()
    assert metrics == same({name: value for name, value in last.items() if name != "update"})
    # The command line has the last word.
    other = evaluated(tmp_path / "run", "rollout.frames=6", "world=sprites", "world.sizes=[16x24]").truth[0].clips
    assert other.video.shape[2:] == (21, 16, 24)


def test_what_rewarded_a_checkpoint_does_not_measure_it(model: Path, tmp_path: Path) -> None:
    swapped = ["tracker=lucas_kanade", "tracker@evaluation.tracker=ncc"]
    run(plan(model, tmp_path / "run", *swapped))
    with pytest.raises(ValueError, match=r"was rewarded by LucasKanade.*add tracker@evaluation.tracker=ncc"):
        evaluated(tmp_path / "run")
    with pytest.raises(ValueError, match=r"was rewarded by the tower evaluation\.scorer=aesthetic;"):
        evaluated(tmp_path / "run", swapped[1], "evaluation.scorer=aesthetic")
    judge = evaluated(tmp_path / "run", swapped[1]).judge  # NCC, which rewards by default
    assert isinstance(judge.tracker, NCC)


def test_a_run_does_not_go_on_with_other_clips_or_settings(model: Path, tmp_path: Path) -> None:
    for name in "abcd":
        frame_folder(tmp_path / "videos", name, pixels(PATH))
    options = ["world=clips", f"world.folder={tmp_path / 'videos'}", "world.sizes=[16x16]", "rollout.frames=3"]
    options += ["evaluation.clips=2", "adaptation=full", "optimizer.decay=0"]
    run(plan(model, tmp_path / "run", *options))
    with pytest.raises(ValueError, match=r"config differs from the checkpoint's: seed: 0 -> 1"):
        plan(model, tmp_path / "run", *options, "resume=true", "updates=2", "seed=1")
    frame_folder(tmp_path / "videos", "e", pixels(PATH))
    with pytest.raises(SetupError, match=r"the clips are not those that .*train: \d+ -> \d+"):
        run(plan(model, tmp_path / "run", *options, "resume=true", "updates=2"))


def test_all_policies_are_measured_on_the_same_noise(model: Path, tmp_path: Path) -> None:
    """Also those whose own rollouts do not share theirs (the paper's recipe)."""
    run(plan(model, tmp_path / "run"))
    one, other = (evaluated(tmp_path / "run", f"rollout.share_initial_noise={text}") for text in ("true", "false"))
    assert torch.equal(one.evaluate()[1][0].video, other.evaluate()[1][0].video)


def test_how_far_a_policy_has_moved(model: Path, tmp_path: Path) -> None:
    run(plan(model, tmp_path / "still", "optimizer.lr=1e-12"))
    run(plan(model, tmp_path / "moved", "optimizer.lr=1e-2", "reward=aesthetic"))
    still, moved = (evaluated(tmp_path / name).divergence() for name in ("still", "moved"))
    assert 0 <= still < 1e-9 < 1e-5 < moved


def test_adapters_need_the_adaptation_that_made_them(model: Path, tmp_path: Path) -> None:
    run(plan(model, tmp_path / "run", "adaptation=lora", "adaptation.rank=2"))
    start = f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'step_000001'}"
    for options, words in ([], "use its adaptation"), (["adaptation=lora"], r"\(2, 24\) and not \(16, 24\)"):
        made = plan(model, tmp_path / "other", start, *options)
        with pytest.raises(ValueError, match=words):
            Session(made.settings, made.config)


def test_a_run_leaves_its_results(model: Path, tmp_path: Path) -> None:
    run(plan(model, tmp_path / "run"))
    for name in ("config.yaml", "metrics.jsonl", "evaluation.json", "environment.json", "curves.png", "report.html"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert sorted(p.name for p in (tmp_path / "run" / "videos").iterdir()) == [
        "00.mp4",
        "00.png",
        "01.mp4",
        "01.png",
        "02.mp4",
        "02.png",
    ]
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [row["update"] for row in found["curve"]] == [0, 1]
    assert found["truth"]["frechet"] == pytest.approx(0, abs=1e-6)


def killed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until the first checkpoint is complete, and no further."""

    def save(session: Session, required: bool = False) -> None:
        saved(session, required)
        raise KeyboardInterrupt

    saved = Session.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Session, "save", save)
        run(plan)


@pytest.mark.parametrize(("lost", "adaptation"), [("nothing", "attention"), ("results", "lora"), ("results", "full")])
def test_a_resumed_run_compares_with_the_weights_that_it_started_from(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, adaptation: str
) -> None:
    options = [f"adaptation={adaptation}", "optimizer.ema=0.5", "updates=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(plan(model, whole, *options))
    killed(plan(model, parts, *options), monkeypatch)
    if lost == "results":
        (parts / "evaluation.json").unlink()
        shutil.rmtree(parts / "samples")
    run(plan(model, parts, *options, "resume=true"))
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (parts, whole))
    assert [row["update"] for row in ours["curve"]] == [0, 2]
    assert ours == theirs and ours["before"] != ours["after"]
    assert history(parts) == history(whole)
    for name in sorted(p.name for p in (whole / "samples").iterdir()):
        a, b = (load_file(folder / "samples" / name) for folder in (parts, whole))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_an_evaluation_that_a_kill_left_out_is_made_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(plan(model, tmp_path), monkeypatch)  # after the last checkpoint, before its evaluation
    for _ in range(2):
        run(plan(model, tmp_path, "resume=true"))
    assert [row["step"] for row in history(tmp_path) if "eval/motion_error_px" in row] == [0, 1]
    assert (tmp_path / "report.html").is_file()


def test_a_run_that_begins_anew_keeps_no_row_of_the_one_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Session, "rollout", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        run(plan(model, tmp_path))
    run(plan(model, tmp_path, "resume=true"))
    assert [row["step"] for row in history(tmp_path)] == [0, 1, 1]


def test_a_run_says_when_it_first_evaluated_and_first_rolled_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan(model, tmp_path)
    run(replace(made, started=made.started - 1000))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("first ")]
    assert [line.split()[1] for line in lines] == ["evaluation", "rollout"]
    seconds = [float(line.split()[-2]) for line in lines]
    assert 1000 <= seconds[0] <= seconds[1]


@pytest.mark.parametrize(("minibatches", "shown"), [(1, False), (2, True)])
def test_clipping_shows_only_where_it_can_happen(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], minibatches: int, shown: bool
) -> None:
    run(plan(model, tmp_path, f"algorithm.minibatches={minibatches}"))
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("update 1/1"))
    assert ("clipped" in line) == shown


def test_acting_and_rescoring_agree_and_the_run_stops_where_they_do_not(model: Path, tmp_path: Path) -> None:
    made = plan(model, tmp_path / "run", "schedule=all", "rollout.window=1", "rollout.sink=1", "rollout.frames=4")
    session = Session(made.settings, made.config)
    rollout = session.rollout()
    session.score(rollout, session.decode(rollout))
    assert session.update(rollout)["log_prob_gap"] <= 1e-5
    # The weights have moved, so the stored log-probs are no longer theirs.
    with pytest.raises(RuntimeError, match="re-scored log-probs differ"):
        session.update(rollout)


def test_a_group_with_a_failed_reward_teaches_nothing(model: Path, tmp_path: Path) -> None:
    made = plan(model, tmp_path / "run", "algorithm.kl_weight=0", "updates=2")
    session = Session(made.settings, made.config)
    rollout = session.rollout()
    session.score(rollout, session.decode(rollout))
    assert session.update(rollout)["grad_norm"] > 0
    rollout = session.rollout()
    video = session.decode(rollout)
    video[:] = float("nan")
    metrics = session.score(rollout, video)
    assert metrics["groups_dropped"] == 2 and not rollout["mask"].any()
    # AdamW's momentum would move the weights without a gradient.
    before = [p.clone() for p in session.parameters]
    assert session.update(rollout) == {}
    assert all(torch.equal(a, b) for a, b in zip(before, session.parameters, strict=True))


def test_evaluation_does_not_depend_on_the_run(model: Path, tmp_path: Path) -> None:
    results = []
    for seed in (0, 1):
        made = plan(model, tmp_path / str(seed), f"seed={seed}")
        session = Session(made.settings, made.config)
        session.rollout()
        results.append(session.evaluate()[0])
    assert results[0] == same(results[1])


def same(metrics: dict[str, float]) -> Any:
    """The very numbers; NaN, where the tracker saw nothing of a random model's clips, equals NaN."""
    return pytest.approx(metrics, rel=0, abs=0, nan_ok=True)


def numbers(found: Any) -> list[float]:
    """Every number in nested lists and mappings, and every text that stands for one; not those of what a tracker saw,
    which is nothing in a random model's clips.
    """
    if isinstance(found, dict):
        seen = ("epe_px", "motion/error_px", "motion/clipped")
        return [n for name, value in found.items() if not name.endswith(seen) for n in numbers(value)]
    if isinstance(found, list):
        return [n for value in found for n in numbers(value)]
    return [float(found)] if isinstance(found, (int, float)) or found in ("nan", "inf", "-inf") else []


def drawn(path: Path) -> list[tuple[bool, bool]]:
    """Whether the last frame of each panel of a comparison shows the asked, and the tracked path."""
    frame = np.stack(list(read_frames(path)))[-1].astype(int)
    width = (frame.shape[1] - 4 * videos.GAP) // 3
    top = round(1.8 * (width // 18))
    panels = [frame[top : top + width, videos.GAP + i * (width + videos.GAP) :][:, :width] for i in range(3)]
    colours = (videos.ASKED, videos.TRACKED)
    near = [[(np.abs(panel - colour).max(-1) < 60).sum() for colour in colours] for panel in panels]
    return [(int(asked) > 5, int(tracked) > 5) for asked, tracked in near]


@pytest.mark.parametrize(
    "real",
    [False, pytest.param(True, marks=pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not here"))],
)
def test_clips_without_tracks_run_to_a_report_that_shows_them(model: Path, tmp_path: Path, real: bool) -> None:
    folder = CLIPS if real else tmp_path / "clips"
    if not real:
        for name, path in (("a", PATH), ("b", PATH.flip(0))):
            frame_folder(folder, name, pixels(path))
    made = plan(
        model, tmp_path / "run", "world=clips", f"world.folder={folder}", "world.sizes=[32x32]", "evaluation.clips=2"
    )
    with pytest.warns(UserWarning, match="prompt cut to" if real else "biased upwards"):
        run(made)
    page = (tmp_path / "run" / "report.html").read_text()
    shown = [base64.b64decode(data) for data in re.findall(r'src="data:video/mp4;base64,(\S+)"', page)]
    made_videos = sorted((tmp_path / "run" / "videos").glob("*.mp4"))
    assert len(made_videos) == 2 and shown == [path.read_bytes() for path in made_videos]
    assert [drawn(path) for path in made_videos] == [[(True, True)] * 3] * 2
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    found = numbers(evaluation) + numbers(history(tmp_path / "run"))
    assert len(found) > 30 and np.isfinite(found).all()
    assert evaluation["found_by"] == {"LucasKanade": 2} and "near 0 by construction" in page


def test_renoising_is_a_sampler_of_its_own(model: Path, tmp_path: Path) -> None:
    found = []
    for sampler in ("ode", "renoise", "renoise"):
        made = plan(model, tmp_path / sampler, f"evaluation.sampler={sampler}")
        _, samples = Session(made.settings, made.config).evaluate()
        found.append(samples[0].video)
    assert torch.equal(found[1], found[2]) and not torch.allclose(found[0], found[1], atol=1e-3)
