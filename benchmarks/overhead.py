"""Our passes against diffusers' own forward: the same weights and tokens, in one process, in turns.

diffusers' forward sees all frames at once and both ways; a cached pass sees a window. `one block` computes exactly what
diffusers computes, so its ratio is overhead and nothing else; the others are seconds per token, clean passes and all,
on the attention that they need. Where frames are small, what counts is the number of calls: `each frame alone` is
diffusers' forward called for every frame, without any history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from benchmarks.flops import Context, of_parallel, of_pass
from benchmarks.measure import race
from benchmarks.policy import Rows, beginning
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.kv_cache import KVCache
from policies.ring_cache import RingCache
from runtime.session import Session

# One block of all frames is the same computation: more than rounding between the two is a defect.
AGREE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def twins(session: Session) -> tuple[CausalWanTransformer3DModel, WanTransformer3DModel]:
    """Our class and diffusers', on one set of weights, in evaluation mode."""
    source = session.settings.model.load_transformer(session.device)
    with torch.device("meta"):
        pair = CausalWanTransformer3DModel(**source.config), WanTransformer3DModel(**source.config)
    for model in pair:
        model.load_state_dict(source.state_dict(), assign=True)
        model.rope = source.rope
    pair[0].image_frames = "all"
    return pair[0].eval(), pair[1].eval()


@torch.no_grad()
def overhead(session: Session, repeats: int) -> Rows:
    """Seconds of each way through the first step of one clip's frames, and its ratio to diffusers per token."""
    ours, theirs = twins(session)
    state = beginning(session, 1)
    frames, rule = state["stochastic"].shape[1], session.actor.causality
    x = torch.cat([state["latents"], state["condition"]], 2)[:, :, : ours.config.in_channels].to(ours.dtype)
    text, image = state["text"].to(ours.dtype), state.get("image", None)
    image = None if image is None or not ours.config.image_dim else image.to(ours.dtype)
    # diffusers takes the last 512 tokens of the context for text where there is an image.
    text = text if image is None else torch.nn.functional.pad(text, (0, 0, 0, max(0, 512 - text.shape[1])))
    level = torch.full((1, frames), 0.755, device=x.device)
    tokens = int(x.shape[-2] * x.shape[-1] / ours.config.patch_size[1] / ours.config.patch_size[2])

    def reference() -> Tensor:
        out: Tensor = theirs(x.transpose(1, 2), 1000 * level[:, 0], text, image, return_dict=False)[0]
        return out.transpose(1, 2)

    def alone() -> Tensor:
        level0 = 1000 * level[:, 0]
        return torch.cat(
            [theirs(x[:, m, :, None], level0, text, image, return_dict=False)[0] for m in range(frames)], 2
        )

    def parallel(causality: Causality) -> Tensor:
        return ours.parallel(x, x, level, text, causality=causality, image=image)

    def cached(make: Callable[[], KVCache]) -> Tensor:
        cache, chunk, out = make(), rule.chunk, []
        for first in range(0, frames, chunk):
            part = x[:, first : first + chunk], level[:, first : first + chunk]
            out.append(ours.cached(*part, text, cache, first=first, image=image))
            ours.cached(part[0], 0 * part[1], text, cache, first=first, commit=chunk, image=image)
        return torch.cat(out, 1)

    block = Causality(chunk=frames)
    ways: dict[str, tuple[Callable[[], Tensor], int]] = {
        "diffusers' forward": (reference, frames),
        "one block": (lambda: parallel(block), frames),
        "diffusers', each frame alone": (alone, frames),
        "parallel": (lambda: parallel(rule), frames + (frames - 1) // rule.chunk * rule.chunk),
        "cached": (lambda: cached(lambda: KVCache(rule)), 2 * frames),
        "ring cache": (lambda: cached(lambda: RingCache(ours, rule, 1, tokens)), 2 * frames),
    }
    _check(ways, ours.dtype)
    work = _work(ours.config, rule, frames, tokens, text.shape[1], 0 if image is None else image.shape[1])
    seconds = race({name: way for name, (way, _) in ways.items()}, repeats, session.synchronize)
    each = {name: seconds[name] / (count * tokens) for name, (_, count) in ways.items()}
    base = "diffusers' forward"
    return [
        {
            "way": name,
            "frames through": ways[name][1],
            "seconds": seconds[name],
            "us per token": 1e6 * each[name],
            "per token, diffusers 1": each[name] / each[base],
            "per FLOP, diffusers 1": seconds[name] / work[name] / (seconds[base] / work[base]),
        }
        for name in ways
    ]


def _work(config: Any, rule: Causality, frames: int, tokens: int, text: int, image: int) -> dict[str, float]:
    context = Context(text, image, frames if image else 0)
    whole = of_pass(config, frames, tokens, frames**2, context).forward
    history, present = of_parallel(config, rule, frames, tokens, context)
    later = Context(text, image, 1 if image else 0, remembered=True)
    cached = 0.0
    for first in range(0, frames, rule.chunk):
        pairs = rule.chunk * (len(rule.held(first)) + rule.chunk)
        cached += 2 * of_pass(config, rule.chunk, tokens, pairs, later).forward
    past = (frames - 1) // rule.chunk * rule.chunk
    both = history.forward + present.forward if past else present.forward
    single = frames * of_pass(config, 1, tokens, 1, Context(text, image, 1 if image else 0)).forward
    return {
        "diffusers' forward": whole,
        "one block": whole,
        "diffusers', each frame alone": single,
        "parallel": both,
        "cached": cached,
        "ring cache": cached,
    }


def _check(ways: dict[str, tuple[Callable[[], Tensor], int]], dtype: torch.dtype) -> None:
    for one, other in (("diffusers' forward", "one block"), ("parallel", "cached"), ("cached", "ring cache")):
        gap = float((ways[one][0]().float() - ways[other][0]().float()).abs().max())
        if not gap <= AGREE[dtype]:
            raise RuntimeError(f"{one} and {other} differ by {gap:.1e}, so their speeds cannot be compared")
