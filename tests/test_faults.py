"""What a run promises when something goes wrong; a few trials of each kind. `make soak` makes them all."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards.base import RewardFailed
from runtime import checkpoint
from runtime.checkpoint import Snapshot
from runtime.lock import FolderLock
from runtime.runlog import JsonLines, read
from runtime.session import Session
from runtime.signals import StopFlag, Stopped
from tests import trials, update_trials
from tests.processes import plan, together, train


def test_kills_while_saving_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    assert trials.kills_while_saving(tmp_path, 5)["loads"] == 5


def test_a_killed_run_ends_as_one_that_was_not(model: Path, tmp_path: Path) -> None:
    assert trials.kills_anywhere(model, tmp_path, 2, updates=3)["kills"] == 2


def test_damaged_checkpoints_never_load_as_something_else(tmp_path: Path) -> None:
    found = trials.corruptions(tmp_path, 60)
    assert sum(found.values()) == 60 and found.get("harmless", 0) < 10


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (1, signal.SIGUSR1), (2, signal.SIGINT)])
def test_a_signal_loses_no_update(model: Path, tmp_path: Path, ranks: int, number: int) -> None:
    assert trials.terminations(model, tmp_path, 1, ranks, number, seed=ranks + number)["updates_lost"] == 0


@pytest.mark.parametrize("engine", ["plain", "deepspeed_z2"])
@pytest.mark.parametrize("point", ["latent", "gradient"])
def test_what_is_not_finite_reaches_no_weights_and_can_be_seen_again(
    model: Path, tmp_path: Path, point: str, engine: str
) -> None:
    if engine != "plain":
        pytest.importorskip("deepspeed")
    run_dir = update_trials.injection(model, tmp_path, point, f"engine={engine}")
    rows = read(run_dir)
    assert [row["step"] for row in rows if f"skipped/{point}" in row] == [2]
    if engine == "plain":
        bundle = run_dir / "replay" / "step_000001"
        together(1, update_trials.replayed, bundle, point)
        if point == "latent":
            together(1, update_trials.replayed, bundle, "", 1)


def test_every_engine_computes_the_same_update(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    found = update_trials.engines(model, tmp_path, 1)
    assert len(found) == len(update_trials.ENGINES)


def sessions(model: Path, folder: Path, *overrides: str) -> Session:
    made = plan(model, folder, "reward=aesthetic", *overrides)
    return Session(made.settings, made.config)


def learned(session: Session) -> dict[str, float]:
    rollout = session.rollout()
    return session.score(rollout, session.decode(rollout)) | session.update(rollout)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "dpo", "nft"])
def test_accumulation_does_not_change_the_update(model: Path, tmp_path: Path, algorithm: str) -> None:
    options = [f"algorithm={algorithm}", "rollout.group_size=4", "reward=aesthetic"]
    options += ["algorithm.margin=0"] if algorithm == "dpo" else []
    options += ["algorithm.minibatches=2", "algorithm.epochs=1"]
    one, many = (sessions(model, tmp_path / n, *options, f"engine.accumulation={n}") for n in ("1", "3"))
    a, b = learned(one), learned(many)
    assert a.keys() == b.keys() and a["grad_norm"] > 0
    assert {k: v for k, v in a.items() if "log_prob" not in k} == pytest.approx(
        {k: v for k, v in b.items() if "log_prob" not in k}, rel=1e-3, abs=1e-6, nan_ok=True
    )
    ours, theirs = (torch.cat([p.detach().flatten() for p in s.parameters]) for s in (one, many))
    assert (ours - theirs).norm() <= 1e-5 * ours.norm()


def test_checkpointed_activations_are_the_same_bits(model: Path, tmp_path: Path) -> None:
    key = "engine.activation_checkpointing"
    one, two = (sessions(model, tmp_path / n, "adaptation=full", f"{key}={n}") for n in ("false", "true"))
    assert two.episodes.networks.transformer.gradient_checkpointing
    learned(one), learned(two)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters, two.parameters, strict=True))


def test_bf16_is_of_the_network_alone(model: Path, tmp_path: Path) -> None:
    options = ["adaptation=full", "rollout.history_gradient=false", "algorithm.minibatches=1"]
    one, two = (sessions(model, tmp_path / n, *options, f"engine.precision={n}") for n in ("fp32", "bf16"))
    rollout = one.rollout()
    one.score(rollout, one.decode(rollout))
    gradients = []
    for session in (one, two):
        found = session.loss_module(rollout)
        assert found["loss_objective"].dtype == torch.float32
        found["loss_objective"].backward()
        # A weight that autocast's cache holds without a graph would have no gradient at all.
        gradients.append(torch.cat([p.grad.flatten() for p in session.parameters if p.grad is not None]))
    assert gradients[0].shape == gradients[1].shape and not torch.equal(*gradients)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98
    learned(two)  # acting and re-scoring agree to bf16's rounding
    assert all(p.dtype == torch.float32 for p in two.parameters)


def test_draws_and_clips_do_not_depend_on_the_number_of_processes(model: Path, tmp_path: Path) -> None:
    episodes = sessions(model, tmp_path, "rollout.prompts=4").episodes
    whole, clips = episodes.training(3, 5)
    parts = [episodes.training(3, 5, rank, 2) for rank in range(2)]
    assert [name for _, part in parts for name in part.names] == clips.names
    for key in ("key", "latents", "stochastic"):
        assert torch.equal(torch.cat([state[key] for state, _ in parts]), whole[key])


def test_deepspeed_computes_in_bf16_what_the_plain_engine_does(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    options = [*trials.RUN, "updates=1", "engine.precision=bf16"]
    # Both in two processes: in bfloat16 another cut of a mini-batch is another rounding.
    together(2, train, model, tmp_path / "plain", *options)
    together(2, train, model, tmp_path / "zero", *options, "engine=deepspeed_z2")
    assert update_trials.distance(tmp_path / "zero", tmp_path / "plain", 1) < 1e-5
    saved = checkpoint.load(tmp_path / "zero" / "checkpoints" / "step_000001").tensors["weights"]
    assert all(weight.dtype == torch.float32 for weight in saved.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_of_deepspeed_comes_back_exactly(model: Path, tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed")
    options = [*trials.RUN, f"engine=deepspeed_z{stage}"]
    together(2, train, model, tmp_path / "whole", *options, "updates=2")
    together(2, train, model, tmp_path / "parts", *options, "updates=1")
    together(2, train, model, tmp_path / "parts", *options, "updates=2", "resume=true")
    assert trials.weights(tmp_path / "whole") == trials.weights(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"engine\..*; processes: 2 -> 1; undo that"):
        sessions(model, tmp_path / "parts", *trials.RUN, "updates=3", "resume=true")


def test_a_stop_leaves_the_weights_of_the_last_update(model: Path, tmp_path: Path) -> None:
    session = sessions(model, tmp_path)
    learned(session)
    before = [p.clone() for p in session.parameters]
    session.stop.requested = True
    with pytest.raises(Stopped):
        session.rollout()
    session.save(required=True)
    assert session.iteration == 1 and all(torch.equal(a, b) for a, b in zip(before, session.parameters, strict=True))


def test_what_a_launcher_sends_twice_is_one_request() -> None:
    with StopFlag() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        with pytest.raises(Stopped):
            stop.poll()


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(ValueError, match=r"in use by process \d+"), FolderLock(tmp_path):
        pass
    with FolderLock(tmp_path):
        pass


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, Snapshot(step, {}, {"weights": {"w": torch.ones(1)}}), keep=2, best=2)
    assert checkpoint.complete_steps(tmp_path) == [2, 4, 5]


def test_a_run_keeps_the_checkpoint_that_its_evaluation_prefers(model: Path, tmp_path: Path) -> None:
    together(1, train, model, tmp_path, *trials.RUN, "updates=4", "evaluation.every=1", "saving.keep=1",
             "saving.best=frechet", "optimizer.lr=1e-2")  # fmt: skip
    curve = json.loads((tmp_path / "evaluation.json").read_text())["curve"]
    best = min(curve[1:], key=lambda row: row["frechet"])["update"]
    assert checkpoint.complete_steps(tmp_path) == sorted({best, 4})


def test_a_full_disk_ends_no_run_and_hurts_no_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    from tests.faulty import full_disk

    monkeypatch.setattr(safetensors.torch, "save_file", safetensors.torch.save_file)
    full_disk(tmp_path / "flag")
    session, said = sessions(model, tmp_path / "run"), []
    session.notice = said.append
    learned(session)
    session.save()
    (tmp_path / "flag").touch()
    for _ in range(2):
        learned(session)
        session.save()
        assert session.unsaved and checkpoint.complete_steps(session.run_dir) == [1]
    assert len(said) == 1 and "No space left on device" in said[0]
    with pytest.raises(OSError, match="free space, then go on with"):
        session.save(required=True)
    (tmp_path / "flag").unlink()
    session.save()
    assert checkpoint.complete_steps(session.run_dir) == [1, 3] and not session.unsaved


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*args: object) -> None:
        raise OSError("Device or resource busy")

    session, said = sessions(model, tmp_path), []
    session.notice = said.append
    monkeypatch.setattr(checkpoint, "prune", busy)
    learned(session)
    session.save(required=True)
    assert not session.unsaved and checkpoint.complete_steps(session.run_dir) == [1]
    assert len(said) == 1 and "busy" in said[0]


def test_a_run_is_not_resumed_on_other_frozen_weights(model: Path, tmp_path: Path) -> None:
    network = tmp_path / "model"
    shutil.copytree(model, network)
    options = ["updates=1", "adaptation=attention"]
    together(1, train, network, tmp_path / "run", *trials.RUN, *options)
    sessions(network, tmp_path / "run", *trials.RUN[1:], *options, "resume=true")
    path = next((network / "transformer").glob("*.safetensors"))
    weights = load_file(path)
    save_file({k: v + (1e-3 if k == "patch_embedding.bias" else 0) for k, v in weights.items()}, path)
    with pytest.raises(ValueError, match="weights that do not train are not those"):
        sessions(network, tmp_path / "run", *trials.RUN[1:], *options, "resume=true")


def test_a_stop_in_the_last_evaluation_is_not_an_end(model: Path, tmp_path: Path) -> None:
    from runtime.outcome import Outcome

    session = sessions(model, tmp_path, "updates=1")
    outcome = Outcome(session, SimpleNamespace(log=lambda *a: None), SimpleNamespace(phase=str, note=str))
    outcome.begin()
    learned(session)
    session.stop.requested = True
    with pytest.raises(Stopped):
        outcome.evaluate()
    assert not outcome.complete and "go on with" in outcome.finish()
    assert not json.loads(outcome.path.read_text())["complete"]


def test_a_reward_that_never_answers_ends_the_run(model: Path, tmp_path: Path) -> None:
    options = ["reward.aesthetic._target_=tests.faulty.OutAtTimes", f"+reward.aesthetic.outage={tmp_path}"]
    session = sessions(model, tmp_path / "run", *options, "guard.patience=2")
    before = [p.clone() for p in session.parameters]
    with pytest.warns(UserWarning, match="does not answer"):
        assert learned(session)["groups_dropped"] == 2
        with pytest.raises(RewardFailed, match=r"in 2 updates in a row, the last update 2 \(guard\.patience\)"):
            learned(session)
    assert all(torch.equal(a, b) for a, b in zip(before, session.parameters, strict=True))


def test_a_reward_that_fails_in_every_group_ends_the_run_although_most_samples_have_one(
    model: Path, tmp_path: Path
) -> None:
    options = ["reward.aesthetic._target_=tests.faulty.OneInTwo", "guard.patience=2"]
    session = sessions(model, tmp_path / "run", *options)
    assert learned(session)["groups_dropped"] == 2
    with pytest.raises(RewardFailed, match="in 2 updates in a row"):
        learned(session)


def test_a_file_system_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("runtime.lock.fcntl.flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked"), FolderLock(tmp_path):
        pass


def test_a_log_whose_folder_goes_loses_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    log = JsonLines(tmp_path / "run")
    log.log(1, {"reward": 1.0})
    shutil.rmtree(tmp_path / "run")
    log.log(2, {"reward": 2.0})
    assert [row["step"] for row in read(tmp_path / "run")] == [1, 2]
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("no folder can be made here")
    for step in (3, 4):
        log.log(step, {"reward": 3.0})
    assert capsys.readouterr().err.count("cannot be written") == 1
    (tmp_path / "run").unlink()
    log.close()
    assert [row["step"] for row in read(tmp_path / "run")] == [1, 2, 3, 4]


def test_adapters_that_a_run_starts_from_belong_to_its_reference(model: Path, tmp_path: Path) -> None:
    lora = ["adaptation=lora", "adaptation.rank=2", "optimizer.lr=1e-1", "algorithm.minibatches=1"]
    first = sessions(model, tmp_path / "first", *lora)
    learned(first)
    first.save()
    start = f"checkpoint={checkpoint.folder_of(first.run_dir, 1)}"
    again = sessions(model, tmp_path / "again", *lora, start)
    rollout = again.rollout()
    with torch.no_grad():
        now, initial = again.actor.evaluate(rollout), again.loss_module.reference.evaluate(rollout)
    assert torch.equal(now["mean"], initial["mean"])
    assert learned(again)["kl"] == 0


def test_a_checkpoint_brings_its_critic(model: Path, tmp_path: Path) -> None:
    first = sessions(model, tmp_path / "first", "algorithm=ppo")
    learned(first)
    first.save()
    start = f"checkpoint={checkpoint.folder_of(first.run_dir, 1)}"
    again = sessions(model, tmp_path / "again", "algorithm=ppo", start)
    assert all(torch.equal(a, b) for a, b in zip(first.critic.parameters(), again.critic.parameters(), strict=True))
    with pytest.warns(UserWarning, match="critic of another kind"):
        sessions(model, tmp_path / "other", "algorithm=ppo", "algorithm.critic=net", start)


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_an_exported_policy_comes_back(model: Path, tmp_path: Path, adaptation: str) -> None:
    from experiments import export

    options = [f"adaptation={adaptation}", *(["adaptation.rank=2"] if adaptation == "lora" else [])]
    session = sessions(model, tmp_path / "run", *options, "optimizer.lr=1e-2")
    learned(session)
    session.save()
    start = f"checkpoint={checkpoint.folder_of(session.run_dir, 1)}"
    export.run(plan(model, tmp_path / "out", *options, start, primary="export"))
    back = sessions(model, tmp_path / "back", f"model.transformer={tmp_path / 'out' / 'transformer'}")
    rollout = session.rollout()
    with torch.no_grad():
        ours, theirs = (s.actor.evaluate(rollout)["mean"] for s in (session, back))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if adaptation == "full":
        assert torch.equal(ours, theirs)
    assert load_file(next((tmp_path / "out" / "transformer").glob("*.safetensors")))


def test_memory_does_not_grow(model: Path, tmp_path: Path) -> None:
    update_trials.growth(model, tmp_path, 20, 8, percent=5.0)
