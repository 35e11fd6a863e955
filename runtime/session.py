"""A run of an algorithm: everything an iteration needs, and the phases of one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from data.clip import ClipBatch
from data.draws import Stream, generator
from envs.rollout import RolloutCollector
from envs.schedules import All, Deterministic
from envs.transitions import CPS
from metrics.signs import signs
from policies.actor import Actor
from policies.adapters import ReferencePolicy
from policies.causality import Causality
from policies.ema import EMA
from policies.sampler import sample_rollout
from rewards.base import RewardContext
from rewards.composite import Composite, metrics_of
from runtime import checkpoint
from runtime.alarms import SIGN
from runtime.episodes import Episodes, fixed_clips
from runtime.evaluation import Judge, Sample, divergence, follow, measure, sample
from runtime.settings import Settings

# Acting and re-scoring are the same computation batched differently: what is left is rounding.
LARGEST_GAP = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Session:
    """Models, episodes, rewards and optimizer of one run; each phase of an iteration is a method.

    An iteration follows from (weights, optimizer, iteration number, seed) alone.

    Raises:
        ValueError, FileNotFoundError: models, clips or checkpoint cannot be used; one line.
    """

    def __init__(self, settings: Settings, config: dict[str, Any]) -> None:
        self.settings, self.config = settings, config
        assert settings.run_dir is not None
        self.run_dir = Path(settings.run_dir)
        self.device = device_of(settings.device)
        settings.engine.setup()
        networks = settings.model.load(self.device)
        r = settings.rollout
        causality = Causality(r.chunk, r.window, r.sink, r.history_gradient)
        self.episodes = Episodes(settings.world, networks, r, settings.schedule, self.device)
        # Before the reference is made: the KL is to the policy that this run starts from.
        self._adapt(networks.transformer)
        self.actor = Actor(networks.transformer, settings.transition, causality)
        self.parameters = [p for p in networks.transformer.parameters() if p.requires_grad]
        algorithm = settings.algorithm
        compares = algorithm.kl_weight > 0 or algorithm.needs_reference
        reference = ReferencePolicy(self.actor, settings.adaptation) if compares else None
        self.loss_module = algorithm.loss_module(self.actor, reference)
        self.critic: nn.Module | None = getattr(self.loss_module, "critic", None)
        self.ema = EMA(networks.transformer, settings.optimizer.ema) if settings.optimizer.ema > 0 else None
        self.rewards = Composite(terms=settings.reward, **asdict(settings.scoring))
        self.rewards.prepare(RewardContext(self.device, settings.tracker, settings.model.folder))
        o = settings.optimizer
        groups: list[dict[str, Any]] = [{"params": self.parameters, "initial_lr": o.lr}]
        if self.critic is not None:
            groups.append({"params": list(self.critic.parameters()), "initial_lr": algorithm.critic_lr})
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.betas[0], o.betas[1]), weight_decay=o.weight_decay)
        self.collector = RolloutCollector(self.actor, self._next_start)
        self.on_step: Callable[[int, int], None] = lambda frame, frames: None
        self.actor.register_forward_hook(
            lambda actor, args, state: self._report(int(args[0]["frame"][0]), settings.rollout.frames)
        )
        e = settings.evaluation
        self.judge = Judge(e.tracker, e.scorer, settings.model.folder, self.device, e.extractor)
        clips = fixed_clips(settings.world, e.split, e.clips)
        self.truth = [follow(batch.video, batch, self.judge) for batch in clips]
        self.iteration = 0
        self._clips: ClipBatch
        if settings.resume:
            self._resume()

    def rollout(self) -> TensorDictBase:
        """Act: one rollout of this iteration's clips."""
        if self.actor.causality.chunk > 1:  # an environment takes one frame at a time
            actor = self.actor
            start = self._next_start()
            return sample_rollout(actor.transformer, actor.transition, actor.causality, start, self._report)
        self.actor.reset()
        return self.collector.collect()

    def decode(self, rollout: TensorDictBase) -> Tensor:
        """Videos `[B, 3, T, H, W]` of a rollout."""
        return self.episodes.networks.video.decode(rollout["latents"][:, :, -1])

    def score(self, rollout: TensorDictBase, video: Tensor) -> dict[str, float]:
        """Add reward terms, reward, validity and advantages to a rollout; return what to log."""
        group = self.settings.rollout.group_size
        terms = self.rewards.evaluate(video, self._clips)
        rollout.update(self.rewards.add(terms, group))
        metrics = self.settings.algorithm.prepare(rollout, group, self.settings.rollout.chunk)
        named = {f"reward_terms/{k}" if k in terms else k: v for k, v in metrics_of(terms).items()}
        valid = rollout["valid"]
        reward = float(rollout["reward"][valid].mean()) if bool(valid.any()) else float("nan")
        share = rollout["stochastic"].float().mean((0, 1)).tolist()
        chosen = {f"stochastic/step_{n}": value for n, value in enumerate(share)}
        seen = {f"{SIGN}{name}": value for name, value in signs(video, group).items()}
        return {"reward": reward, **named, **metrics, **chosen, **seen}

    def update(self, rollout: TensorDictBase) -> dict[str, float]:
        """Learn from a scored rollout; return means over its mini-batches.

        A mini-batch in which no group is valid is left out; an update of such mini-batches alone returns nothing.

        Raises:
            RuntimeError: re-scored log-probs differ from those of acting by more than rounding on the first mini-batch.
        """
        algorithm, engine = self.settings.algorithm, self.settings.engine
        rows: list[dict[str, float]] = []
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.settings.optimizer.share(self.iteration, self.settings.updates)
        begun = self.loss_module.begin(rollout)
        for epoch in range(algorithm.epochs):
            for indices in self._minibatches(epoch):
                if not rollout["mask"][indices].any():
                    continue  # a step without gradient would still move the weights: AdamW has momentum
                losses = self.loss_module(rollout[indices])
                if not rows and "log_prob_gap" in losses:
                    self._check_gap(float(losses["log_prob_gap"]))
                engine.backward(sum(v for k, v in losses.items() if k.startswith("loss_")))
                norm = engine.step(self.optimizer, self.settings.optimizer.grad_clip)
                rows.append({**{k: float(v.detach()) for k, v in losses.items()}, "grad_norm": norm})
        if self.ema is not None:
            self.ema.update()
        self.iteration += 1
        if not rows:
            return {}
        means = {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}
        # After the first mini-batch the weights have moved: only the first gap is rounding.
        return {**begun, **means, **{k: v for k, v in rows[0].items() if k == "log_prob_gap"}}

    def evaluate(self) -> tuple[dict[str, float], list[Sample]]:
        """Measure the policy (its averaged weights where there are some) on the held-out clips."""
        with nullcontext() if self.ema is None else self.ema.swap():
            return self._measure(self.actor)

    def evaluate_start(self) -> tuple[dict[str, float], list[Sample]]:
        """Measure the weights that this run started from; a run that was resumed loads them again."""
        transformer = self.settings.model.load_transformer(self.device)
        self._adapt(transformer)
        return self._measure(Actor(transformer, self.settings.transition, self.actor.causality))

    def speed(self) -> dict[str, Any]:
        """Latency to the first frame and steady frames per second; see `runtime.benchmark.speed`."""
        from runtime.benchmark import speed

        return speed(self.actor, replace(self.episodes, schedule=Deterministic()), self.truth)

    def divergence(self) -> float:
        """KL of the policy to the model's own weights on the held-out clips; see `runtime.evaluation.divergence`."""
        own = self.settings.model.load_transformer(self.device)
        initial = Actor(own, self.settings.transition, self.actor.causality)
        return divergence(self.actor, initial, self.episodes, [s.clips for s in self.truth])

    def save(self) -> Path:
        """Write a checkpoint of this iteration."""
        transformer = self.episodes.networks.transformer
        tensors = {
            "weights": {k: v for k, v in transformer.named_parameters() if v.requires_grad},
            "optimizer": checkpoint.optimizer_tensors(self.optimizer),
        }
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        if self.critic is not None:
            tensors["critic"] = self.critic.state_dict()
        snapshot = checkpoint.Snapshot(self.iteration, self.config, tensors)
        return checkpoint.save(self.run_dir, snapshot, self.settings.saving.keep)

    def synchronize(self) -> None:
        """Wait for the device, so that a phase's seconds are its own."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def _measure(self, actor: Actor) -> tuple[dict[str, float], list[Sample]]:
        renoise = self.settings.evaluation.sampler == "renoise"
        episodes = replace(self.episodes, schedule=All() if renoise else Deterministic())
        actor = Actor(actor.transformer, CPS(eta=1.0), actor.causality) if renoise else actor
        samples = sample(actor, episodes, [s.clips for s in self.truth], self.judge, self._report)
        return measure(samples, self.truth, self.judge), samples

    def _report(self, frame: int, frames: int) -> None:
        self.on_step(frame, frames)

    def _next_start(self) -> TensorDictBase:
        state, self._clips = self.episodes.training(self.settings.seed, self.iteration)
        return state

    def _minibatches(self, epoch: int) -> list[Tensor]:
        r, algorithm = self.settings.rollout, self.settings.algorithm
        size = r.group_size if algorithm.whole_groups else 1
        blocks = torch.arange(r.prompts * r.group_size).view(-1, size)
        if algorithm.minibatches > 1:
            rng = generator(Stream.TRAINING, self.settings.seed, self.iteration, 2, epoch)
            blocks = blocks[torch.from_numpy(rng.permutation(len(blocks)))]
        return [part.flatten().to(self.device) for part in blocks.chunk(algorithm.minibatches)]

    def _check_gap(self, gap: float) -> None:
        largest = LARGEST_GAP[getattr(self.episodes.networks.transformer, "compute_dtype", torch.float32)]
        if not gap <= largest:
            raise RuntimeError(
                f"re-scored log-probs differ from those of acting by {gap:.2e}, "
                f"more than the {largest:.0e} of rounding: "
                f"policy and environment disagree, nothing learned from this is right"
            )

    def _adapt(self, transformer: nn.Module) -> None:
        """Choose what trains, starting from the weights of `settings.checkpoint` where there is one.

        Its averaged weights are taken where it has some, for those are what its run evaluated. Weights of the network
        itself fit any adaptation; adapters fit the one that made them.
        """
        adaptation, seed, path = self.settings.adaptation, self.settings.seed, self.settings.checkpoint
        if path is None:
            adaptation.apply(transformer, seed)
            return
        tensors = checkpoint.load(Path(path)).tensors
        weights = tensors.get("ema", tensors["weights"])
        if weights.keys() <= dict(transformer.named_parameters()).keys():
            _copy(weights, transformer)
            adaptation.apply(transformer, seed)
        else:
            adaptation.apply(transformer, seed)
            _copy(weights, transformer)

    def _resume(self) -> None:
        newest = checkpoint.latest(self.run_dir)
        if newest is None:
            return
        snapshot = checkpoint.load(newest)
        checkpoint.refuse_mismatch(snapshot.config, self.config)
        _copy(snapshot.tensors["weights"], self.episodes.networks.transformer)
        checkpoint.restore_optimizer(self.optimizer, snapshot.tensors["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(snapshot.tensors["ema"])
        if self.critic is not None:
            self.critic.load_state_dict(snapshot.tensors["critic"])
        self.iteration = snapshot.step


@torch.no_grad()
def _copy(weights: dict[str, Tensor], network: nn.Module) -> None:
    """Put some of a network's weights in place.

    Raises:
        ValueError: it has no weights of these names.
    """
    own = dict(network.named_parameters())
    odd = sorted(weights.keys() - own.keys())
    if odd:
        raise ValueError(
            f"the checkpoint has weights of adapters ({odd[0]} and {len(odd) - 1} more); use its adaptation"
        )
    for name, value in weights.items():
        if value.shape != own[name].shape:
            shapes = f"{tuple(value.shape)} and not {tuple(own[name].shape)}"
            raise ValueError(f"the checkpoint's {name} is {shapes}; use its model and adaptation")
        own[name].copy_(value)


def device_of(name: str) -> str:
    """The device by its name.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= here:
        raise ValueError(f"device={name}: this machine has {here} {kind} devices; use device=auto")
    return name
