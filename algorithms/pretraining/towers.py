"""Train the tiny text and vision towers and the aesthetic head in one go.

A CLIP loss between prompts and frames gives the text encoder of the transformer and a vision tower; on the same image
embedding a linear head, the shape of LAION's, learns how damaged a frame is. Both tasks share the tower because a
purely contrastive embedding of this size forgets what does not name an object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from algorithms.pretraining.loop import Fit, optimise
from data.draws import Stream, generator, seed_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPVisionModelWithProjection, PreTrainedTokenizerFast, UMT5EncoderModel

    from data.clip import World
    from data.pool import ClipPool

DEGRADATIONS = ("blur", "noise", "colour", "blocking", "ghosting")
CLEAN_SCORE, WORST_SCORE = 7.0, 2.0
IMAGE_SIZE = 32


@dataclass(frozen=True)
class TowerStage:
    """Settings of the tower stage.

    Attributes:
        seed: seed of the weights and of the data order.
        width: hidden size of both towers.
        layers: transformer layers of each tower.
        projection: size of the shared embedding.
        steps: optimizer steps.
        batch: clips per step.
        lr: peak learning rate, cosine decay.
        pool: training clips per bucket.
        text_length: tokens a prompt is padded to.
    """

    seed: int = 0
    width: int = 64
    layers: int = 3
    projection: int = 64
    steps: int = 3000
    batch: int = 48
    lr: float = 1e-3
    pool: int = 1024
    text_length: int = 32


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; words it does not know become `<unk>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *sorted(set(words))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_text(stage: TowerStage, vocabulary: int) -> UMT5EncoderModel:
    """A tiny UMT5 encoder."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=stage.width,
        d_kv=stage.width // 4,
        d_ff=2 * stage.width,
        num_layers=stage.layers - 1,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_vision(stage: TowerStage) -> CLIPVisionModelWithProjection:
    """A tiny CLIP vision tower with projection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=stage.width,
        intermediate_size=2 * stage.width,
        projection_dim=stage.projection,
        num_hidden_layers=stage.layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=4,
    )
    return CLIPVisionModelWithProjection(config)


def degrade(images: Tensor, kinds: list[str], severity: Tensor, noise: Tensor) -> Tensor:
    """Damage images `[B, 3, H, W]` in [-1, 1]: one kind and one severity in [0, 1] for each.

    `noise [B, 3, H, W]` is standard normal; it also supplies the random numbers of colour and ghost.
    """
    import torch
    from torch.nn.functional import avg_pool2d, interpolate

    u = severity[:, None, None, None]
    draws = noise[:, :, 0, 0][..., None, None]
    blurred = avg_pool2d(avg_pool2d(images, 3, 1, 1, count_include_pad=False), 5, 1, 2, count_include_pad=False)
    blocks = interpolate(avg_pool2d(images, 4), scale_factor=4, mode="nearest")
    shift = (2 + (noise[0, 0, 1, 1].abs() * 2).int().clamp(max=3)).item()
    ghost = torch.roll(images, (int(shift), int(shift) // 2), dims=(-1, -2))
    variants = {
        "blur": images + u * (blurred - images),
        "noise": images + 0.45 * u * noise,
        "colour": images * (1 - 0.35 * u * draws.abs().clamp(max=1.5)) + 0.35 * u * draws.clamp(-2, 2).roll(1, 1),
        "blocking": images + u * (blocks - images),
        "ghosting": images + 0.5 * u * (ghost - images),
    }
    picked = torch.stack([variants[kind][i] for i, kind in enumerate(kinds)])
    return picked.clamp(-1, 1)


def clip_loss(text: Tensor, image: Tensor, temperature: Tensor) -> Tensor:
    """Symmetric InfoNCE between L2-normalised embeddings `[B, E]`."""
    import torch
    from torch.nn.functional import cross_entropy

    logits = text @ image.T * temperature.exp().clamp(max=100)
    target = torch.arange(len(logits))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def _sample(pools: list[ClipPool], stage: TowerStage, step: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Clean frames, damaged frames with their target scores, and prompts, keyed by the step."""
    import torch

    from metrics.clip_vision import square

    rng = generator(Stream.TRAINING, stage.seed, 1, step)
    pool = pools[int(rng.integers(len(pools)))]
    clips = pool.batch(rng.choice(len(pool), stage.batch, replace=False).tolist())
    later = torch.from_numpy(rng.integers(0, clips.video.shape[2], stage.batch))
    frames = clips.video[torch.arange(stage.batch), :, later]
    noise = torch.from_numpy(rng.standard_normal(frames.shape).astype("float32"))
    severity = torch.from_numpy(
        (rng.uniform(size=stage.batch) * (rng.uniform(size=stage.batch) > 0.15)).astype("float32")
    )
    kinds = [str(k) for k in rng.choice(DEGRADATIONS, stage.batch)]
    damaged = degrade(frames, kinds, severity, noise)
    return (
        square(clips.video[:, :, 0], IMAGE_SIZE),
        square(damaged, IMAGE_SIZE),
        CLEAN_SCORE + (WORST_SCORE - CLEAN_SCORE) * severity,
        clips.prompts,
    )


def train_towers(
    world: World,
    words: list[str],
    stage: TowerStage,
    out: Path,
    name: str,
    report: Callable[[str], None] = print,
    state: Path | None = None,
) -> None:
    """Train both towers; save `out/text_encoder`, `out/tokenizer` and `out/<name>`."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    from data.pool import ClipPool

    pools = [ClipPool(world, bucket, range(stage.pool)) for bucket in world.buckets]
    tokenizer = build_tokenizer(words)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(Stream.TRAINING, stage.seed))
        text, vision = build_text(stage, len(tokenizer)), build_vision(stage)
        text_head, head = nn.Linear(stage.width, stage.projection), nn.Linear(stage.projection, 1)
        # On a unit vector a head needs large weights (LAION's has |w| = 18); learning them from a small start is slow.
        nn.init.normal_(head.weight, std=18 / math.sqrt(stage.projection))
    nn.init.constant_(head.bias, (CLEAN_SCORE + WORST_SCORE) / 2)
    temperature = nn.Parameter(torch.tensor(math.log(10.0)))
    modules = nn.ModuleList([text, vision, text_head, head])

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        clean, damaged, target, prompts = _sample(pools, stage, step)
        tokens = tokenizer(prompts, padding="max_length", max_length=stage.text_length, return_tensors="pt")
        hidden = text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask[..., None]
        text_embed = nn.functional.normalize(text_head((hidden * mask).sum(1) / mask.sum(1)), dim=-1)
        embeds = nn.functional.normalize(vision(torch.cat([clean, damaged])).image_embeds, dim=-1)
        contrast = clip_loss(text_embed, embeds[: len(clean)], temperature)
        error = (head(embeds[len(clean) :])[:, 0] - target).square().mean()
        return contrast + error, {"clip": contrast.item(), "score_mse": error.item()}

    fit = Fit(stage.steps, stage.lr, weight_decay=1e-2)
    optimise([*modules.parameters(), temperature], fit, loss_of, name, report, state=state)
    vision.save_pretrained(out / name)
    # The towers see pixels in [-1, 1].
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (out / name / "preprocessor_config.json").write_text(json.dumps(pixels))
    save_file({"weight": head.weight.detach(), "bias": head.bias.detach()}, out / name / "head.safetensors")
    if name == "aesthetic":
        text.save_pretrained(out / "text_encoder")
        tokenizer.save_pretrained(out / "tokenizer")
