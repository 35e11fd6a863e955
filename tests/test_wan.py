"""Full-size Wan on a CPU: its size and names, checkpoints in every layout, a slice at true width."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from hydra import compose
from safetensors.torch import load_file, save_file
from torch import Tensor

from envs.transitions import CPS
from policies.actor import evaluate
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.first_frame import FirstFrameWanTransformer3DModel
from policies.sampler import sample_rollout
from policies.wan_weights import EMBEDDING, fill, randomise, skeleton, translated
from runtime import schema
from runtime.config import plain, validate
from runtime.settings import Settings
from runtime.wan import LATENT, Wan
from tests.wan_fixtures import OVERRIDES, hub, original_names, released, write

NAMES = {"i2v": "wan2.1_1.3b", "t2v": "wan2.1_1.3b_t2v"}
# Parameters of the released models, as diffusers builds them.
RELEASED = {"i2v": 1_564_428_608, "t2v": 1_418_996_800}
CHANNELS = {"i2v": 36, "t2v": 16}
KINDS = ("i2v", "t2v")
FINE = ("model.random=true", "adaptation=lora", "world.sizes=[32x32]")


pytestmark = pytest.mark.usefixtures("hydra_tree")


def model(kind: str, *overrides: str) -> Wan:
    config = plain(compose("train", [f"model={NAMES[kind]}", *overrides]))
    found: Wan = schema.build(Settings, config | {"adaptation": lora()}).model
    return found


def lora() -> Any:
    return plain(compose("train", ["adaptation=lora"]))["adaptation"]


def tiny(kind: str, folder: Path | str, *overrides: str) -> Wan:
    image = ["model.architecture.image_dim=80"] if kind == "i2v" else []
    return model(kind, *OVERRIDES, *image, f"model.path={folder}", "model.features=null", *overrides)


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_size_has_the_released_parameters_and_those_of_control(kind: str) -> None:
    config = model(kind, "model.random=true").config()
    ours = skeleton(CausalWanTransformer3DModel, config)
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**{**config, "in_channels": CHANNELS[kind]})
    count = [sum(p.numel() for p in network.parameters()) for network in (ours, theirs)]
    assert count[1] == RELEASED[kind]
    assert count[0] == count[1] + LATENT * 4 * 1536
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (ours, theirs)]
    embeddings = [shape.pop(EMBEDDING) for shape in shapes]
    assert shapes[0] == shapes[1]
    assert embeddings[0] == (1536, CHANNELS[kind] + LATENT, 1, 2, 2) and embeddings[1][1] == CHANNELS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_config_validates_within_a_second_and_loads_nothing(kind: str) -> None:
    began = time.perf_counter()
    plan = validate(compose("grpo", [f"model={NAMES[kind]}", *FINE]))
    assert time.perf_counter() - began < 3  # on a busy machine
    assert plan.settings.model.kind == kind


# checkpoints


@pytest.mark.parametrize("layout", ["diffusers", "sharded", "original", "prefixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_loads_and_computes_what_its_author_computed(kind: str, layout: str, tmp_path: Path) -> None:
    author = write(tmp_path, kind, layout).eval()
    single = [] if layout in ("diffusers", "sharded") else [f"model.transformer={tmp_path / 'wan.safetensors'}"]
    if layout == "sharded":
        assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    wan = tiny(kind, tmp_path, "model.image_frames=all" if kind == "i2v" else "model.image_frames=none", *single)
    wan.check(21)
    network = wan.load_transformer("cpu")
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    video, text = normal(1, 3, CHANNELS[kind], 4, 4), normal(1, 512, 16)
    image = normal(1, 5, 80) if kind == "i2v" else None
    sigma = torch.full((1, 3), 0.7)
    with torch.no_grad():
        expected = author(video.transpose(1, 2), 700 * torch.ones(1), text, image).sample.transpose(1, 2)
        # Mask 0: no frame is given. Control is anything: its weights are zero.
        given = torch.zeros(1, 3, 4 + LATENT, 4, 4) if kind == "t2v" else normal(1, 3, 0, 4, 4)
        frames = torch.cat([video, given, normal(1, 3, LATENT, 4, 4)], 2)
        v = network.parallel(frames, frames, sigma, text, causality=Causality(chunk=3), image=image)
    torch.testing.assert_close(v, expected, atol=1e-4, rtol=1e-4)
    assert not network.patch_embedding.weight[:, -LATENT:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_original_names_are_translated_as_diffusers_does(kind: str) -> None:
    state = original_names(released(kind).state_dict())
    theirs = convert_wan_transformer_to_diffusers(dict(state))
    ours = translated(state)
    assert ours.keys() == theirs.keys() == released(kind).state_dict().keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert translated(ours) == ours


def test_a_hub_id_is_taken_from_the_local_cache_and_fetched_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked: list[bool] = []
    real = huggingface_hub.snapshot_download

    def spy(name: str, local_files_only: bool) -> str:
        asked.append(local_files_only)
        return real(name, local_files_only=local_files_only, cache_dir=tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", spy)
    hub(tmp_path, "someone/wan-tiny", "t2v")
    wan = tiny("t2v", "someone/wan-tiny")
    wan.check()
    assert isinstance(wan.load_transformer("cpu"), FirstFrameWanTransformer3DModel)
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor in the local hub cache.*model.download=true"):
        tiny("t2v", "someone/else").check()
    assert asked and all(asked), "nothing was fetched"


def test_what_is_missing_and_unexpected_is_listed_to_the_last_name(tmp_path: Path) -> None:
    write(tmp_path, "i2v", "original")
    file = tmp_path / "wan.safetensors"
    state = load_file(file)
    del state["blocks.1.cross_attn.k_img.weight"], state["head.modulation"]
    state["blocks.2.self_attn.q.weight"] = torch.zeros(24, 24)
    state["img_emb.proj.4.bias"] = torch.zeros(3)
    save_file(state, file)
    with pytest.raises(ValueError) as error:
        tiny("i2v", tmp_path, f"model.transformer={file}").load_transformer("cpu")
    text = str(error.value)
    assert "missing (2): blocks.1.attn2.add_k_proj.weight, scale_shift_table;" in text
    assert "unexpected (1): blocks.2.attn1.to_q.weight;" in text
    assert "of another shape (1): condition_embedder.image_embedder.norm2.bias is (3,), not (24,)" in text
    assert "\n" not in text and str(file) in text


def test_a_checkpoint_of_the_other_kind_or_shape_is_refused_before_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, "t2v", "diffusers")
    with pytest.raises(FileNotFoundError, match=r"has no image_encoder/config.json"):
        tiny("i2v", tmp_path).check()
    with pytest.raises(ValueError, match=r"another model than kind=i2v: in_channels 16 \(not 36, or 52 with control\)"):
        tiny("i2v", tmp_path, "model.image_frames=none").check()
    with pytest.raises(ValueError, match=r"num_layers 2 \(not 3\)"):
        tiny("t2v", tmp_path, "model.architecture.layers=3").check()
    with pytest.raises(ValueError, match="rotary table has 1024 frames"):
        tiny("t2v", tmp_path).check(1025)
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vae/config.json"):
        tiny("t2v", tmp_path).check()


@pytest.mark.parametrize(
    ("kind", "override", "words"),
    [
        ("t2v", "model.image_frames=first", "no image tokens; use none"),
        ("t2v", "model.architecture.image_dim=1280", "no image embedder; use 0"),
        ("i2v", "model.architecture.image_dim=0", "use model.image_frames=none"),
        ("i2v", "model.precision=float16", "must be one of float32, bfloat16, got"),
        ("i2v", "model.path=somewhere", "model.random=true loads nothing from model.path=somewhere"),
    ],
)
def test_what_a_model_cannot_do_its_config_refuses(kind: str, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(kind, "model.random=true", override)


def test_bfloat16_weights_do_not_train() -> None:
    names = ["model=wan2.1_1.3b", "model.random=true", "world.sizes=[32x32]"]
    with pytest.raises(ValueError, match=r"model\.precision=bfloat16 rounds most of an update"):
        validate(compose("grpo", [*names, "adaptation=full"]))
    for fine in (["adaptation=lora"], ["adaptation=full", "model.precision=float32", "engine.precision=bf16"]):
        validate(compose("grpo", [*names, *fine]))


@pytest.mark.parametrize("primary", ["evaluate", "export"])
def test_but_they_are_measured_and_exported_as_they_are(primary: str) -> None:
    names = ["model=wan2.1_1.3b", "model.random=true", "world.sizes=[32x32]"]
    assert validate(compose(primary, names), primary).settings.adaptation.kind != "lora"
    with pytest.raises(ValueError, match=r"model\.precision=bfloat16 rounds most of an update"):
        validate(compose(primary, names))


STEP1 = ["model=wan2.1_1.3b", "model.image_frames=none", "world.sizes=[32x32]", "stage.pool=256"]


@pytest.mark.parametrize(
    ("primary", "own", "fine"),
    [
        ("finetune", ["stage.lr=1e-5"], True),
        ("distill", ["stage.teacher=transformer", "stage.from_teacher=false", "stage.dmd.layers=[0]"], False),
    ],
)
def test_nor_do_they_in_step_1(tmp_path: Path, primary: str, own: list[str], fine: bool) -> None:
    """Adapters take them, but the fake score of distribution matching trains as a whole whatever the student does."""
    write(tmp_path, "i2v", "diffusers")
    shape = [*(text for text in OVERRIDES if "precision" not in text), "model.architecture.image_dim=80"]
    names = [*STEP1, *shape, *own, f"model.path={tmp_path}", "model.transformer=transformer"]
    for refused in (["adaptation=full"], *([] if fine else [["adaptation=lora"]])):
        with pytest.raises(ValueError, match=r"model\.precision=bfloat16 rounds most of an update"):
            validate(compose(primary, [*names, *refused]))
    wide = ["adaptation=full", "model.precision=float32", "engine.precision=bf16"]
    for settings in (wide, *([["adaptation=lora"]] if fine else [])):
        validate(compose(primary, [*names, *settings]))


@pytest.mark.parametrize("size", ["480x368", "400x400", "368x480", "640x368", "368x640", "480x832"])
def test_every_bucket_is_accepted_and_a_size_between_is_refused(size: str) -> None:
    names = ["model=wan2.1_1.3b", "model.random=true", "adaptation=lora"]
    plan = validate(compose("grpo", [*names, f"world.sizes=[{size}]", "rollout.frames=21"]))
    assert plan.settings.world.buckets == [tuple(map(int, size.split("x")))]
    with pytest.raises(ValueError, match=r"world.sizes has 96x72; height and width must be multiples of 16"):
        validate(compose("grpo", [*names, f"world.sizes=[{size},96x72]"]))


def test_a_checkpoint_with_control_keeps_it(tmp_path: Path) -> None:
    """What finetune.py and distill.py write has all channels already."""
    write(tmp_path, "i2v", "diffusers")
    network = tiny("i2v", tmp_path).load_transformer("cpu")
    network.patch_embedding.weight.data[:, -LATENT:] = 0.5
    network.save_pretrained(tmp_path / "student")
    wan = tiny("i2v", tmp_path, f"model.transformer={tmp_path / 'student'}")
    wan.check()
    again = wan.load_transformer("cpu")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())


def test_bfloat16_keeps_in_float32_what_diffusers_keeps(tmp_path: Path) -> None:
    write(tmp_path, "i2v", "diffusers")
    ours = tiny("i2v", tmp_path, "model.precision=bfloat16").load_transformer("cpu")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    types = [{name: value.dtype for name, value in net.state_dict().items()} for net in (ours, theirs)]
    assert types[0] == types[1] and set(types[0].values()) == {torch.float32, torch.bfloat16}
    assert ours.dtype == torch.bfloat16 and ours.rope.freqs_cos.dtype == theirs.rope.freqs_cos.dtype


# a slice of two layers at true width


def slice_of(kind: str, dtype: torch.dtype) -> CausalWanTransformer3DModel:
    wan = model(kind, "model.random=true", "model.architecture.layers=2")
    cls = {"i2v": CausalWanTransformer3DModel, "t2v": FirstFrameWanTransformer3DModel}[kind]
    network = skeleton(cls, wan.config())
    randomise(network, "cpu", dtype)
    network.image_frames = wan.image_frames
    return network.eval()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("i2v", torch.float32), ("i2v", torch.bfloat16), ("t2v", torch.bfloat16)], ids=str
)
def test_a_slice_at_true_width_acts_rescores_and_learns(kind: str, dtype: torch.dtype) -> None:
    from envs.ar_video import start

    network, frames = slice_of(kind, dtype), 3
    draw = torch.Generator().manual_seed(0)
    condition = torch.randn(1, frames, 36, 4, 4, generator=draw)
    condition[:, 0, :4], condition[:, 1:, :4] = 1, 0
    state = start(
        condition=condition,
        text=torch.randn(1, 512, 4096, generator=draw),
        sigma_table=torch.tensor([1.0, 0.755, 0.522, 0.0]),
        stochastic=torch.tensor([True, False, False]),
        key=torch.tensor([[0, 0, 0, 0]]),
        latent_shape=(16, 4, 4),
        image=torch.randn(1, 257, 1280, generator=draw) if kind == "i2v" else None,
    )
    rollout = sample_rollout(network, CPS(), Causality(window=2), state)
    scores = evaluate(network, CPS(), Causality(window=2), rollout)
    gap = float((scores["log_prob"].detach() - rollout["log_prob"]).abs().max())
    assert scores["log_prob"].dtype == torch.float32
    assert gap <= (1e-5 if dtype == torch.float32 else 1e-2)
    scores["log_prob"].sum().backward()
    gradient = network.patch_embedding.weight.grad
    assert gradient is not None and gradient.isfinite().all() and gradient[:, -LATENT:].any()
    with torch.no_grad():  # and bidirectional, as a teacher
        frames_in = torch.cat([state["latents"], condition], 2)
        v = network.parallel(
            frames_in,
            frames_in,
            state["sigma"][..., 0],
            state["text"],
            causality=Causality(chunk=frames),
            image=state.get("image", None),
        )
    assert v.isfinite().all() and v.shape == (1, frames, 16, 4, 4)


def test_a_checkpoint_must_not_be_silently_filled_up() -> None:
    network = skeleton(CausalWanTransformer3DModel, model("t2v", *OVERRIDES, "model.random=true").config())
    with pytest.raises(ValueError, match=r"missing \(1\): proj_out.bias$"):
        state = released("t2v").state_dict()
        del state["proj_out.bias"]
        fill(network, state, LATENT, torch.float32, "x")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [(60, 46), (16, 32)], ids=["480x368", "128 tokens"])
def test_on_a_gpu_flex_attention_rescores_what_the_cache_acted(size: tuple[int, int]) -> None:
    from envs.ar_video import start

    network, frames = slice_of("t2v", torch.bfloat16).cuda(), 6
    draw = torch.Generator().manual_seed(0)
    condition = torch.randn(1, frames, 36, *size, generator=draw)
    condition[:, 0, :4], condition[:, 1:, :4] = 1, 0
    state = start(
        condition=condition.cuda(),
        text=torch.randn(1, 512, 4096, generator=draw),
        sigma_table=torch.tensor([1.0, 0.755, 0.522, 0.0]),
        stochastic=torch.tensor([True, False, False]),
        key=torch.tensor([[0, 0, 0, 0]]),
        latent_shape=(16, *size),
    )
    rollout = sample_rollout(network, CPS(), Causality(window=2), state)
    scores = evaluate(network, CPS(), Causality(window=2), rollout)
    assert float((scores["log_prob"].detach() - rollout["log_prob"]).abs().max()) <= 1e-3
    scores["log_prob"].sum().backward()
