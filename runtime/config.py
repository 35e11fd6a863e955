"""From a composed Hydra config to typed settings, checked, in well under a second and without importing
torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import runtime.hydra_sum  # noqa: F401  registers reward=motion+0.5*aesthetic
from runtime import STARTED, rules, schema
from runtime.checkpoint import complete_steps, folder_of, read_state, refuse_mismatch
from runtime.identity import BEGUN, differences, flatten, identity
from runtime.settings import Settings

CONF = Path(__file__).resolve().parents[1] / "conf"

# Experiments that take no gradients.
MEASURE = ("evaluate", "export", "serve")
# What a checkpoint's config decides for whoever measures it.
TRAINED = ("model", "adaptation", "world", "rollout")
FOLLOWS = "${pixel_frames:${rollout.frames}}"

# latent frames -> pixel frames, for conf/world/*.yaml
OmegaConf.register_new_resolver("pixel_frames", rules.pixel_frames, replace=True)


@dataclass(frozen=True)
class Plan:
    """What `validate` returns: the typed settings, and the same as plain containers.

    Attributes:
        settings: components built, rules checked.
        config: resolved config, to be stored beside the results.
        started: `time.monotonic()` when the process, or this run of a sweep, began.
    """

    settings: Settings
    config: dict[str, Any]
    started: float = STARTED


def validate(cfg: DictConfig, experiment: str = "train") -> Plan:
    """Check a composed config and build its components. Loads no network, no clip and no torch.

    Args:
        cfg: composed.
        experiment: that it is for, by the name of its primary config.

    Raises:
        ValueError: one line with the key and the fix.
        FileNotFoundError: a file or folder that the config names does not exist.
    """
    config = plain(cfg)
    settings: Settings = schema.build(Settings, config)
    rules.check(settings, trains=experiment not in MEASURE)
    if settings.checkpoint is not None:
        saved = read_state(Path(settings.checkpoint))["config"]
        _same_model(settings.checkpoint, saved, config)
        if experiment in MEASURE:
            _check_judges(settings, saved, config["evaluation"])
    settings.model.check(settings.rollout.frames)
    rules.parts(settings, experiment)
    if hasattr(settings.stage, "teacher"):
        _check_teacher(settings)
    if settings.resume:
        (_same_run if settings.stage is not None else _same_checkpoint)(Path(str(settings.run_dir)), config)
    return Plan(settings, config)


def as_trained(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Fill in how the policy of `cfg.checkpoint` was trained, wherever `overrides` do not say otherwise.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be read.
    """
    if not isinstance(cfg.checkpoint, str):
        return cfg
    saved = read_state(Path(cfg.checkpoint))["config"]
    if "frames" in saved.get("world", {}):
        saved["world"]["frames"] = FOLLOWS
    named = {text.lstrip("+~").partition("=")[0] for text in overrides}
    for group in TRAINED:
        if group in saved and group not in named:
            own = {key: OmegaConf.select(cfg, key) for key in named if key.startswith(f"{group}.")}
            OmegaConf.update(cfg, group, saved[group], merge=False)
            for key, value in own.items():
                OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Resolve interpolations and return plain containers.

    Raises:
        ValueError: an interpolation that cannot be resolved.
    """
    try:
        found = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ValueError(one_line(str(error))) from error
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def one_line(text: str) -> str:
    """Join the lines of a message of Hydra or OmegaConf and drop what only tells of their insides."""
    text = re.split(r"\n\s*Config search path:|\n\s*object_type=|\n\s*reference_type=", text)[0]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return re.sub(r"[.;]+;", ";", "; ".join(line for line in lines if line)).replace(":;", ":")


def _check_teacher(settings: Settings) -> None:
    teacher = replace(settings.model, transformer=settings.stage.teacher)
    teacher.check(settings.rollout.frames)
    if settings.stage.from_teacher:
        shapes = [_shape(folder / "config.json") for folder in (settings.model.network, teacher.network)]
        found = differences(
            *({key: shape[key] for key in shape if key in shapes[1 - i]} for i, shape in enumerate(shapes))
        )
        if found:
            raise ValueError(
                f"stage.teacher={settings.stage.teacher} has another shape than the student, which cannot begin with "
                f"its weights: {'; '.join(found)}; set stage.from_teacher=false, or choose another teacher"
            )
    layers, file = settings.stage.dmd.layers, teacher.network / "config.json"
    blocks = json.loads(file.read_text())["num_layers"] if file.is_file() else len(layers)
    if settings.stage.match and (not layers or not all(0 <= i < blocks for i in layers)):
        raise ValueError(f"stage.dmd.layers={layers}: the teacher has blocks 0 .. {blocks - 1}")


def _shape(file: Path) -> dict[str, Any]:
    """What decides the shapes of a transformer's weights, but for the control's channels, which are added on loading;
    of random weights nothing is written down.
    """
    if not file.is_file():
        return {}
    free = ("in_channels", "rope_max_seq_len")
    return {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("_") and k not in free}


def _same_run(folder: Path, config: dict[str, Any]) -> None:
    """Refuse to go on with a run of supervised training that had another config."""
    note = folder / BEGUN
    found = differences(json.loads(note.read_text())["identity"], identity(config)) if note.is_file() else []
    if found:
        raise ValueError(f"resume=true: not the config of the run in {folder}: {'; '.join(found)}")


def _same_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Likewise with a run that learns from rewards, by the config in its newest checkpoint."""
    for step in complete_steps(folder)[-1:]:
        try:
            saved = read_state(folder_of(folder, step))
        except (OSError, ValueError):
            return  # damaged: set aside when the run goes on, from the one before it
        then = {**saved["config"], "processes": saved["counters"].get("processes", 1)}
        refuse_mismatch(then, {**config, "processes": rules.ranks()})


def _check_judges(settings: Settings, saved: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """What rewarded a checkpoint cannot measure it; read as text, for a reward of one's own may not be here."""
    if saved.get("stage") is not None:
        return
    rewarded, judge = (each["tracker"]["_target_"] for each in (saved, evaluation))
    other = "lucas_kanade" if judge.endswith("NCC") else "ncc"
    rules.require(
        rewarded != judge,
        f"checkpoint={settings.checkpoint} was rewarded by {judge.rpartition('.')[2]}; the one that evaluates must be "
        f"another: add tracker@evaluation.tracker={other}",
    )
    scorer = settings.evaluation.scorer
    rules.require(
        not rules.rewards_by(settings.model.folder, scorer, [term.get("model") for term in saved["reward"].values()]),
        f"checkpoint={settings.checkpoint} was rewarded by the tower evaluation.scorer={scorer}; the one that "
        "evaluates must be another, such as evaluation.scorer=aesthetic_eval",
    )


def _same_model(folder: str | Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    found = differences(flatten(saved.get("model", {}), "model."), flatten(config["model"], "model."))
    if found:
        raise ValueError(f"checkpoint={folder} is of another model: {'; '.join(found)}")
