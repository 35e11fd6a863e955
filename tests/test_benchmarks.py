"""The benchmark: it compares like with like, and runs from end to end at the smallest size."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from algorithms.pretraining import towers, vae
from algorithms.pretraining.transformer import Shape, build_transformer
from benchmarks import __main__ as benchmarks
from benchmarks import policy
from benchmarks.measure import race
from data.sprites import Sprites, vocabulary
from envs.ar_video import start
from envs.transitions import CPS
from policies.actor import Actor
from policies.causality import Causality

BATCH, FRAMES, STEPS = 2, 4, 3
SMALL = Shape(dim=16, heads=2, layers=2, ffn=16)


def actor(history_gradient: bool = False) -> Actor:
    network = build_transformer(SMALL, 2, 8).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return Actor(network, CPS(), Causality(window=2, history_gradient=history_gradient))


def episode() -> TensorDict:
    draw = torch.Generator().manual_seed(1)
    return start(
        condition=torch.randn(BATCH, FRAMES, 8, 4, 4, generator=draw),
        text=torch.randn(BATCH, 3, 8, generator=draw),
        sigma_table=torch.tensor([1.0, 0.755, 0.522, 0.0]),
        stochastic=torch.tensor([False, True, False]),
        key=torch.tensor([[0, 0, 0, b] for b in range(BATCH)]),
        latent_shape=(2, 4, 4),
    )


@pytest.mark.parametrize("history_gradient", [False, True])
def test_every_way_of_rescoring_has_the_same_log_probs_and_gradient(history_gradient: bool) -> None:
    player = actor(history_gradient)
    rollout = policy.act(player, episode())
    scored = [(m, 1) for m in range(FRAMES)]
    every = [(m, n) for m in range(FRAMES) for n in range(STEPS)]
    found = []
    for way in (
        lambda: policy.parallel(player, rollout, learn=True),
        lambda: policy.replay(player, rollout, scored, learn=True),
        lambda: policy.replay(player, rollout, every, learn=True),
    ):
        player.zero_grad()
        log_probs = way()
        assert bool(((log_probs != 0) == rollout["stochastic"]).all())
        torch.testing.assert_close(log_probs, rollout["log_prob"], atol=1e-5, rtol=0)
        found.append({name: p.grad for name, p in player.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-4, rtol=1e-4)


def test_what_goes_through_the_network_is_counted() -> None:
    """Parallel: past and present. Replay: each step and, fused or not, each finished frame but the last."""
    player = actor()
    rollout = policy.act(player, episode())
    every = [(m, n) for m in range(FRAMES) for n in range(STEPS)]

    def count(action: object) -> str:
        return policy.passes(player, BATCH, action)  # type: ignore[arg-type]

    assert count(lambda: policy.parallel(player, rollout, False)) == "2 calls, 7 frames"
    assert count(lambda: policy.replay(player, rollout, every, False)) == "12 calls, 15 frames"
    assert count(lambda: policy.replay(player, rollout, every[1::STEPS], False)) == "7 calls, 7 frames"
    assert count(lambda: policy.act(player, episode())) == "12 calls, 15 frames"
    # Frame m is denoised STEPS times, each time after all m frames before it.
    assert count(lambda: policy.act(player, episode(), forget=True)) == "27 calls, 30 frames"


def test_a_race_takes_turns_and_leaves_the_first_lap_out() -> None:
    calls: list[str] = []

    def contestant(name: str, warm: float) -> None:
        time.sleep(warm if name in calls else 0.2)
        calls.append(name)

    seconds = race({n: lambda n=n: contestant(n, 0.01) for n in "ab"}, 3, lambda: None)  # type: ignore[misc]
    assert calls == list("abababab")
    assert all(0.01 <= value < 0.1 for value in seconds.values())


def test_sides_that_disagree_are_not_compared() -> None:
    with pytest.raises(RuntimeError, match="rollout: the two sides differ by 1"):
        policy._agree("rollout", torch.zeros(2), torch.ones(2))
    with pytest.raises(RuntimeError, match="differ by nan"):
        policy._agree("rollout", torch.zeros(1), torch.tensor([float("nan")]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose networks have seen next to nothing."""
    folder = tmp_path_factory.mktemp("model")
    world = Sprites(frames=5, sizes=["16x16"])
    stage = towers.TowerStage(width=16, layers=1, projection=8, steps=1, batch=2, pool=2)
    for name in ("aesthetic", "aesthetic_eval"):
        towers.train_towers(world, vocabulary(), stage, folder, name, lambda line: None)
    codec = vae.VAEStage(base_dim=4, dim_mult=[1, 1, 1], z_dim=4, steps=1, batch=2, pool=2)
    vae.train_vae(world, codec, folder / "vae", lambda line: None)
    build_transformer(SMALL, 4, 16).save_pretrained(folder / "transformer")
    return folder


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as left:
        benchmarks.main()
    return int(left.value.code or 0)


def test_one_run_prints_and_writes_everything(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--iterations", "1", "--repeats", "1", "--batches", "2", "--samples", "2"]
    sizes = ["rollout.prompts=1", "rollout.group_size=2", "rollout.frames=2", "world.sizes=[16x16]"]
    code = bench(monkeypatch, *options, f"model.path={model}", "run_dir=out", "device=cpu", *sizes)
    out, err = capfd.readouterr()
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    conditions, rescoring, caching, generation, first, steady, against, phases = (
        value for name, value in result.items() if name != "overrides"
    )
    assert {"processor", "cores", "threads", "seed", "commit", "date", "versions"} <= conditions.keys()
    assert [row["phase"] for row in phases] == ["rollout", "decode", "reward", "update", "rest"]
    assert sum(row["share"] for row in phases) == pytest.approx(1)
    assert [(row["batch"], row["gradient"]) for row in rescoring] == [(2, False), (2, True)]
    for row in rescoring:
        assert row["faster than same steps"] == pytest.approx(row["same steps, s"] / row["parallel, s"])
        assert row["met"] == (row["faster than same steps"] >= 4)
    assert caching[0]["faster"] == pytest.approx(caching[0]["recomputed, s"] / caching[0]["cached, s"])
    row = generation[0]
    assert row["pixel frames per s"] == pytest.approx(2 * 5 / (row["acting, s"] + row["decoding, s"]))
    assert [row["part"] for row in first[:-1]] == ["text", "image", "control", "denoise", "decode"]
    assert first[-1]["p50"] >= max(row["p50"] for row in first[1:-1]) and first[-1]["samples"] == 2
    assert all(row["p50"] <= row["p95"] <= row["p99"] for row in first)
    assert steady[0]["pixel frames per s"] == pytest.approx(4 / steady[0]["seconds a chunk"])
    assert against[0]["per token, diffusers 1"] == 1
    assert [row["frames through"] for row in against] == [2, 2, 2, 3, 4, 4]
    update = next(row for row in phases if row["phase"] == "update")
    assert update["TFLOP"] > 0 and 0 < update["share of a matrix product's rate"] < 1
    assert all(row["peak GB"] > 0 for row in phases[:-1])
    for words in (
        "conditions",
        "one parallel pass",
        "rebuilding the history",
        "first frame",
        "rest",
        "at most 10%",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repeats", "0"], "must be at least 1"),
        (["--batches", "4,x"], "--batches"),
        (["--batches", "0"], "at least 1"),
        (["--only", "speed"], "choose some of rescoring"),
        (["--compile", "fast"], "--compile must be one of none"),
        (["--name", "../up"], "plain file name"),
        (["--nosuch"], "nosuch"),
        (["nosuch=1"], "nosuch does not exist"),
        (["rollout.prompts=0"], "rollout.prompts must be at least 1"),
        (["model.path=/does/not/exist"], "/does/not/exist"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    code = bench(monkeypatch, *arguments)
    assert code == 2 and words in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
