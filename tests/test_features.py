"""Prompt and image features: computed once, found again by content, encoders loaded only where something is new."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from algorithms.pretraining.towers import TowerStage, build_text, build_tokenizer
from data.sprites import vocabulary
from policies.codecs import ImageCodec, TextCodec
from policies.features import FeatureStore, RandomText, StoredImages, StoredText, identity_of

PROMPTS = ["a red disc moves right", "a blue ring", "a red disc moves right"]


@pytest.fixture(scope="module")
def text() -> TextCodec:
    tokenizer = build_tokenizer(vocabulary())
    torch.manual_seed(0)
    return TextCodec(tokenizer, build_text(TowerStage(width=16, layers=1), len(tokenizer)), 8)


@pytest.fixture(scope="module")
def image() -> ImageCodec:
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    return ImageCodec(CLIPVisionModel(CLIPVisionConfig(**size, image_size=28, patch_size=14)))


def test_prompts_are_encoded_once_and_equal_the_encoder(text: TextCodec, tmp_path: Path) -> None:
    loads: list[int] = []

    def load() -> TextCodec:
        loads.append(1)
        return text

    def encoder(identity: str = "one") -> StoredText:
        return StoredText(FeatureStore(tmp_path), identity, load, 8, "cpu")

    first = encoder()
    assert not loads
    torch.testing.assert_close(first.encode(PROMPTS), text.encode(PROMPTS), atol=1e-6, rtol=0)
    assert loads == [1] and len(list(tmp_path.iterdir())) == 2  # two different prompts
    assert torch.equal(encoder().encode(PROMPTS), first.encode(PROMPTS)) and loads == [1]
    encoder("another encoder").encode(PROMPTS[:1])
    assert loads == [1, 1]
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".safetensors"]


def test_a_damaged_file_is_made_again(text: TextCodec, tmp_path: Path) -> None:
    encoder = StoredText(FeatureStore(tmp_path), "", lambda: text, 8, "cpu")
    whole = encoder.encode(PROMPTS[:1])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(encoder.encode(PROMPTS[:1]), whole) and len(file.read_bytes()) > 20


def test_images_are_found_by_their_pixels(image: ImageCodec, tmp_path: Path) -> None:
    def pictures(seed: int) -> Tensor:
        return torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    encoder = StoredImages(FeatureStore(tmp_path), "", lambda: image, "cpu")
    tokens = encoder.encode(pictures(0))
    assert tokens.shape == (2, 5, 32)
    torch.testing.assert_close(tokens, image.encode(pictures(0)), atol=1e-6, rtol=0)

    def fail() -> ImageCodec:
        raise AssertionError("loaded for nothing")

    again = StoredImages(FeatureStore(tmp_path), "", fail, "cpu")
    assert torch.equal(again.encode(pictures(0).flip(0)), tokens.flip(0))
    with pytest.raises(AssertionError, match="for nothing"):
        again.encode(pictures(1))


def test_image_tokens_are_the_last_hidden_states_but_one(image: ImageCodec) -> None:
    """As diffusers' image-to-video pipeline takes them: the last layer does not count."""
    picture = torch.rand(1, 3, 28, 28) * 2 - 1
    before = image.encode(picture)
    for layer, matters in ((2, False), (1, True)):
        (weight,) = (p for name, p in image.tower.named_parameters() if name.endswith(f"layers.{layer}.mlp.fc1.weight"))
        weight.data += 1
        assert torch.equal(image.encode(picture), before) != matters
        weight.data -= 1


def test_without_a_folder_nothing_is_written_and_random_features_follow_from_the_prompt(text: TextCodec) -> None:
    store = FeatureStore(None)
    assert torch.equal(*(StoredText(store, "", lambda: text, 8, "cpu").encode(PROMPTS)[i] for i in (0, 2)))
    noise = RandomText(4, 6, "cpu")
    rows = noise.encode(PROMPTS)
    assert rows.shape == (3, 4, 6) and torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(noise.encode(PROMPTS[1:2])[0], rows[1])


def test_encoders_are_told_apart_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    one = identity_of(tmp_path)
    assert identity_of(tmp_path) == one
    (tmp_path / "config.json").write_text("[]")
    assert identity_of(tmp_path) != one
