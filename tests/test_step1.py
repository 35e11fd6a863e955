"""Step 1 end to end at a very small size: each experiment runs, goes on where it stopped, and its result loads."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from algorithms.distillation import chain
from algorithms.pretraining import loop
from experiments import ablation_step1, distill, finetune, learn, tables
from runtime import runlog, supervised
from runtime.cells import Home
from runtime.cli import SetupError
from runtime.config import CONF, Plan, validate
from runtime.journal import Journal
from runtime.session import Session
from runtime.signals import Stopped
from tests.students import timeless

SMALL = ["rollout.frames=3", "world.sizes=[16x16,16x24]", "evaluation.clips=3", "stage.pool=8"]
FINETUNE = [*SMALL, "model.transformer=transformer", "stage.batch=4", "updates=3", "rollout.sigmas=[1.0,0.5,0.0]"]
NAMES = ("teacher_forcing", "own_history", "ode", "consistency", "dmd")
STAGES = [f"stage.{name}.batch=3" for name in NAMES] + [f"stage.{name}.steps=2" for name in NAMES[:-1]]
DISTILL = [
    *SMALL,
    *STAGES,
    "stage.teacher=transformer",
    "stage.dmd.layers=[0]",
    "stage.dmd.generator_every=1",
    "updates=2",
]


def plan(primary: str, model: Path, run_dir: Path, *overrides: str) -> Plan:
    """A plan of an experiment of step 1; what `DISTILL` says of stages that do not run here is left out."""
    idle = [text.removesuffix("steps=0") for text in overrides if text.endswith(".steps=0")]
    idle += ["stage.dmd."] if "stage.match=false" in overrides else []
    line = [text for text in overrides if text not in DISTILL or not text.startswith(tuple(idle))]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate(compose(primary, [f"model.path={model}", f"run_dir={run_dir}", *line]))


def result(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "evaluation.json").read_text()))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run_dir / "transformer").glob("*.safetensors")))


def test_the_initial_model_then_the_teacher(model: Path, tmp_path: Path) -> None:
    finetune.run(plan("finetune", model, tmp_path / "initial", *FINETUNE, "stage.fresh=true", "stage.control=false"))
    started = weights(tmp_path / "initial")
    assert not started["patch_embedding.weight"][:, -4:].any(), "nothing is conditioned on the drag yet"
    first = f"model.transformer={tmp_path / 'initial' / 'transformer'}"
    finetune.run(plan("finetune", model, tmp_path / "teacher", *FINETUNE, first))
    assert weights(tmp_path / "teacher")["patch_embedding.weight"][:, -4:].any()
    found = result(tmp_path / "teacher")
    begun, *rows, last = runlog.read(tmp_path / "teacher")
    assert [row["step"] for row in (begun, *rows, last)] == [0, 1, 2, 3, 3]
    assert all({"loss", "grad_norm", "lr", "seconds/loss", "seconds/update"} < set(row) for row in rows)
    for row, end in ((begun, "before"), (last, "after")):
        assert row["eval/motion_error_px"] == found[end]["motion_error_px"]
    for name in ("config.yaml", "environment.json", "curves.png", "report.html"):
        assert (tmp_path / "teacher" / name).stat().st_size > 0
    assert found["before"] == result(tmp_path / "initial")["after"] != found["after"]
    assert (tmp_path / "teacher" / "videos" / "00.mp4").stat().st_size > 0


def test_adapters_learn_control_through_the_patch_embedding(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in parts, the first of which ends in the last evaluation, with all its steps kept."""
    finetune.run(plan("finetune", model, tmp_path / "initial", *FINETUNE, "stage.fresh=true", "stage.control=false"))
    first = [f"model.transformer={tmp_path / 'initial' / 'transformer'}", "adaptation=lora"]
    finetune.run(plan("finetune", model, tmp_path / "whole", *FINETUNE, *first))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "measured", stopping)
        finetune.run(plan("finetune", model, tmp_path / "parts", *FINETUNE, *first))
    assert not (tmp_path / "parts" / "evaluation.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("algorithms.distillation.finetune.flow_matching_loss", stopping)  # no step is taken again
        finetune.run(plan("finetune", model, tmp_path / "parts", *FINETUNE, *first, "resume=true"))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole["patch_embedding.weight"][:, -4:].any() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert result(tmp_path / "whole")["after"] == result(tmp_path / "parts")["after"]


def stopping(*anything: Any) -> None:
    """Somebody asks to stop."""
    raise Stopped


def test_a_run_goes_on_with_the_same_frozen_weights_only(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(model / "transformer", teacher)
    run = [*DISTILL, "stage.match=false", f"stage.teacher={teacher}", "stage.from_teacher=false"]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "stop", lambda journal: True)
        distill.run(plan("distill", model, tmp_path / "run", *run))
    (file,) = teacher.glob("*.safetensors")
    save_file({name: value + 0.1 for name, value in load_file(file).items()}, file)
    with pytest.raises(SetupError, match="put the files of model and teacher back"):
        distill.run(plan("distill", model, tmp_path / "run", *run, "resume=true"))


@pytest.mark.parametrize("adaptation", ["lora", "attention"])
def test_finetuning_of_a_part_of_the_weights(model: Path, tmp_path: Path, adaptation: str) -> None:
    made = plan("finetune", model, tmp_path / "run", *FINETUNE, f"adaptation={adaptation}")
    finetune.run(made)
    before = load_file(next((model / "transformer").glob("*.safetensors")))
    after = weights(tmp_path / "run")
    assert after.keys() == before.keys(), "the result is a plain transformer"
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(".attn" in name or ".ffn" in name for name in moved)
    # What is loaded from the folder measures as the run did.
    again = plan(
        "finetune", model, tmp_path / "again", *FINETUNE, f"model.transformer={tmp_path / 'run' / 'transformer'}"
    )
    metrics, _ = Session(again.settings, again.config).evaluate()
    assert metrics["motion_error_px"] == pytest.approx(result(tmp_path / "run")["after"]["motion_error_px"], abs=1e-3)


def test_a_stopped_run_goes_on_with_its_log_and_its_seconds(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this clock a step takes 10 s and the encoding of a frame size 100 s; nothing else takes any."""
    now = [0.0]
    for module in (loop, supervised):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0], time=lambda: now[0]))

    def slow(name: str, seconds: float) -> Any:
        module, _, function = name.rpartition(".")
        real = getattr(importlib.import_module(module), function)

        def slowly(*arguments: Any, **named: Any) -> Any:
            now[0] += seconds
            return real(*arguments, **named)

        monkeypatch.setattr(name, slowly)

    slow("algorithms.distillation.finetune.flow_matching_loss", 10)
    slow("algorithms.distillation.pool.encode_pool", 100)
    finetune.run(plan("finetune", model, tmp_path / "whole", *FINETUNE))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "stop", lambda journal: len(runlog.read(journal.session.run_dir)) == 3)
        finetune.run(plan("finetune", model, tmp_path / "parts", *FINETUNE))
    assert [row["step"] for row in runlog.read(tmp_path / "parts")] == [0, 1, 2]
    finetune.run(plan("finetune", model, tmp_path / "parts", *FINETUNE, "resume=true"))
    assert runlog.read(tmp_path / "parts") == runlog.read(tmp_path / "whole"), "no row lost, none doubled"
    for name in ("whole", "parts"):
        assert (result(tmp_path / name)["seconds"], result(tmp_path / name)["seconds_encoding"]) == (30, 200)


@pytest.mark.parametrize("chunk", [1, 3])
def test_an_interrupted_distillation_ends_as_one_that_was_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    options = [*DISTILL, f"rollout.chunk={chunk}", f"rollout.frames={3 * chunk}"]
    distill.run(plan("distill", model, tmp_path / "whole", *options))
    real = chain.Distillation._match

    def dying(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(chain.Distillation, "_match", dying)
    with pytest.raises(KeyboardInterrupt):
        distill.run(plan("distill", model, tmp_path / "parts", *options))
    assert (tmp_path / "parts" / "training" / "consistency.safetensors").is_file()
    monkeypatch.setattr(chain.Distillation, "_match", real)
    with pytest.raises(ValueError, match="resume=true"):
        plan("distill", model, tmp_path / "parts", *options)
    with pytest.raises(ValueError, match=r"stage.guidance: 3.0 -> 1.0"):
        plan("distill", model, tmp_path / "parts", *options, "resume=true", "stage.guidance=1.0")
    distill.run(plan("distill", model, tmp_path / "parts", *options, "resume=true"))
    ours, theirs = (weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert result(tmp_path / "whole")["after"] == result(tmp_path / "parts")["after"]
    log, again = ([timeless(row) for row in runlog.read(tmp_path / name)] for name in ("whole", "parts"))
    assert log == again and [row["step"] for row in log] == [*range(11), 10]
    stages = [{key.partition("/")[0] for key in row} - {"step"} for row in log[1:-1]]
    assert stages == [{name} for name in NAMES for _ in range(2)], "in their order"


@pytest.mark.parametrize("strategy", ["self_forcing", "teacher_forcing", "diffusion_forcing", "windowed"])
def test_every_strategy_moves_the_student(model: Path, tmp_path: Path, strategy: str) -> None:
    none = [f"stage.{name}.steps=0" for name in NAMES[:-1]]
    extra = ["strategy.frames=2"] if strategy == "windowed" else []
    options = [*DISTILL, *none, *extra, f"strategy={strategy}", "stage.dmd.ema=0", "stage.dmd.r1=1"]
    distill.run(plan("distill", model, tmp_path / "run", *options))
    after, before = weights(tmp_path / "run"), load_file(next((model / "transformer").glob("*.safetensors")))
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert all(bool(value.isfinite().all()) for value in after.values())


def test_distillation_into_adapters(model: Path, tmp_path: Path) -> None:
    options = [*DISTILL, "adaptation=lora", "stage.from_teacher=false"]
    distill.run(plan("distill", model, tmp_path / "run", *options))
    after, before = weights(tmp_path / "run"), load_file(next((model / "transformer").glob("*.safetensors")))
    assert after.keys() == before.keys(), "the result is a plain transformer"
    moved = {name.rsplit(".", 1)[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved and all("attn" in name or "ffn" in name for name in moved), "what has adapters, and nothing else"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stage.teacher=nosuch"], "nosuch has no config.json"),
        (["stage.dmd.layers=[0,4]"], "blocks 0 .. 0"),
        (["strategy=windowed", "strategy.frames=4"], "more than rollout.frames=3"),
        (["stage.eta=1.5"], r"stage.eta must lie in \[0, 1\]"),
        (["stage.dmd.batch=9"], "a batch repeats no clip"),
        (["adaptation=lora"], "stage.from_teacher=false"),
        (["optimizer.ema=0.9"], "optimizer.ema=0.9 has no effect here; set stage.dmd.ema"),
        (["optimizer.lr=1e-3"], "optimizer.lr=0.001 has no effect here; set stage.dmd.lr"),
        (["optimizer.betas=[0.5,0.9]"], "set stage.dmd.betas"),
        (["optimizer.grad_clip=2"], "set stage.dmd.clip"),
        (["optimizer.decay=0"], "optimizer.decay=0.0 has no effect here; take it out"),
        (["transition=flow_sde"], "transition=FlowSDE has no effect"),
        (["schedule=first"], "schedule=First has no effect"),
        (["schedule.scope=per_frame"], "schedule.scope=per_frame has no effect"),
        (["algorithm=nft"], "algorithm=NFT has no effect"),
        (["algorithm.credit=clip"], "algorithm.credit=clip has no effect"),
        (["guard.non_finite=stop"], "guard.non_finite=stop has no effect"),
        (["alarms.factor=3"], "alarms.factor=3.0 has no effect"),
        (["saving.every=10"], "saving.every=10 has no effect"),
        (["saving.best=frechet"], "saving.best=frechet has no effect"),
        (["evaluation.every=5"], "evaluation.every=5 has no effect"),
        (["scoring.epsilon=1"], "scoring.epsilon=1.0 has no effect"),
        (["rollout.history_gradient=true"], "rollout.history_gradient=True has no effect"),
        (["rollout.prompts=2"], "rollout.prompts=2 has no effect here; set stage.dmd.batch"),
        (["reward=smoothness"], "reward=smoothness has no effect here; take it out"),
        (["reward.motion.profile=train"], "reward.motion.profile=train has no effect"),
        (["tracker.radius=3"], "tracker.radius=3 has no effect"),
        (
            ["model.transformer=few_step"],
            "model.transformer=few_step has no effect here; the teacher's weights replace it",
        ),
        (["stage.match=false", "stage.dmd.lr=1e-3"], "stage.dmd.lr=0.001 has no effect here; take it out, or let"),
        (["stage.ode.steps=0", "stage.ode.lr=1e-2"], "stage.ode.lr=0.01 has no effect here; take it out, or let"),
        (["stage.match=false", "strategy=self_forcing"], "strategy=SelfForcing has no effect"),
        (["stage.match=false", "strategy.exit=per_frame"], "strategy.exit=per_frame has no effect"),
        (["stage.dmd.adversarial=0", "stage.dmd.r1=1"], "r1 and r2 have no effect"),
        (["stage.dmd.lr=0"], "stage.dmd.lr must be positive"),
        (["stage.ode.ema=1"], r"stage.ode.ema must lie in \[0, 1\), got 1"),
        (["strategy.exit=sometimes"], "per_video, per_frame"),
        (["stage.match=false", *(f"stage.{name}.steps=0" for name in NAMES[:-1])], "nothing to do"),
    ],
)
def test_bad_input_is_refused_before_anything_loads(
    model: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        plan("distill", model, tmp_path / "run", *DISTILL, *overrides)


def test_a_teacher_of_another_shape_is_refused_before_anything_loads(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "transformer", tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "ffn_dim": 7, "in_channels": 99}))
    other = f"stage.teacher={tmp_path / 'wide'}"
    with pytest.raises(ValueError, match=rf"has another shape .*: ffn_dim: {config['ffn_dim']} -> 7; set stage.from"):
        plan("distill", model, tmp_path / "run", *DISTILL, other)
    plan("distill", model, tmp_path / "run", *DISTILL, other, "stage.from_teacher=false")


def test_where_nothing_rewards_every_judge_is_welcome(model: Path, tmp_path: Path) -> None:
    judges = ["tracker@evaluation.tracker=ncc", "evaluation.scorer=aesthetic"]
    plan("distill", model, tmp_path / "run", *DISTILL, *judges)


def test_what_the_tables_run_is_not_refused(model: Path, tmp_path: Path) -> None:
    found = [*ablation_step1.cells(1, 4, "transformer", "transformer", []), *learn.cells(1, 4, 4)]
    rows = tables.Rows(Home(tmp_path, "w"), Home(tmp_path, "w"), 120, 300, 9)
    found += [rows.student(row, 0) for row in tables.STUDENTS]
    cells = {cell.name: cell for made in found for cell in (made, made.after) if cell and cell.script == "distill.py"}
    assert len(cells) == 8 + len(tables.STUDENTS)
    for name, cell in cells.items():
        overrides = [text.format(after=model) for text in cell.overrides]
        plan("distill", model, tmp_path / name, *overrides, "stage.teacher=transformer", "stage.dmd.layers=[0]")
