"""A run of an algorithm: everything an iteration needs, and the phases of one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from algorithms.advantages import group_valid
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
from runtime import checkpoint, guard, state
from runtime.alarms import SIGN
from runtime.episodes import Episodes, fixed_clips
from runtime.evaluation import Judge, Sample, divergence, follow, measure, sample
from runtime.guard import NonFinite, Watchdog
from runtime.hardware import device_of
from runtime.learner import GAP, Learner
from runtime.settings import Settings
from runtime.signals import StopFlag

# Acting and re-scoring are the same computation batched differently: what is left is rounding.
LARGEST_GAP = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Session:
    """Models, episodes, rewards and optimizer of one run; each phase of an iteration is a method.

    An iteration follows from (weights, optimizer, iteration number, seed) alone.

    Args:
        settings: the experiment.
        config: the same as plain containers.
        stop: asked between steps; see `StopFlag`.
        learns: whether updates are to come, which may need a copy of the initial policy.

    Raises:
        ValueError, FileNotFoundError: models, clips or checkpoint cannot be used; one line.
    """

    def __init__(
        self, settings: Settings, config: dict[str, Any], stop: StopFlag | None = None, learns: bool = True
    ) -> None:
        self.settings, self.config = settings, config
        self.device = device_of(settings.device)
        self.team = settings.engine.join(self.device)
        self.stop = stop or StopFlag()
        self.stop.team = self.team
        self.run_dir = Path(self.team.share(str(settings.run_dir)))
        networks = settings.model.load(self.device)
        r = settings.rollout
        causality = Causality(r.chunk, r.window, r.sink, r.history_gradient)
        self.episodes = Episodes(settings.world, networks, r, settings.schedule, self.device)
        # Before the reference is made: the KL is to the policy that this run starts from.
        state.adapt(settings, networks.transformer)
        self.base = state.fingerprint(networks.transformer, networks.video)
        settings.engine.shape(networks.transformer)
        self.actor = Actor(networks.transformer, settings.transition, causality)
        self.parameters = [p for p in networks.transformer.parameters() if p.requires_grad]
        self._make_learner(learns)
        self.rewards = Composite(terms=settings.reward, **asdict(settings.scoring))
        self.rewards.prepare(RewardContext(self.device, settings.tracker, settings.model.folder))
        self.collector = RolloutCollector(self.actor, self._next_start)
        self.on_step: Callable[[int, int], None] = lambda frame, frames: None
        self.notice: Callable[[str], None] = lambda text: print(f"notice: {text}", file=sys.stderr)
        self.actor.register_forward_hook(
            lambda actor, args, state: self._report(int(args[0]["frame"][0]), settings.rollout.frames)
        )
        e = settings.evaluation
        self.judge = Judge(e.tracker, e.looks, settings.model.folder, self.device, e.extractor, e.interpolator)
        clips = fixed_clips(settings.world, e.split, e.clips)
        self.truth = [follow(batch.video, batch, self.judge) for batch in clips]
        self._clips: ClipBatch
        self.held_video: Tensor | None = None
        self._rollout: TensorDictBase | None = None

    def _make_learner(self, learns: bool) -> None:
        """Loss, critic, averaged weights and optimizer; a resumed run's state in them."""
        settings, algorithm, network = self.settings, self.settings.algorithm, self.episodes.networks.transformer
        compares = learns and (algorithm.kl_weight > 0 or algorithm.needs_reference)
        reference = ReferencePolicy(self.actor, settings.adaptation) if compares else None
        self.loss_module = algorithm.loss_module(self.actor, reference)
        self.critic: nn.Module | None = getattr(self.loss_module, "critic", None)
        state.adopt_critic(settings, self.critic)
        self.ema = EMA(network, settings.optimizer.ema) if settings.optimizer.ema > 0 else None
        self.iteration, self.best, self.unsaved = 0, 0, False
        self.watchdog = Watchdog(settings.guard)
        self.moments: dict[str, Tensor] | None = None
        if settings.resume:
            state.resume(self)
        critic_lr = getattr(algorithm, "critic_lr", 0.0)
        self.trainer = settings.engine.trainer(network, self.critic, settings.optimizer, critic_lr, self.team)
        self.actor.transformer = self.trainer.network
        if self.moments is not None:
            self.trainer.restore(self.moments)
            self.moments = None
        block = settings.rollout.group_size if algorithm.whole_groups else 1
        parts, gap = settings.engine.accumulation, LARGEST_GAP[network.compute_dtype]
        self.learner = Learner(self.loss_module, self.trainer, self.team, parts, block, gap)

    def rollout(self) -> TensorDictBase:
        """Act: one rollout of this iteration's clips.

        Raises:
            NonFinite: a latent or a log-prob is not finite.
            Stopped: a stop was asked for.
        """
        self._rollout = self.held_video = None
        if self.actor.causality.chunk > 1:  # an environment takes one frame at a time
            actor = self.actor
            start = self._next_start()
            rollout = sample_rollout(actor.transformer, actor.transition, actor.causality, start, self._report)
        else:
            self.actor.reset()
            rollout = self.collector.collect()
            self.actor.reset()  # its cache would stay beside decoder, rewards and update
        self._rollout = rollout
        guard.check(self.team, "latent", rollout["latents"])
        guard.check(self.team, "log_prob", rollout["log_prob"])
        return rollout

    def decode(self, rollout: TensorDictBase) -> Tensor:
        """Videos `[B, 3, T, H, W]` of a rollout.

        Raises:
            NonFinite: a value is not finite.
        """
        self.stop.poll()
        self.held_video = self.episodes.networks.video.decode(rollout["latents"][:, :, -1])
        guard.check(self.team, "video", self.held_video)
        return self.held_video

    def score(self, rollout: TensorDictBase, video: Tensor) -> dict[str, float]:
        """Add reward terms, reward, validity and advantages to a rollout; return what to log.

        Raises:
            NonFinite: a reward or an advantage is not finite.
        """
        self.stop.poll()
        group = self.settings.rollout.group_size
        terms = self.rewards.evaluate(video, self._clips)
        rollout.update(self.rewards.add(terms, group))
        whole = self.team.rows(rollout)
        metrics = self.settings.algorithm.prepare(whole, group, self.settings.rollout.chunk)
        self.team.own(whole, rollout)
        guard.check(
            self.team, "reward", torch.cat([rollout[k].flatten(1) for k in ("reward", "advantage") if k in rollout], 1)
        )
        named = {f"reward_terms/{k}" if k in terms else k: v for k, v in metrics_of(terms).items()}
        valid = whole["valid"]
        reward = float(whole["reward"][valid].mean()) if bool(valid.any()) else float("nan")
        share = whole["stochastic"].float().mean((0, 1)).tolist()
        chosen = {f"stochastic/step_{n}": value for n, value in enumerate(share)}
        seen = {f"{SIGN}{name}": value for name, value in signs(video, group).items()}
        return {"reward": reward, **self.team.mean(named), **metrics, **chosen, **self.team.mean(seen)}

    def update(self, rollout: TensorDictBase) -> dict[str, float]:
        """Learn from a scored rollout; return means over its mini-batches.

        A mini-batch in which no group is valid is left out; an update of such mini-batches alone returns nothing.

        Raises:
            NonFinite: a loss or a gradient is not finite; the weights are those before its mini-batch.
            RewardFailed: rewards failed for all groups, in too many updates in a row.
            RuntimeError: re-scored log-probs differ from those of acting by more than rounding on the first mini-batch.
        """
        self.stop.poll()
        for group in self.trainer.groups():
            group["lr"] = group["initial_lr"] * self.settings.optimizer.share(self.iteration, self.settings.updates)
        self.loss_module.observe(rollout)
        whole = self.team.rows(rollout)
        begun = self.loss_module.settle(whole)
        self.team.own(whole, rollout)
        rows: list[dict[str, float]] = []
        for epoch in range(self.settings.algorithm.epochs):
            for indices in self._minibatches(epoch):
                row = self.learner.learn(rollout, whole, indices, first=not rows)
                rows += [] if row is None else [row]
        self._end_update()
        group = self.settings.rollout.group_size if self.settings.algorithm.group_relative else 1
        if bool(group_valid(whole["valid"], group).any()):
            self.watchdog.good()
        else:
            self.watchdog.unscored(self.iteration)
        if not rows:
            return {}
        means = {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}
        # After the first mini-batch the weights have moved: only the first gap is rounding.
        return {**begun, **means, **{k: v for k, v in rows[0].items() if k == GAP}}

    def skip(self, found: NonFinite) -> dict[str, float]:
        """End an iteration in which something is not finite; returns what to log.

        Raises:
            FloatingPointError: the run is to stop.
        """
        metrics = self.watchdog.bad(self, found, self._rollout)
        self.iteration += 1
        return metrics

    def evaluate(self) -> tuple[dict[str, float], list[Sample]]:
        """Measure the policy (its averaged weights where there are some) on the held-out clips."""
        with nullcontext() if self.ema is None else self.ema.swap(lambda: self.trainer.gathered(write=True)):
            return self._measure(self.actor)

    def evaluate_start(self) -> tuple[dict[str, float], list[Sample]]:
        """Measure the weights that this run started from; a run that was resumed loads them again."""
        transformer = self.settings.model.load_transformer(self.device)
        state.adapt(self.settings, transformer)
        self.settings.engine.shape(transformer)
        return self._measure(Actor(transformer, self.settings.transition, self.actor.causality))

    def speed(self) -> dict[str, Any]:
        """Latency to the first frame and steady frames per second; see `runtime.benchmark.speed`."""
        from runtime.benchmark import speed

        return speed(self.actor, replace(self._alike(), schedule=Deterministic()), self.truth)

    def divergence(self) -> float:
        """KL of the policy to the model's own weights on the held-out clips; see `runtime.evaluation.divergence`."""
        own = self.settings.model.load_transformer(self.device)
        self.settings.engine.shape(own)
        initial = Actor(own, self.settings.transition, self.actor.causality)
        clips, batch = [s.clips for s in self.truth], self.settings.evaluation.batch
        return divergence(self.actor, initial, self._alike(), clips, batch)

    def save(self, required: bool = False) -> None:
        """Write a checkpoint of this iteration.

        Where that fails (a full disk) the run goes on with a notice, tries again after every update (`unsaved`), and
        the checkpoints that there are stay whole.

        Args:
            required: raise instead.

        Raises:
            OSError: it could not be written, and `required`.
        """
        folder = checkpoint.folder_of(self.run_dir, self.iteration)
        try:
            self.write(folder)
            self.unsaved = False
        except OSError as error:
            text = f"{folder} could not be written ({error}); the checkpoints before it are whole"
            if required:
                raise OSError(f"{text}; free space, then go on with: run_dir={self.run_dir} resume=true") from error
            if not self.unsaved:
                self.notice(f"{text}; trying again after every update")
            self.unsaved = True
            return
        try:
            if self.team.main:
                checkpoint.prune(self.run_dir, self.settings.saving.keep, self.best)
        except OSError as error:  # what was written is whole
            self.notice(f"an old checkpoint could not be removed ({error})")

    def write(
        self,
        folder: Path,
        own: dict[str, dict[str, Tensor]] | None = None,
        counters: dict[str, Any] | None = None,
        ema: bool = True,
    ) -> Path:
        """Write the state of this iteration, every process its part; returns the folder.

        Args:
            folder: a checkpoint's.
            own: more tensors of this process.
            counters: more counters.
            ema: with the averaged weights.

        Raises:
            OSError: it could not be written, by any process; nothing of it is left.
        """
        common, mine = state.tensors_of(self, ema)
        snapshot = checkpoint.Snapshot(self.iteration, self.config, common, {**state.notes(self), **(counters or {})})
        return checkpoint.write(folder, snapshot, self.team, {**mine, **(own or {})})

    def synchronize(self) -> None:
        """Wait for the device, so that a phase's seconds are its own."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def _measure(self, actor: Actor) -> tuple[dict[str, float], list[Sample]]:
        renoise = self.settings.evaluation.sampler == "renoise"
        episodes = replace(self._alike(), schedule=All() if renoise else Deterministic())
        actor = Actor(actor.transformer, CPS(eta=1.0), actor.causality) if renoise else actor
        clips, batch = [s.clips for s in self.truth], self.settings.evaluation.batch
        samples = sample(actor, episodes, clips, self.judge, batch, self._report)
        return measure(samples, self.truth), samples

    def _alike(self) -> Episodes:
        """Episodes on the noise that all policies are measured on, whether their own rollouts share theirs or not."""
        return replace(self.episodes, rollout=replace(self.settings.rollout, share_initial_noise=True))

    def _report(self, frame: int, frames: int) -> None:
        self.stop.poll()
        self.on_step(frame, frames)

    def _end_update(self) -> None:
        if self.ema is not None:
            with self.trainer.gathered():
                self.ema.update()
        self.iteration += 1

    def _next_start(self) -> TensorDictBase:
        team = self.team
        start, self._clips = self.episodes.training(self.settings.seed, self.iteration, team.rank, team.size)
        return start

    def _minibatches(self, epoch: int) -> list[Tensor]:
        r, algorithm = self.settings.rollout, self.settings.algorithm
        blocks = torch.arange(r.prompts * r.group_size).view(-1, self.learner.block)
        if algorithm.minibatches > 1:
            rng = generator(Stream.TRAINING, self.settings.seed, self.iteration, 2, epoch)
            blocks = blocks[torch.from_numpy(rng.permutation(len(blocks)))]
        return [part.flatten().to(self.device) for part in blocks.chunk(algorithm.minibatches)]
