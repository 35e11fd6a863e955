"""The embedded models from nothing: VAE, towers, causal flow model ("teacher"), few-step model, student."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5EncoderModel

from algorithms.pretraining.flow import (
    WEAK_TRACKS,
    FewStepStage,
    FlowStage,
    LatentPool,
    build_transformer,
    encode_pool,
    train_few_step,
    train_flow,
)
from algorithms.pretraining.towers import TowerStage, train_towers
from algorithms.pretraining.vae import VAEStage, train_vae
from data.clip import World
from data.sprites import vocabulary
from envs.control import MODES, NOTE
from policies.causal_dit import CausalWanTransformer3DModel
from policies.codecs import TextCodec, VideoCodec

RECIPE = "recipe.json"
STATE = "state.pt"


class Chain:
    """Runs every stage whose result is not yet in `out`; a result appears there when it is complete.

    Interrupt it at will: the next run goes on from at most 500 steps before.

    Args:
        world: training clips.
        out: folder in diffusers' layout.
        report: takes a line of progress.
    """

    def __init__(self, world: World, out: Path, report: Callable[[str], None] = print) -> None:
        self.world, self.out, self.report = world, out, report
        self.flow, self.few_step, self.towers = FlowStage(), FewStepStage(), TowerStage()
        # Two stages train on the same clips, and encoding them takes minutes.
        self._pools = cache(self._encode)

    def run(self) -> None:
        """Train what is missing, in order."""
        self._stage("vae", VAEStage(), ["vae"], self._vae)
        for seed, name in ((0, "aesthetic"), (1, "aesthetic_eval")):
            parts = ["aesthetic", "text_encoder", "tokenizer"] if seed == 0 else [name]
            stage = replace(self.towers, seed=seed)
            self._stage(name, stage, parts, partial(self._towers, name))
        self._stage("teacher", self.flow, ["teacher"], self._teach)
        self._stage("few_step", self.few_step, ["few_step"], partial(self._adapt, "teacher", "few_step"))
        self._stage("transformer", WEAK_TRACKS, ["transformer"], partial(self._adapt, "few_step", "transformer"))

    def _vae(self, stage: VAEStage, to: Path) -> None:
        train_vae(self.world, stage, to / "vae", self.report, to / STATE)

    def _towers(self, name: str, stage: TowerStage, to: Path) -> None:
        train_towers(self.world, vocabulary(), stage, to, name, self.report, to / STATE)

    def _teach(self, stage: FlowStage, to: Path) -> None:
        pools = self._pools(stage.pool, 0.0)
        text_dim = pools[0].text.shape[-1]
        model = build_transformer(stage, pools[0].latents.shape[2], text_dim)
        train_flow(pools, stage, model, self.report, to / STATE).save_pretrained(to / "teacher")
        (self.out / NOTE).write_text(json.dumps({"control": MODES[0]}) + "\n")

    def _adapt(self, start: str, name: str, stage: FewStepStage, to: Path) -> None:
        model = CausalWanTransformer3DModel.from_pretrained(self.out / start, local_files_only=True)
        pools = self._pools(stage.pool, stage.track_noise)
        train_few_step(pools, stage, model, self.report, to / STATE).save_pretrained(to / name)

    def _encode(self, count: int, track_noise: float) -> list[LatentPool]:
        """Encoded training clips of every frame size."""
        video = VideoCodec(AutoencoderKLWan.from_pretrained(self.out / "vae", local_files_only=True))
        text = TextCodec(
            AutoTokenizer.from_pretrained(self.out / "tokenizer", local_files_only=True),
            UMT5EncoderModel.from_pretrained(self.out / "text_encoder", local_files_only=True),
            self.towers.text_length,
        )
        buckets = self.world.buckets
        return [encode_pool(self.world, video, text, b, count, track_noise=track_noise) for b in buckets]

    def _stage(self, name: str, stage: Any, parts: list[str], train: Callable[[Any, Path], None]) -> None:
        """Train into a scratch folder, move the parts to their places, and note how they were made."""
        if all((self.out / part).is_dir() for part in parts):
            self.report(f"{name}: found in {self.out}")
            return
        began, scratch = time.time(), self.out / f".{name}"
        settings, text = scratch / "settings.json", json.dumps(asdict(stage))
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
        recipe = self.out / RECIPE
        notes = json.loads(recipe.read_text()) if recipe.is_file() else {}
        notes[name] = {"settings": asdict(stage), "seconds": round(time.time() - began)}
        recipe.write_text(json.dumps(notes, indent=1) + "\n")
