"""The numbers of `runtime.estimate.Workload`, read from a config.

Shapes come from the model's files, counts from networks on torch's meta device, which have no weights.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from data.draws import Stream, generator
from runtime.estimate import Decoder, Workload
from runtime.settings import Settings

BYTES = {"float32": 4, "bfloat16": 2}
# Encoder of UMT5-XXL, which the released Wan models read prompts with; its folder may not be here.
UMT5_XXL = 5_680_910_336


def workload(settings: Settings, processes: int | None = None, kind: str | None = None) -> Workload:
    """One iteration of `settings`, of its largest frame size.

    Args:
        settings: of any experiment.
        processes: ranks that share the work; None: those of the launcher.
        kind: of device that the transformer stands on; None: the config's.

    Raises:
        FileNotFoundError, ValueError: the model does not say what shape it has.
    """
    model, r, engine = settings.model, settings.rollout, settings.engine
    shape = transformer_config(model)
    decoder = decoder_of(model)
    height, width = max(settings.world.buckets, key=lambda bucket: bucket[0] * bucket[1])
    stride = 2 ** (len(decoder.multiples) - 1)
    cells, patch = (height // stride) * (width // stride), math.prod(shape["patch_size"][1:])
    parameters, trainable = counts(shape, settings.adaptation)
    compares = settings.algorithm.kl_weight > 0 or settings.algorithm.needs_reference
    on = kind or device_kind(settings.device)
    lora = getattr(settings.adaptation, "kind", "full") == "lora"
    precision = getattr(model, "precision", "float32")
    stochastic = int(drawn(settings).sum(1).max())
    return Workload(
        prompts=r.prompts,
        group=r.group_size,
        frames=r.frames,
        steps=len(r.sigmas) - 1,
        stochastic=stochastic if settings.algorithm.needs_log_prob else getattr(settings.algorithm, "draws", 1),
        tokens=cells // patch,
        latent=shape["out_channels"] * cells,
        condition=(shape["in_channels"] - shape["out_channels"]) * cells,
        pixels=height * width,
        text=model.text_length * shape["text_dim"],
        held=r.window + r.sink,
        parameters=parameters,
        trainable=trainable,
        layers=shape["num_layers"],
        width=shape["num_attention_heads"] * shape["attention_head_dim"],
        ffn=shape["ffn_dim"],
        weight_bytes=BYTES[precision],
        compute_bytes=2 if engine.precision == "bf16" else BYTES[precision],
        checkpointing=engine.activation_checkpointing,
        reference=(2 if lora else 1) if compares else 0,
        averaged=settings.optimizer.ema > 0,
        epochs=settings.algorithm.epochs,
        minibatches=settings.algorithm.minibatches,
        accumulation=getattr(engine, "accumulation", 1),
        whole_groups=settings.algorithm.whole_groups,
        history_gradient=r.history_gradient,
        processes=processes or int(os.environ.get("WORLD_SIZE", "1")),
        zero=getattr(engine, "stage", 0),
        offload="none" if on == "cpu" else getattr(engine, "offload", "none"),
        decoder=decoder,
        encoder=0 if encoder_elsewhere(settings, on) else encoder_bytes(model),
        switches=switches(settings, on),
    )


def switches(settings: Settings, kind: str) -> frozenset[str]:
    """Which of the settings that save memory on a kind of device do something here."""
    names = ("accumulation", "activation_checkpointing", *(("offload",) if kind != "cpu" else ()))
    found = {f"engine.{name}" for name in names if hasattr(settings.engine, name)}
    drops = settings.algorithm.kl_weight > 0 and not settings.algorithm.needs_reference
    return frozenset(found | ({"algorithm.kl_weight"} if drops else set()))


def drawn(settings: Settings) -> Any:
    """The stochastic steps of the first update, `[M, N]` bool."""
    import numpy as np

    sigmas = settings.rollout.sigmas
    available = np.array([[sigma > 0 for sigma in sigmas[1:]]] * settings.rollout.frames)
    return settings.schedule.choose(available, generator(Stream.SCHEDULE, settings.seed), 0)


def transformer_config(model: Any) -> dict[str, Any]:
    """Arguments of the transformer's class: what the model says, or its `config.json`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if hasattr(model, "config"):
        return dict(model.config())
    return dict(json.loads((model.network / "config.json").read_text()))


def counts(shape: dict[str, Any], adaptation: Any) -> tuple[int, int]:
    """Parameters of a transformer of this shape, and those that train.

    Raises:
        ValueError: the adaptation names no layer of it.
    """
    import torch

    from policies.causal_dit import CausalWanTransformer3DModel

    with torch.device("meta"):
        network = CausalWanTransformer3DModel(**{k: v for k, v in shape.items() if not k.startswith("_")})
        adaptation.apply(network)
    every = list(network.parameters())
    return sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad)


def decoder_of(model: Any) -> Decoder:
    """The video codec of a model: from its folder, or the released Wan VAE where there is none here."""
    import torch
    from diffusers import AutoencoderKLWan

    width = getattr(model, "vae_precision", "float32")
    folder = part(model, "vae")
    if folder is None:
        return Decoder(weight_bytes=BYTES[width])
    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
    parameters = sum(p.numel() for p in vae.parameters())
    return Decoder(config["base_dim"], tuple(config["dim_mult"]), config["num_res_blocks"], parameters, BYTES[width])


def encoder_elsewhere(settings: Settings, kind: str) -> bool:
    """Whether the text encoder stands on another kind of device than the transformer."""
    own = getattr(settings.model, "encoder_device", None)
    return own is not None and device_kind(own) != kind


def encoder_bytes(model: Any) -> int:
    """Bytes of the text encoder."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    folder = part(model, "text_encoder")
    if folder is None:
        return UMT5_XXL * (2 if getattr(model, "precision", "float32") == "bfloat16" else 4)
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config.from_pretrained(folder))
    return 4 * sum(p.numel() for p in encoder.parameters())


def part(model: Any, name: str) -> Path | None:
    """The folder of a part of a model, where it is here."""
    try:
        folder = model.source() if hasattr(model, "source") else model.folder
    except OSError:
        return None
    return folder / name if (folder / name / "config.json").is_file() else None


def device_kind(device: str) -> str:
    """`cpu`, `cuda` or `mps`, `auto` resolved."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device.partition(":")[0]


def measured_rate(work: Workload, device: str, repeats: int = 5) -> float:
    """Floating-point operations a second of a product of this workload's shape, tokens of a frame by block width.

    On a CPU seconds are those of its threads: what else the machine does has no part in it.
    """
    import time

    import torch

    rows = max(1, min(work.samples * work.tokens, 8192))
    dtype = torch.bfloat16 if work.compute_bytes == 2 and device != "cpu" else torch.float32
    a = torch.randn(rows, work.width, device=device, dtype=dtype)
    b = torch.randn(work.width, work.ffn, device=device, dtype=dtype)
    clock, share = (time.process_time, torch.get_num_threads()) if device == "cpu" else (time.perf_counter, 1)
    best = math.inf
    for _ in range(repeats + 1):
        began = clock()
        for _ in range(4):
            (a @ b).sum().item()
        best = min(best, (clock() - began) / 4 / share)
    return 2.0 * rows * work.width * work.ffn / best
