"""Checkpoints: what comes back is what was written, bit for bit, or nothing."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from runtime import checkpoint
from runtime.checkpoint import (
    Snapshot,
    complete_steps,
    latest,
    load,
    optimizer_tensors,
    read_state,
    restore_optimizer,
    save,
)
from runtime.runlog import JsonLines, read


def learner() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.full((1, 3), float(step) + 0.3)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(step: int, value: float = 1.0, **config: object) -> Snapshot:
    return Snapshot(step, {"seed": 0, **config}, {"weights": {"w": torch.full((2, 2), value)}}, {"dropped": 3})


def test_a_resumed_learner_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = learner()
    train(model, optimizer, range(5))
    tensors = {"weights": dict(model.state_dict()), "optimizer": optimizer_tensors(optimizer)}
    folder = save(tmp_path, Snapshot(5, {}, tensors), keep=1)
    train(model, optimizer, range(5, 9))

    again, its_optimizer = learner()
    state = load(folder)
    again.load_state_dict(state.tensors["weights"])
    restore_optimizer(its_optimizer, state.tensors["optimizer"])
    train(again, its_optimizer, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    fresh, without = learner()  # the moments matter: the test could not pass without them
    fresh.load_state_dict(state.tensors["weights"])
    train(fresh, without, range(5, 9))
    assert not torch.equal(fresh.weight, model.weight)


def test_round_trip_keeps_types_values_and_counters(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
        "b": torch.arange(6).view(2, 3).t(),
        "c": torch.tensor(7),
    }
    folder = save(tmp_path, Snapshot(1, {"x": [1.0, None]}, {"weights": tensors}, {"seen": 4}), keep=1)
    back = load(folder)
    assert (back.step, back.config, back.counters) == (1, {"x": [1.0, None]}, {"seen": 4})
    assert all(
        torch.equal(back.tensors["weights"][k], v) and back.tensors["weights"][k].dtype == v.dtype
        for k, v in tensors.items()
    )
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}


def test_tied_weights_are_written(tmp_path: Path) -> None:
    shared = torch.ones(2)
    folder = save(tmp_path, Snapshot(1, {}, {"weights": {"a": shared, "b": shared}}), keep=1)
    assert load(folder).tensors["weights"].keys() == {"a", "b"}


@pytest.mark.filterwarnings("ignore:.*is not complete")
def test_a_save_that_dies_anywhere_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = ["_sync", "replace_text", "sha256", "_remove"]
    seen = set()
    for point in points:
        for nth in range(6):
            run = tmp_path / f"{point}{nth}"
            save(run, snapshot(1, 1.0), keep=1)
            real, calls = getattr(checkpoint, point), [0]

            def dying(*args: object, real: object = real, calls: list[int] = calls, nth: int = nth) -> object:
                calls[0] += 1
                if calls[0] > nth:
                    raise KeyboardInterrupt
                return real(*args)  # type: ignore[operator]

            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, point, dying)
                with contextlib.suppress(KeyboardInterrupt):
                    save(run, snapshot(2, 2.0), keep=1)
            with_debris = len(list((run / "checkpoints").iterdir()))
            found = latest(run)
            assert found is not None
            state = load(found)
            assert state.tensors["weights"]["w"].eq(state.step).all()
            seen.add((state.step, with_debris))
    assert (1, 2) in seen and (2, 1) in seen, "both outcomes were reached, one of them with debris"


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        folder = save(tmp_path, snapshot(step), keep=5)
    path = folder / ("manifest.json" if damage == "manifest" else "weights.safetensors")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "flip" else content[: len(content) // 2])
    with pytest.raises((ValueError, FileNotFoundError)):
        load(folder)
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step_000001"
    assert not folder.exists() and folder.with_name("damaged_step_000002").is_dir()
    assert latest(tmp_path / "nothing") is None


def test_a_folder_that_somebody_set_aside_stays(tmp_path: Path) -> None:
    folder = save(tmp_path, snapshot(2), keep=5)
    own = folder.rename(folder.with_name("step_000002_good"))
    save(tmp_path, snapshot(1), keep=1)
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step_000001" and complete_steps(tmp_path) == [1]
    assert own.is_dir()


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, snapshot(step), keep=2)
    assert complete_steps(tmp_path) == [6, 8]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000006", "step_000008"]


def test_another_config_is_refused_with_the_differences() -> None:
    old = {"seed": 0, "optimizer": {"lr": 1.0}, "updates": 5, "run_dir": "a"}
    checkpoint.refuse_mismatch(old, {**old, "updates": 9, "run_dir": "b"})
    with pytest.raises(ValueError, match=r"optimizer.lr: 1.0 -> 2.0; seed: 0 -> 1;") as caught:
        checkpoint.refuse_mismatch(old, {**old, "seed": 1, "optimizer": {"lr": 2.0}})
    assert "\n" not in str(caught.value)


def test_foreign_optimizer_state_is_refused() -> None:
    model, optimizer = learner()
    train(model, optimizer, range(1))
    tensors = optimizer_tensors(optimizer)
    other = torch.optim.AdamW(nn.Linear(4, 2).parameters())
    with pytest.raises(ValueError, match="does not fit"):
        restore_optimizer(other, tensors)
    with pytest.raises(ValueError, match="does not fit"):
        restore_optimizer(torch.optim.AdamW(list(model.parameters())[:1]), tensors)


def test_state_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_state(tmp_path / "nope")
    with pytest.raises(FileNotFoundError, match="not a complete checkpoint"):
        read_state(tmp_path)
    folder = save(tmp_path, snapshot(1), keep=1)
    (folder / "state.json").write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        read_state(folder)


def test_history_of_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def rows(log: JsonLines, steps: range) -> None:
        for step in steps:
            log.log(step, {"reward": step / 3, "kl": float("nan") if step == 2 else 0.0})

    rows(JsonLines(tmp_path / "whole"), range(1, 7))
    rows(JsonLines(tmp_path / "broken"), range(1, 6))
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    rows(JsonLines(tmp_path / "broken", step=3), range(4, 7))
    whole, broken = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken"))
    assert whole == broken
    assert [row["step"] for row in read(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    assert json.loads(whole.splitlines()[1])["kl"] == "nan"


def test_snapshots_do_not_share_memory_with_what_trains_on(tmp_path: Path) -> None:
    model, optimizer = learner()
    train(model, optimizer, range(1))
    folder = save(tmp_path, Snapshot(1, {}, {"weights": dict(model.state_dict())}), keep=1)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(1, 3))
    assert torch.equal(load(folder).tensors["weights"]["weight"], before["weight"])
