"""The TorchRL face of DiffusionNFT."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from algorithms.losses import masked_mean, nft_loss
from algorithms.policy_loss import PolicyLoss
from data.draws import Stream, generator


class NFTLoss(PolicyLoss):
    """Noise the finished frames of a mini-batch and compare velocities, each frame given its clip's finished ones.

    Noise levels are the policy's own, those that a step begins at; a chunk shares its level.
    """

    @torch.no_grad()
    def observe(self, rollout: TensorDictBase) -> None:
        """Add noise levels `forward_sigma [B, K, M]`, noise `forward_eps` and the velocities of the weights that acted
        `forward_old`, both `[B, K, M, C, h, w]`, for K draws; keyed by (seed, iteration, prompt, sample).
        """
        rule, sigma = self.actor.causality, rollout["sigma"]
        levels, noises = [], []
        for row, key in enumerate(rollout["key"].tolist()):
            rng = generator(Stream.TRAINING, *key, 18)
            frames, last = sigma.shape[1], sigma.shape[2] - 1
            drawn = torch.from_numpy(rng.integers(last, size=(self.settings.draws, rule.chunks(frames))))
            steps = rule.spread(drawn, frames)
            levels.append(sigma[row].cpu().gather(1, steps.T).T)
            shape = (self.settings.draws, *rollout["latents"][row, :, -1].shape)
            noises.append(torch.from_numpy(rng.standard_normal(shape, dtype="float32")))
        rollout["forward_sigma"] = torch.stack(levels).to(sigma)
        rollout["forward_eps"] = torch.stack(noises).to(sigma)
        rollout["forward_old"] = torch.stack(
            [self._velocity(self.actor.transformer, rollout, k) for k in range(self.settings.draws)], 1
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Loss terms `loss_objective`, with a reference `loss_initial`, and detached metrics, all scalars.

        Drifts are mean squared differences of velocities: to the weights that acted, and to the initial policy. No
        kernel takes part, so they are no KL.
        """
        batch, s = tensordict, self.settings
        x0, mask = batch["latents"][:, :, -1].float(), batch["mask"]
        objective, drift, departure = 3 * [x0.new_zeros(())]
        for k in range(s.draws):
            v, old = self._velocity(self.actor.transformer, batch, k), batch["forward_old"][:, k]
            target = batch["forward_eps"][:, k] - x0
            objective = objective + nft_loss(v, old, target, batch["advantage"] / s.advantage_max, mask, s.strength)
            drift = drift + masked_mean((v.detach() - old).square().mean((2, 3, 4)), mask)
            if self.reference is not None:
                with torch.no_grad(), self.reference.network() as initial:
                    first = self._velocity(initial, batch, k)
                departure = departure + masked_mean((v - first).square().mean((2, 3, 4)), mask)
        terms = {"loss_objective": objective, "velocity_drift": drift}
        if self.reference is not None:
            terms |= {"loss_initial": s.kl_weight * departure, "velocity_drift_initial": departure.detach()}
        return TensorDict({name: value / s.draws for name, value in terms.items()}, [])

    def _velocity(self, network: nn.Module, batch: TensorDictBase, k: int) -> Tensor:
        """Velocity `[B, M, C, h, w]` of the k-th noising of all frames, float32."""
        x0, sigma = batch["latents"][:, :, -1], batch["forward_sigma"][:, k]
        level = sigma[..., None, None, None]
        x = ((1 - level) * x0 + level * batch["forward_eps"][:, k]).to(x0.dtype)
        clean, noisy = (torch.cat([frames, batch["condition"]], 2) for frames in (x0, x))
        v: Tensor = network(
            clean,
            noisy,
            sigma,
            batch["text"],
            causality=self.actor.causality,
            image=batch.get("image", None),
            mode="parallel",
        )
        return v.float()
