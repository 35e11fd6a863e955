"""Critics: the value of the state before each denoising decision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from algorithms.advantages import last_finished
from data.draws import Stream, seed_of

if TYPE_CHECKING:
    from policies.actor import Actor


class Critic(nn.Module):
    """A small network on observations `[B, M, N, F]`; its last layer starts at 0, and so do all values.

    Args:
        actor: the policy; it is not a part of this module.
        size: F.
        width: hidden width.
    """

    def __init__(self, actor: Actor, size: int, width: int) -> None:
        super().__init__()
        self._actor = [actor]
        # A position in the chain has a value of its own, whatever the observation.
        self.layers = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.value = nn.Linear(width + 2, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    @property
    def actor(self) -> Actor:
        """The policy."""
        return self._actor[0]

    def forward(self, observation: Tensor) -> Tensor:
        """Values `[B, M, N]` of observations whose last two numbers are the noise level and the share of the clip that
        is left.
        """
        place = observation[..., -2:]
        return self.value(torch.cat([self.layers(observation), place], -1))[..., 0]

    def observe(self, rollout: TensorDictBase) -> Tensor:
        """Observations `[B, M, N, F]` of the states before all decisions."""
        frames, steps = rollout["stochastic"].shape[1:]
        sigma = rollout["sigma"].float()[..., :-1]
        rule = self.actor.causality
        left = rule.spread(torch.linspace(1, 1 / frames, frames, device=sigma.device)[:: rule.chunk], frames)
        left = left[None, :, None].expand_as(sigma)
        seen = torch.stack([self.look(rollout, n) for n in range(steps)], 2)
        return torch.cat([seen, sigma[..., None], left[..., None]], -1)

    def look(self, rollout: TensorDictBase, n: int) -> Tensor:
        """What is seen before step n of every frame, `[B, M, F - 2]`."""
        raise NotImplementedError


class HeadCritic(Critic):
    """On the policy's own features: what enters its output layer, averaged over the tokens of a frame."""

    def __init__(self, actor: Actor, width: int) -> None:
        super().__init__(actor, _network(actor).proj_out.in_features + 2, width)

    def look(self, rollout: TensorDictBase, n: int) -> Tensor:
        """Features of all frames at step n, given the finished frames before each."""
        latents, condition = rollout["latents"], rollout["condition"]
        clean, noisy = (torch.cat([frames, condition], 2) for frames in (latents[:, :, -1], latents[:, :, n]))
        found: list[Tensor] = []
        hook = _network(self.actor).proj_out.register_forward_pre_hook(lambda layer, args: found.append(args[0]))
        try:
            self.actor.transformer(
                clean,
                noisy,
                rollout["sigma"][..., n].float(),
                rollout["text"],
                causality=self.actor.causality,
                image=rollout.get("image", None),
                mode="parallel",
            )
        finally:
            hook.remove()
        # The pass over the history comes first, that over the noisy frames last; frames are folded onto the batch.
        return found[-1].float().mean(1).unflatten(0, latents.shape[:2])


class NetCritic(Critic):
    """A network of its own: means over space and over quarters of the frame, of latents, history and condition."""

    def __init__(self, actor: Actor, width: int, channels: int) -> None:
        super().__init__(actor, 5 * channels + 2, width)

    def look(self, rollout: TensorDictBase, n: int) -> Tensor:
        """The frame at step n, the frame finished last before its chunk, and the condition."""
        latents, chunk = rollout["latents"].float(), self.actor.causality.chunk
        finished = latents[:, :, -1]
        past = last_finished(finished.shape[1], chunk).to(finished.device)
        before = torch.cat([torch.zeros_like(finished[:, :chunk]), finished[:, past]], 1)
        planes = torch.cat([latents[:, :, n], before, rollout["condition"].float()], 2)
        pooled = [nn.functional.adaptive_avg_pool2d(planes.flatten(0, 1), size).flatten(1) for size in (1, 2)]
        return torch.cat(pooled, 1).unflatten(0, planes.shape[:2])


def build_critic(kind: str, width: int, actor: Actor) -> Critic:
    """A critic by its name in `PPO.critic`, with weights that follow from nothing but its shape.

    Raises:
        ValueError: the policy has no output layer whose features a head could read.
    """
    network = _network(actor)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(Stream.TRAINING, 19))
        if kind == "net":
            critic: Critic = NetCritic(actor, width, _channels(network))
        elif hasattr(network, "proj_out"):
            critic = HeadCritic(actor, width)
        else:
            raise ValueError("algorithm.critic=head needs a transformer with `proj_out`; use algorithm.critic=net")
    return critic.to(next(network.parameters()).device)


def _network(actor: Actor) -> Any:
    """The network inside a wrapper, if it is wrapped."""
    return getattr(actor.transformer, "module", actor.transformer)


def _channels(network: Any) -> int:
    """Channels of latent, finished latent and condition."""
    return int(getattr(network, "frame_channels", network.config.in_channels) + network.config.out_channels)
