"""The embedded models from nothing: VAE, towers, initial model, teacher, few-step model, student.

The transformers go the paper's way (AR-Drag section 3.2): image-to-video, then control, then distillation with
Self-Rollout. The last stage gives the few-step model what a model of real clips has and this one had not: tracks from a
weak tracker. It learns to follow a drag with caution, which RL is there to mend.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5EncoderModel

from algorithms.distillation.chain import Distillation
from algorithms.distillation.finetune import finetune, fresh
from algorithms.distillation.pool import LatentPool, encode_pool
from algorithms.distillation.settings import DMD, Distill, FineTune, OwnHistoryStage, TeacherForcingStage
from algorithms.distillation.strategies import SelfRollout
from algorithms.pretraining.towers import TowerStage, train_towers
from algorithms.pretraining.transformer import Shape, build_transformer
from algorithms.pretraining.vae import VAEStage, train_vae
from data.clip import World
from data.sprites import vocabulary
from envs.control import MODES, NOTE
from policies.causal_dit import CausalWanTransformer3DModel, save
from policies.causality import Causality
from policies.codecs import TextCodec, VideoCodec

RECIPE = "recipe.json"
STATE = "state.pt"


@dataclass(frozen=True)
class Teaching:
    """A stage of `experiments/finetune.py`.

    Attributes:
        stage: its settings.
        updates: optimizer steps.
        seed: of weights, clips and noise.
        shape: of a fresh model.
    """

    stage: FineTune
    updates: int
    seed: int = 0
    shape: Shape = field(default_factory=Shape)


@dataclass(frozen=True)
class Studying:
    """A run of `experiments/distill.py`, with Self-Rollout.

    Attributes:
        stage: its settings.
        updates: generator steps of distribution matching.
        causality: chunk and window of the student.
        sigmas: the student's noise levels.
        seed: of clips and noise.
    """

    stage: Distill
    updates: int
    causality: Causality = field(default_factory=Causality)
    sigmas: tuple[float, ...] = (1.0, 0.755, 0.522, 0.0)
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what `assets/tiny` holds. The aesthetic towers are trained twice, with two seeds."""

    vae: VAEStage = field(default_factory=VAEStage)
    towers: TowerStage = field(default_factory=TowerStage)
    initial: Teaching = field(default_factory=lambda: Teaching(FineTune(fresh=True, control=False), 3000))
    teacher: Teaching = field(default_factory=lambda: Teaching(FineTune(), 6000))
    few_step: Studying = field(
        default_factory=lambda: Studying(
            Distill(
                teacher="teacher",
                pool=512,
                teacher_forcing=TeacherForcingStage(steps=800),
                dmd=DMD(lr=1e-4, critic_lr=2e-4),
            ),
            100,
        )
    )
    student: Studying = field(
        default_factory=lambda: Studying(
            Distill(
                teacher="teacher",
                from_teacher=False,
                eta=0.0,
                pool=768,
                track_noise=4.0,
                own_history=OwnHistoryStage(steps=300, lr=2e-3, ema=0.995),
                match=False,
            ),
            0,
            seed=1,
        )
    )

    def stages(self) -> dict[str, Any]:
        """Settings of every stage, in order, by the name under which `recipe.json` notes them."""
        return {
            "vae": self.vae,
            "aesthetic": self.towers,
            "aesthetic_eval": replace(self.towers, seed=self.towers.seed + 1),
            "initial": self.initial,
            "teacher": self.teacher,
            "few_step": self.few_step,
            "transformer": self.student,
        }


class Chain:
    """Runs every stage whose result is not yet in `out`; a result appears there when it is complete, and one that was
    made with other settings is refused.

    Interrupt it at will: the next run goes on from at most 500 steps before. What is trained is a function of the
    recipe alone, on one machine.

    Args:
        world: training clips.
        out: folder in diffusers' layout.
        report: takes a line of progress.
        recipe: settings of the stages.
    """

    def __init__(
        self, world: World, out: Path, report: Callable[[str], None] = print, recipe: Recipe | None = None
    ) -> None:
        self.world, self.out, self.report, self.recipe = world, out, report, recipe or Recipe()
        # Two stages train on the same clips, and encoding them takes minutes.
        self._pools = cache(self._encode)

    def run(self) -> None:
        """Train what is missing, in order."""
        trainers: dict[str, Callable[[Any, Path], None]] = {
            "vae": self._vae,
            "aesthetic": partial(self._towers, "aesthetic"),
            "aesthetic_eval": partial(self._towers, "aesthetic_eval"),
            "initial": partial(self._teach, "", "initial"),
            "teacher": partial(self._teach, "initial", "teacher"),
            "few_step": partial(self._study, "teacher", "few_step"),
            "transformer": partial(self._study, "few_step", "transformer"),
        }
        for name, stage in self.recipe.stages().items():
            parts = ["aesthetic", "text_encoder", "tokenizer"] if name == "aesthetic" else [name]
            self._stage(name, stage, parts, trainers[name])

    def _vae(self, stage: VAEStage, to: Path) -> None:
        train_vae(self.world, stage, to / "vae", self.report, to / STATE)

    def _towers(self, name: str, stage: TowerStage, to: Path) -> None:
        train_towers(self.world, vocabulary(), stage, to, name, self.report, to / STATE)

    def _teach(self, start: str, name: str, how: Teaching, to: Path) -> None:
        pools = self._pools(how.stage.pool, how.stage.track_noise)
        if how.stage.fresh:
            text_dim, channels = pools[0].text.shape[-1], pools[0].latents.shape[2]
            model = fresh(build_transformer(how.shape, channels, text_dim), how.seed)
            (self.out / NOTE).write_text(json.dumps({"control": MODES[0]}) + "\n")
        else:
            model = self._load(start)
        negative = self._text().encode([how.stage.negative_prompt])
        trained, _ = finetune(pools, how.stage, model, negative, how.updates, how.seed, self.report, to / STATE)
        save(trained, to / name)

    def _study(self, start: str, name: str, how: Studying, to: Path) -> None:
        pools = self._pools(how.stage.pool, how.stage.track_noise)
        negative = self._text().encode([how.stage.negative_prompt])
        run = Distillation(how.stage, SelfRollout(), how.causality, how.sigmas, how.updates, how.seed, self.report)
        student, teacher = self._load(start), self._load(how.stage.teacher)
        save(run.run(student, teacher, negative, pools, to), to / name)

    def _load(self, name: str) -> CausalWanTransformer3DModel:
        with torch.random.fork_rng():  # a new model draws weights, which are replaced
            return CausalWanTransformer3DModel.from_pretrained(self.out / name, local_files_only=True)

    def _text(self) -> TextCodec:
        return TextCodec(
            AutoTokenizer.from_pretrained(self.out / "tokenizer", local_files_only=True),
            UMT5EncoderModel.from_pretrained(self.out / "text_encoder", local_files_only=True),
            self.recipe.towers.text_length,
        )

    def _encode(self, count: int, track_noise: float) -> list[LatentPool]:
        """Encoded training clips of every frame size."""
        video = VideoCodec(AutoencoderKLWan.from_pretrained(self.out / "vae", local_files_only=True))
        text = self._text()
        return [encode_pool(self.world, video, text, b, count, track_noise=track_noise) for b in self.world.buckets]

    def _stage(self, name: str, stage: Any, parts: list[str], train: Callable[[Any, Path], None]) -> None:
        """Train into a scratch folder, move the parts to their places, and note how they were made."""
        recipe, text = self.out / RECIPE, json.dumps(asdict(stage))
        notes = json.loads(recipe.read_text()) if recipe.is_file() else {}
        if all((self.out / part).is_dir() for part in parts):
            if notes.get(name, {}).get("settings") != json.loads(text):
                raise ValueError(
                    f"{self.out / parts[0]} was made with other settings than {name} has now; choose another --out, or "
                    f"remove it and what was made from it"
                )
            self.report(f"{name}: found in {self.out}")
            return
        began, scratch = time.time(), self.out / f".{name}"
        settings = scratch / "settings.json"
        if not settings.is_file() or settings.read_text() != text:
            # What an interrupted run left is of use only to a run with the same settings.
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            settings.write_text(text)
        train(stage, scratch)
        for part in parts:
            shutil.rmtree(self.out / part, ignore_errors=True)
            (scratch / part).replace(self.out / part)
        shutil.rmtree(scratch)
        notes[name] = {"settings": json.loads(text), "seconds": round(time.time() - began)}
        recipe.write_text(json.dumps(notes, indent=1) + "\n")
