"""The networks of full-size Wan, loaded or with random weights; the large encoders only when they are needed."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel

from data.draws import Stream, seed_of
from metrics.clip_vision import MEAN, STD, settings_of
from policies.causal_dit import CausalWanTransformer3DModel
from policies.codecs import ImageCodec, TextCodec, VideoCodec
from policies.features import FeatureStore, ImageEncoder, RandomText, StoredImages, StoredText, TextEncoder, identity_of
from policies.first_frame import FirstFrameWanTransformer3DModel
from policies.tiny_vae import TinyDecoder
from policies.wan_weights import fill, randomise, read, skeleton
from runtime.networks import Networks, quiet
from runtime.wan import LATENT, Wan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLASSES = {"i2v": CausalWanTransformer3DModel, "t2v": FirstFrameWanTransformer3DModel}


def load_networks(model: Wan, device: str) -> Networks:
    """See `Wan.load`."""
    model.check()
    quiet()
    video, text, image = _video(model, device), _text(model, device), _image(model, device)
    return Networks(load_transformer(model, device), video, text, model.control, image, _tiny(model, device))


def load_transformer(model: Wan, device: str) -> CausalWanTransformer3DModel:
    """The transformer with its control channels, in evaluation mode; see `Wan.load_transformer`."""
    network, dtype = skeleton(CLASSES[model.kind], model.config()), DTYPES[model.precision]
    if model.random:
        randomise(network, device, dtype)
    else:
        fill(network, read(model.network), LATENT, dtype, f"model.transformer={model.network}")
    network.image_frames = model.image_frames
    return network.to(device).eval()


def _video(model: Wan, device: str) -> VideoCodec:
    if model.random:
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(Stream.TRAINING, 1))
            vae = AutoencoderKLWan(base_dim=model.architecture.vae_dim)
    else:
        vae = AutoencoderKLWan.from_pretrained(model.source() / "vae", local_files_only=True, use_safetensors=True)
    codec = VideoCodec(vae.bfloat16() if model.vae_precision == "bfloat16" else vae)
    if codec.channels != LATENT:
        raise ValueError(f"model.path={model.path}: the VAE has {codec.channels} latent channels, Wan's has {LATENT}")
    return codec.to(device)


def _tiny(model: Wan, device: str) -> TinyDecoder | None:
    if model.tiny_vae is None:
        return None
    file, dtype = model.tiny_file(), DTYPES[model.vae_precision]
    return (TinyDecoder.random(dtype) if file is None else TinyDecoder.load(file, dtype)).to(device)


def _text(model: Wan, device: str) -> TextEncoder:
    width, length = model.architecture.text_dim, model.text_length
    if model.random:
        return RandomText(length, width, device)
    folder = model.source()
    encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"

    def load() -> TextCodec:
        network = UMT5EncoderModel.from_pretrained(
            encoder, dtype=_encoder_type(model), local_files_only=True, use_safetensors=True
        )
        if network.config.d_model != width:
            raise ValueError(f"{encoder} gives {network.config.d_model} dimensions, the transformer takes {width}")
        codec = TextCodec(AutoTokenizer.from_pretrained(tokenizer, local_files_only=True), network, length)
        return codec.to(model.encoder_device or device)

    identity = f"{identity_of(encoder, tokenizer)} {_encoder_type(model)}"
    return StoredText(_store(model), identity, load, length, device)


def _image(model: Wan, device: str) -> ImageEncoder | None:
    if model.image_frames == "none":
        return None
    place = model.encoder_device or device
    if model.random:
        tower = _random_tower(model.architecture.image_dim, model.architecture.image_layers)
        return ImageCodec(tower.to(_encoder_type(model))).to(place)
    folder = model.source() / "image_encoder"
    extra = settings_of(folder) or settings_of(model.source() / "image_processor")

    def load() -> ImageCodec:
        tower = CLIPVisionModel.from_pretrained(
            folder, dtype=_encoder_type(model), local_files_only=True, use_safetensors=True
        )
        return ImageCodec(tower, extra.get("image_mean", MEAN), extra.get("image_std", STD)).to(place)

    return StoredImages(_store(model), f"{identity_of(folder)} {_encoder_type(model)}", load, device)


def _random_tower(width: int, layers: int) -> CLIPVisionModel:
    """CLIP ViT-H/14's shape at 1280 and 32."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 80,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(Stream.TRAINING, 2))
        return CLIPVisionModel(config)


def _store(model: Wan) -> FeatureStore:
    return FeatureStore(None if model.features is None else Path(model.features).expanduser())


def _encoder_type(model: Wan) -> torch.dtype:
    return torch.float32 if model.precision == "float32" else torch.bfloat16
