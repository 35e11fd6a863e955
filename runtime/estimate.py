"""Memory and time of an iteration, estimated before anything loads: pure functions of numbers, no torch.

They are for planning: weights, gradients, optimizer, cache and rollout are counted; activations, the video decoder and
seconds are models whose constants were fitted on the embedded default (docs/doctor.md).
Bytes everywhere; GB is 1e9.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MOMENTS = 2  # of AdamW, float32 like the gradients
FLOAT = 4
# Saved for the backward pass of a block, per token: about 20 tensors of its width by count (inputs and outputs of
# norms, projections and gates of diffusers' WanTransformerBlock), half as much again by measurement (copies that
# attention makes, what the allocator keeps), and twice the feed-forward layer, before and after its activation.
SAVED_WIDTHS, SAVED_FFN = 30, 2
# The decoder's widest layer: activations alive at once (input, norm, output, residual), of four pixel frames.
DECODER_ALIVE = 4
# Copies that trackers and towers make of the videos while they score them, measured.
SCORING_COPIES = 3
# Python, torch, TorchRL, diffusers and transformers imported and warm (CPU, measured), or the context of a GPU (about).
LIBRARIES = {"cpu": 0.55e9, "cuda": 0.6e9}


@dataclass(frozen=True)
class Decoder:
    """A Wan VAE: the width of its first level, the multiples of its levels (full size first), residual blocks per
    level, and all its parameters.
    """

    width: int = 96
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    parameters: int = 126_892_531
    weight_bytes: int = 4


@dataclass(frozen=True)
class Workload:
    """One iteration of reinforcement learning, in numbers.

    Attributes:
        prompts, group, frames, steps: B = prompts x group samples of `frames` latent frames in `steps` steps.
        stochastic: steps of a frame that are re-scored, each in a parallel pass.
        tokens: of a latent frame, width x height / patch.
        latent, condition: values of a latent frame, and of what it is conditioned on.
        pixels: of a frame, height x width.
        text: tokens x width of a prompt's features.
        held: latent frames in the cache (window and sink).
        parameters, trainable: of the transformer (adapters included).
        layers, width, ffn: its shape.
        weight_bytes, compute_bytes: of a weight, and of an activation.
        checkpointing: blocks are computed again in the backward pass.
        reference: 0 none, 1 a copy of the transformer, 2 the transformer itself without its adapters.
        averaged: averaged weights are kept.
        epochs, minibatches, accumulation: passes over a rollout, optimizer steps of a pass, parts of a step.
        whole_groups: the samples of a group stay together in a mini-batch.
        history_gradient: gradient flows through finished frames.
        processes, zero: ranks that share the work, and ZeRO stage.
        offload: what of it ZeRO keeps in the CPU's memory: `none`, `optimizer` or `parameters` (the weights as well).
        decoder: video decoder.
        encoder: bytes of the text encoder that lie on the device.
        switches: settings that could lower memory here, such as `engine.accumulation`.
    """

    prompts: int
    group: int
    frames: int
    steps: int
    stochastic: int
    tokens: int
    latent: int
    condition: int
    pixels: int
    text: int
    held: int
    parameters: int
    trainable: int
    layers: int
    width: int
    ffn: int
    weight_bytes: int = 4
    compute_bytes: int = 4
    checkpointing: bool = False
    reference: int = 0
    averaged: bool = False
    epochs: int = 1
    minibatches: int = 1
    accumulation: int = 1
    whole_groups: bool = False
    history_gradient: bool = False
    processes: int = 1
    zero: int = 0
    offload: str = "none"
    decoder: Decoder = Decoder()
    encoder: int = 0
    switches: frozenset[str] = frozenset()

    @property
    def samples(self) -> int:
        """Samples of a process."""
        return -(-self.prompts // self.processes) * self.group

    @property
    def block(self) -> int:
        """Samples that stay together in a mini-batch."""
        return self.group if self.whole_groups else 1


def cache_bytes(layers: int, width: int, tokens: int, frames: int, samples: int, element: int) -> int:
    """Keys and values of `frames` latent frames: one frame of 480x832 in Wan 1.3B (1560 tokens, bf16) is 287 MB."""
    return 2 * layers * width * tokens * frames * samples * element


def optimizer_bytes(trainable: int, processes: int = 1, zero: int = 0) -> int:
    """AdamW's two moments in float32; from ZeRO-1 on each process keeps its share."""
    return MOMENTS * FLOAT * _share(trainable, processes, zero >= 1)


def activation_bytes(work: Workload) -> int:
    """What one mini-batch saves for its backward pass."""
    samples = work.block * -(-work.samples // (work.block * work.minibatches * work.accumulation))
    tokens = samples * work.frames * work.tokens * work.stochastic * (2 if work.history_gradient else 1)
    block = SAVED_WIDTHS * work.width + SAVED_FFN * work.ffn
    per_token = work.layers * work.width + block if work.checkpointing else work.layers * block
    return tokens * per_token * work.compute_bytes


def rollout_bytes(work: Workload) -> int:
    """A finished rollout: every step's latent, what it was conditioned on, prompts; and re-scored means."""
    steps = (work.steps + 1) * work.latent + work.condition
    scores = 2 * work.steps * work.latent  # means under the policy that acted or the initial one, and the present one
    return FLOAT * work.samples * (work.frames * (steps + scores) + work.text)


def video_bytes(work: Workload) -> int:
    """Decoded videos, float32 in three channels, once as they come and once laid out."""
    return 2 * FLOAT * 3 * work.samples * (4 * work.frames - 3) * work.pixels


def decoder_bytes(work: Workload) -> int:
    """The widest activations of the decoder, all samples at once, and what it remembers of the frames before."""
    full = work.decoder.width * work.pixels * work.samples * FLOAT
    memory = 2 * 2 * (work.decoder.blocks + 1)  # two frames for each convolution of the last level
    return full * (4 * DECODER_ALIVE + memory)


def standing(work: Workload) -> dict[str, int]:
    """Bytes that are there all the time, by name."""
    split = work.zero >= 3
    # Gathered from the CPU layer by layer: two of them, the one at work and the next.
    layers = 2 * work.weight_bytes * work.parameters // max(2, work.layers)
    weights = work.weight_bytes * _share(work.parameters, work.processes, split)
    offloaded = work.offload != "none"
    rows = {
        "weights": layers if work.offload == "parameters" else weights,
        "initial policy": work.weight_bytes * work.parameters if work.reference == 1 else 0,
        "gradients": 0 if offloaded else FLOAT * _share(work.trainable, work.processes, work.zero >= 2),
        "ZeRO's own copy": 0 if offloaded or not work.zero else FLOAT * _share(work.trainable, work.processes, True),
        "optimizer": 0 if offloaded else optimizer_bytes(work.trainable, work.processes, work.zero),
        "averaged weights": FLOAT * work.trainable if work.averaged else 0,
        "video codec": work.decoder.parameters * work.decoder.weight_bytes,
        "text encoder": work.encoder,
    }
    return {name: value for name, value in rows.items() if value}


def phases(work: Workload) -> dict[str, dict[str, int]]:
    """Bytes that come and go, by phase and name."""
    kept = rollout_bytes(work)
    cache = cache_bytes(work.layers, work.width, work.tokens, work.held, work.samples, work.compute_bytes)
    return {
        "rollout": {"rollout": kept, "cache of finished frames": cache},
        "decode": {"rollout": kept, "videos": video_bytes(work), "decoder": decoder_bytes(work)},
        "reward": {"rollout": kept, "videos": video_bytes(work), "copies": SCORING_COPIES * video_bytes(work)},
        "update": {"rollout": kept, "videos": video_bytes(work), "activations": activation_bytes(work)},
    }


def peak_bytes(work: Workload, libraries: float = 0.0) -> float:
    """Largest sum over the phases of an iteration."""
    return libraries + sum(standing(work).values()) + max(sum(rows.values()) for rows in phases(work).values())


def linear_flops(width: int, ffn: int, layers: int) -> int:
    """Forward pass of the blocks' linear layers, per token: 2.5 GFLOP in Wan 1.3B. Keys and values of the prompt, made
    once per episode, are left out.
    """
    return 2 * layers * (6 * width * width + 2 * width * ffn)


def pass_flops(work: Workload, keys: float) -> float:
    """Forward pass of one latent frame of one sample that attends to `keys` tokens of its history."""
    attention = 4 * (keys + work.tokens + work.text / max(1, work.width)) * work.width * work.layers
    return work.tokens * (linear_flops(work.width, work.ffn, work.layers) + attention)


def seconds(work: Workload, rate: float, decode_rate: float | None = None) -> dict[str, float]:
    """Seconds of each phase of an iteration.

    Args:
        work: see `Workload`.
        rate: floating-point operations a second that the transformer reaches.
        decode_rate: the same of the decoder's convolutions; None: `rate`.
    """
    seen = work.tokens * sum(min(m, work.held) for m in range(work.frames)) / work.frames
    frame = pass_flops(work, seen) * work.samples
    rollout = frame * (work.frames * (work.steps + 1) - 1)
    forward = frame * work.frames * work.stochastic
    history = frame * work.frames * work.stochastic
    again = forward if work.checkpointing else 0
    backward = forward * (1 + work.trainable / work.parameters)
    learn = work.epochs * (history + forward + again + backward + (forward + history) * (work.reference > 0))
    return {
        "rollout": rollout / rate,
        "decode": decoder_flops(work) / (decode_rate or rate),
        "update": learn / rate,
    }


def decoder_flops(work: Workload) -> float:
    """The decoder's 3x3x3 convolutions: every level has blocks + 1 residual blocks of two; the two coarsest levels of
    time have a half and a quarter of the frames.
    """
    shape, total = work.decoder, 0.0
    for level, multiple in enumerate(shape.multiples):
        width, pixels = shape.width * multiple, work.pixels / 4**level
        frames = (4 * work.frames - 3) / (1, 2, 4, 4)[min(level, 3)]
        total += 2 * 2 * (shape.blocks + 1) * 27 * width * width * pixels * frames
    return total * work.samples


@dataclass(frozen=True)
class Advice:
    """A setting, and the peak after it."""

    setting: str
    peak: float


def advice(work: Workload, libraries: float = 0.0, count: int = 2) -> list[Advice]:
    """The settings that lower the peak most, best first; those that change nothing are left out."""
    before = peak_bytes(work, libraries)
    found = [Advice(name, peak_bytes(other, libraries)) for name, other in changes(work).items()]
    return sorted((a for a in found if a.peak < before), key=lambda a: a.peak)[:count]


def changes(work: Workload) -> dict[str, Workload]:
    """Settings that could lower memory, and the workload under each."""
    prompts, group = max(1, work.prompts // 2), min(work.group, max(2, work.group // 2))
    window, frames = max(1, work.held // 2), max(2, work.frames // 2)
    found = {
        f"rollout.prompts={prompts}": replace(work, prompts=prompts),
        f"rollout.group_size={group}": replace(work, group=group),
        f"rollout.window={window}": replace(work, held=window),
        f"rollout.frames={frames}": replace(work, frames=frames),
    }
    if "algorithm.kl_weight" in work.switches:
        others = work.switches - {"algorithm.kl_weight"}
        found["algorithm.kl_weight=0 (no copy of the initial policy)"] = replace(work, reference=0, switches=others)
    if "engine.offload" in work.switches and work.offload == "none":
        found["engine.offload=optimizer (in the CPU's memory)"] = replace(work, offload="optimizer")
    if work.trainable == work.parameters:
        few = replace(work, trainable=work.trainable // 50, reference=2 if work.reference else 0)
        found["adaptation=lora (adapters of about 2 % of the weights)"] = few
    if "engine.accumulation" in work.switches:
        parts = 2 * work.accumulation
        found[f"engine.accumulation={parts}"] = replace(work, accumulation=parts)
    elif work.samples // work.block % (2 * work.minibatches) == 0:
        parts = 2 * work.minibatches
        found[f"algorithm.minibatches={parts}"] = replace(work, minibatches=parts)
    if "engine.activation_checkpointing" in work.switches and not work.checkpointing:
        found["engine.activation_checkpointing=true"] = replace(work, checkpointing=True)
    if "engine.accumulation" in work.switches and work.processes > 1 and work.zero < 3:
        found["engine=deepspeed_z3 (weights split over the processes)"] = replace(work, zero=3)
    return found


def _share(values: int, processes: int, split: bool) -> int:
    return -(-values // processes) if split else values
