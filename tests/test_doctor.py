"""The doctor: its estimates against the facts and against what a run takes; what it refuses and what it advises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments import doctor
from runtime import estimate, machine, workload
from runtime.config import CONF, validate
from runtime.estimate import Decoder, Workload
from runtime.machine import Check

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 52,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "image_dim": 1280,
    "added_kv_proj_dim": 1536,
    "rope_max_seq_len": 1024,
}


def settings(*overrides: str, primary: str = "grpo"):  # type: ignore[no-untyped-def]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate(compose(primary, list(overrides))).settings


FULL = Workload(
    prompts=8,
    group=8,
    frames=21,
    steps=3,
    stochastic=1,
    tokens=1560,
    latent=16 * 60 * 104,
    condition=36 * 60 * 104,
    pixels=480 * 832,
    text=512 * 4096,
    held=7,
    parameters=1_564_526_912,
    trainable=1_564_526_912,
    layers=30,
    width=1536,
    ffn=8960,
    weight_bytes=2,
    compute_bytes=2,
    reference=1,
)


def test_cache_of_the_full_size_model_is_that_of_the_facts() -> None:
    one = estimate.cache_bytes(30, 1536, 1560, 1, 1, 2)
    assert one == 287_539_200
    assert estimate.phases(FULL)["rollout"]["cache of finished frames"] == 64 * 7 * one


def test_linear_layers_cost_2_5_gflop_a_token() -> None:
    assert estimate.linear_flops(1536, 8960, 30) == pytest.approx(2.5e9, rel=0.01)


def test_counts_are_those_of_the_networks() -> None:
    from policies.adapters import Adaptation

    assert workload.counts(WAN, Adaptation())[0] == 1_564_526_912
    made = settings("adaptation=attention")
    network = made.model.load("cpu").transformer
    made.adaptation.apply(network)
    work = workload.workload(made)
    assert work.parameters == sum(p.numel() for p in network.parameters())
    assert work.trainable == sum(p.numel() for p in network.parameters() if p.requires_grad) < work.parameters
    adapters = workload.workload(settings("adaptation=lora"))
    assert adapters.reference == 2 and adapters.parameters > work.parameters
    video = made.model.load("cpu").video
    assert work.decoder.parameters == sum(p.numel() for p in video.parameters())
    assert (work.tokens, work.latent, work.condition, work.pixels) == (20, 8 * 80, 20 * 80, 1280)


def test_optimizer_and_cache_are_what_a_run_has(model: Path) -> None:
    made = settings("adaptation=full", "rollout.prompts=1", "rollout.group_size=2", "world.sizes=[32x32]")
    made = replace(made, model=replace(made.model, path=str(model)))
    work = workload.workload(made)
    network = made.model.load("cpu").transformer
    optimizer = torch.optim.AdamW(network.parameters())
    sum(p.sum() for p in network.parameters()).backward()
    optimizer.step()
    moments = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert sum(v.numel() * v.element_size() for v in moments) == estimate.optimizer_bytes(work.trainable)
    from policies.causality import Causality
    from policies.kv_cache import KVCache

    cache = KVCache(Causality(window=7))
    key = torch.zeros(2, 2, work.tokens, work.width // 2)
    for layer in range(work.layers):
        cache.write(layer, key, key, 1)
    held = [t for pair in cache._layers.values() for t in pair]
    expected = estimate.cache_bytes(work.layers, work.width, work.tokens, work.held, 2, 4)
    assert sum(t.numel() * t.element_size() for t in held) == expected


def test_processes_share_the_work_and_zero_the_state() -> None:
    assert estimate.optimizer_bytes(10) == 80 == estimate.optimizer_bytes(10, 2, 0)
    assert estimate.optimizer_bytes(10, 2, 1) == 40
    split = replace(FULL, processes=8)
    assert split.samples == 8 and estimate.activation_bytes(split) * 8 == estimate.activation_bytes(FULL)
    for zero, shared in (
        (1, {"optimizer"}),
        (2, {"optimizer", "gradients"}),
        (3, {"optimizer", "gradients", "weights"}),
    ):
        rows, whole = estimate.standing(replace(split, zero=zero)), estimate.standing(split)
        for name in ("weights", "gradients", "optimizer"):
            assert rows[name] * (8 if name in shared else 1) == whole[name]


def test_groups_that_stay_together_are_not_cut_into_parts() -> None:
    work = workload.workload(
        settings("algorithm=dpo", "adaptation=full", "rollout.prompts=2", "algorithm.minibatches=2")
    )
    assert work.block == work.group > 1
    assert estimate.activation_bytes(replace(work, accumulation=4)) == estimate.activation_bytes(work)
    assert "algorithm.minibatches=4" not in estimate.changes(replace(work, switches=frozenset()))
    for name, expected in estimate.changes(work).items():
        assert expected.block == expected.group, name


def test_what_is_advised_lowers_the_peak_most() -> None:
    work = replace(FULL, switches=frozenset({"engine.accumulation", "engine.activation_checkpointing"}), processes=8)
    best = estimate.advice(work)
    assert len(best) == 2 and best[0].setting == "engine.activation_checkpointing=true"
    changed = estimate.changes(work)
    peaks = {name: estimate.peak_bytes(other) for name, other in changed.items()}
    assert [a.peak for a in best] == sorted(peaks.values())[:2] and best[0].peak < estimate.peak_bytes(work)
    assert "engine.accumulation=2" in changed and "engine=deepspeed_z3 (weights split over the processes)" in changed
    assert not any("model" in name or "engine" in name for name in estimate.changes(FULL)), "only what there is"
    for name in ("rollout.prompts=4", "rollout.group_size=4", "rollout.window=3", "algorithm.minibatches=2"):
        assert name in estimate.changes(FULL)


def test_advised_settings_are_settings() -> None:
    """Each can be typed, composes and has the effect that was promised."""
    work = workload.workload(settings("algorithm.kl_weight=0.01", "adaptation=full"))
    for name, expected in estimate.changes(work).items():
        made = workload.workload(settings("adaptation=full", name.split(" ")[0]))
        if name.startswith("adaptation=lora"):
            assert made.trainable < work.trainable
        else:
            assert made == expected, name


def test_packages_are_held_against_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {row.verdict for row in machine.packages() if row.what in ("Python", "packages")} == {"ok"}
    real = machine.version
    monkeypatch.setattr(machine, "version", lambda name: "0.1" if name == "torch" else real(name))
    (row,) = [row for row in machine.packages() if row.what == "packages"]
    assert row.verdict == "fails" and "torch is 0.1, needed <3,>=2.9" in row.found

    def absent(name: str) -> str:
        raise machine.PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", absent)
    rows = {row.what: row for row in machine.packages(frozenset({"remote"}))}
    assert rows["packages"].verdict == rows["extra remote"].verdict == "fails"
    assert rows["extra wandb"].verdict == "note" and "pip install -e '.[wandb]'" in rows["extra wandb"].found
    assert set(machine.declared()[1]) - {"all"} == set(machine.EXTRAS), "every extra says what it is for"


def test_needed_extras_follow_the_config() -> None:
    assert doctor.needed(settings()) == frozenset()
    assert doctor.needed(settings("reward=motion+remote")) == {"remote"}


def test_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=10e9))
    folder = tmp_path / "not" / "yet"
    assert machine.run_folder(folder, 1e9, 3).verdict == "ok"
    assert machine.run_folder(folder, 2e9, 3).verdict == "note"
    full = machine.run_folder(folder, 4e9, 3)
    assert full.verdict == "fails" and "do not fit" in full.found and not folder.exists()
    (tmp_path / "file").write_text("")
    assert machine.run_folder(tmp_path / "file" / "run", 1.0, 3).verdict == "fails"


def test_memory_that_is_not_there() -> None:
    peak = estimate.peak_bytes(FULL)
    assert [doctor.fits(FULL, 0.0, room * peak).verdict for room in (0.9, 1.1, 2.0)] == ["fails", "note", "ok"]


def doctored(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = doctor.main(list(arguments))
    return code, re.sub(r"\s+", " ", re.sub(r"[│┃]", " ", capsys.readouterr().out))


def test_it_reports_and_its_exit_code_says_whether_it_will_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.machine, "packages", lambda needed: iter([Check("packages", "fine")]))
    code, out = doctored(capsys, "ppo", "algorithm.critic=net")
    assert code == 0 and "conf/ppo.yaml algorithm.critic=net composes and is valid" in out and "this will run" in out
    for words in ("initial policy", "cache of finished frames", "helps most", "activations", "3 checkpoints of"):
        assert words in out
    code, out = doctored(capsys, "--memory", "0.5", "--tflops", "10")
    assert code == 1 and "will not fit" in out and "1 of these will not work" in out
    for arguments, words in (
        (["rewrd=motion"], "did you mean 'reward'?"),
        (["rollout.group_size=1"], "rollout.group_size=1"),
        (["device=cuda:7"], "this machine has"),
    ):
        code, out = doctored(capsys, *arguments)
        assert code == 1 and words in out
    assert doctored(capsys, "model.path=/does/not/exist")[0] == 1


def test_a_model_without_its_files_is_still_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full-size model on a laptop: shapes from its config, released sizes for the parts that are not here."""
    made = settings("adaptation=lora", "world.sizes=[480x832]")
    wan = SimpleNamespace(
        config=lambda: WAN,
        source=lambda: (_ for _ in ()).throw(FileNotFoundError("no folder")),
        precision="bfloat16",
        vae_precision="float32",
        encoder_device="cpu",
        text_length=512,
    )
    work = workload.workload(replace(made, model=wan), processes=8, kind="cuda")
    assert (work.tokens, work.weight_bytes, work.compute_bytes, work.encoder) == (1560, 2, 2, 0)
    assert work.decoder == Decoder() and work.samples == 8
    assert workload.workload(replace(made, model=wan), kind="cpu").encoder == 2 * workload.UMT5_XXL


PROGRAM = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
from experiments.doctor import EFFICIENCY
from hydra import compose, initialize_config_dir
from runtime import estimate, workload
from runtime.config import CONF, validate
from runtime.session import Session
with initialize_config_dir(str(CONF), version_base="1.3"):
    made = validate(compose("grpo", ["logger=local", "evaluation.clips=2", f"run_dir={sys.argv[1]}", *sys.argv[2:]]))
session = Session(made.settings, made.config)
taken = {}
for _ in range(2):
    for name, act in (
        ("rollout", lambda: globals().update(rollout=session.rollout())),
        ("decode", lambda: globals().update(video=session.decode(rollout))),
        ("score", lambda: session.score(rollout, video)),
        ("update", lambda: session.update(rollout)),
    ):
        began = time.process_time()
        act()
        taken[name] = time.process_time() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
work = workload.workload(made.settings)
rate = EFFICIENCY * workload.measured_rate(work, "cpu")
print(json.dumps({"peak": peak, "taken": taken, "seconds": estimate.seconds(work, rate),
                  "estimated": estimate.peak_bytes(work, estimate.LIBRARIES["cpu"])}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["rollout.prompts=4", "schedule=all"], ["adaptation=full", "algorithm.minibatches=4"]]
)
def test_the_embedded_default_takes_what_is_estimated(tmp_path: Path, options: list[str]) -> None:
    """Peak within a factor of 1.5, seconds of an iteration within a factor of 3."""
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), *options],
        capture_output=True,
        text=True,
        cwd=CONF.parent,
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout.splitlines()[-1])
    assert 1 / 1.5 < found["peak"] / found["estimated"] < 1.5, found
    total = sum(value for name, value in found["taken"].items() if name != "score")
    assert 1 / 3 < total / sum(found["seconds"].values()) < 3, found


def test_estimates_import_nothing_heavy() -> None:
    program = "import runtime.estimate, runtime.machine, sys; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=CONF.parent)


def test_zero_keeps_a_copy_and_offloads_it() -> None:
    zero = replace(FULL, processes=8, zero=2, switches=frozenset({"engine.offload"}))
    assert estimate.standing(zero)["ZeRO's own copy"] == 4 * FULL.trainable // 8
    away = replace(zero, offload="optimizer")
    assert not {"gradients", "ZeRO's own copy", "optimizer"} & estimate.standing(away).keys()
    assert estimate.peak_bytes(away) < estimate.peak_bytes(zero)
    assert "engine.offload=optimizer (in the CPU's memory)" in estimate.changes(zero)
    assert "engine.offload=optimizer (in the CPU's memory)" not in estimate.changes(away)


def test_nothing_is_advised_that_does_nothing() -> None:
    for name in ("grpo", "dpo"):
        kinds = workload.switches(settings(f"algorithm={name}"), "cuda")
        assert ("algorithm.kl_weight" in kinds) == (name == "grpo")
    assert "engine.offload" in workload.switches(settings("engine=deepspeed_z2"), "cuda")
    assert "engine.offload" not in workload.switches(settings("engine=deepspeed_z2"), "cpu")


def test_processes_are_part_of_the_check() -> None:
    assert doctor.configured("grpo", ["rollout.prompts=4"], None, 4)[1].verdict == "ok"
    refused = doctor.configured("grpo", ["rollout.prompts=4"], None, 8)[1]
    assert refused.verdict == "fails" and "cannot be split over 8 processes" in refused.found
