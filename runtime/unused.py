"""What training without rollouts does not read, and whether somebody has set it all the same."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from runtime.identity import flatten
from runtime.schema import TARGET

if TYPE_CHECKING:
    from runtime.settings import Settings

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = ("optimizer", "scoring", "saving", "alarms", "guard")
CHOICES = ("algorithm", "schedule", "transition", "tracker")
SERVED = ("tracker.",)  # what a service of rewards does read, beside the reward
KEYS = ("rollout.prompts", "rollout.group_size", "rollout.history_gradient", "evaluation.every")
# What offline DPO does read: it has an algorithm, which other rules look at, and re-scores with a history.
PAIRS = ("algorithm.", "optimizer.", "rollout.history_gradient")
# Values that ask for nothing.
OFF = {"evaluation.every": 0, "algorithm.kl_weight": 0.0}
# What is set in place of a key: a setting of the stage, or of its distribution matching.
INSTEAD = {
    "optimizer.lr": "lr",
    "optimizer.betas": "betas",
    "optimizer.grad_clip": "clip",
    "optimizer.ema": "ema",
    "rollout.prompts": "batch",
    "rollout.group_size": "batch",
}


@cache
def defaults() -> dict[str, Any]:
    """What is not read, by dotted key, with the values of `conf/config.yaml` and of the choices that it names."""
    base, names = _plain(CONF / "config.yaml"), _names()
    chosen = {group: choice(group, names[group]) for group in CHOICES}
    flat = flatten({group: base[group] for group in GROUPS} | chosen)
    return flat | {key: value for key, value in flatten(base).items() if key in KEYS}


def changed(settings: Settings) -> list[str]:
    """Settings, as `key=value`, that differ from their defaults and have no effect without rollouts."""
    stage, served = settings.stage, hasattr(settings.stage, "port")
    read = SERVED if served else PAIRS if hasattr(stage, "criterion") else ()
    found = [] if served else _rewards(settings)
    if hasattr(stage, "match"):
        found += _idle_stages(settings)
    for key, default in defaults().items():
        group, _, leaf = key.partition(".")
        if read and key.startswith(read) and key != "optimizer.ema":
            continue
        part = getattr(settings, group)
        if leaf == TARGET:
            own = f"{type(part).__module__}.{type(part).__qualname__}"
            found += [f"{group}={type(part).__name__}"] if own != default else []
        elif (value := getattr(part, leaf, default)) not in (default, OFF.get(key, default)):
            found.append(f"{key}={value}")
    return found


def _idle_stages(settings: Settings) -> list[str]:
    """Settings, as `key=value`, of stages of distillation that do not run, and of weights that are replaced."""
    stage, default = settings.stage, choice("stage", "distill")
    found = []
    if stage.from_teacher and settings.model.transformer != "transformer":
        found.append(f"model.transformer={settings.model.transformer}")
    for name, part in vars(stage).items():
        if getattr(part, "steps", None) == 0:
            found += _differing(f"stage.{name}", part, default[name] | {"steps": 0})
    if not stage.match:  # a strategy makes the clips of distribution matching
        found += _differing("strategy", settings.strategy, choice("strategy", "self_rollout"))
        found += _differing("stage.dmd", stage.dmd, default["dmd"])
    return found


def _rewards(settings: Settings) -> list[str]:
    """Terms of the reward, as `key=value`, that are not those of the default."""
    names = _names()["reward"].split("+")
    if set(settings.reward) != set(names):
        return [f"reward={'+'.join(settings.reward)}"]
    parts = ((name, settings.reward[name], choice("reward", name)) for name in names)
    return [text for name, part, default in parts for text in _differing(f"reward.{name}", part, default)]


def _differing(prefix: str, part: Any, default: dict[str, Any]) -> list[str]:
    """Settings of a component, as `key=value`, that are not those of a choice."""
    own = f"{type(part).__module__}.{type(part).__qualname__}"
    if own != default.get(TARGET, own):
        return [f"{prefix}={type(part).__name__}"]
    return [
        f"{prefix}.{key}={getattr(part, key)}"
        for key, value in default.items()
        if key != TARGET and _plain_value(getattr(part, key)) != value
    ]


def _plain_value(value: Any) -> Any:
    """As a configuration file holds it."""
    return list(value) if isinstance(value, tuple) else value


def _names() -> dict[str, str]:
    """The default choice of each group of `conf/config.yaml`."""
    entries = _plain(CONF / "config.yaml")["defaults"]
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def instead(key: str, stage: Any) -> str:
    """What to do about a key of `changed`."""
    if key == "model.transformer":
        return "the teacher's weights replace it: set stage.from_teacher=false to begin with it"
    if key.startswith("stage."):
        return "take it out, or let its stage run"
    name = INSTEAD.get(key, "-")
    for owner, part in (("stage", stage), ("stage.dmd", getattr(stage, "dmd", stage))):
        if hasattr(part, name):
            return f"set {owner}.{name} in its place"
    return "take it out"


def choice(group: str, name: str) -> dict[str, Any]:
    """What `conf/<group>/<name>.yaml` holds."""
    return _plain(CONF / group / f"{name}.yaml")


def _plain(path: Path) -> dict[str, Any]:
    return dict(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
