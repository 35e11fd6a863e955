"""The text of `--help`, made from the configuration tree and the docstrings of the classes behind it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from runtime.config import CONF
from runtime.identity import flatten
from runtime.schema import TARGET, attributes, locate
from runtime.settings import Settings

USAGE = """\
python experiments/{name}.py [group=choice] [key=value] ...
  -m                  sweep over comma-separated values
  --help              this text, for the given choices
  --cfg job           the whole config
  --config-dir DIR    a folder with choices of your own (CONTRIBUTING.md)
"""


@dataclasses.dataclass(frozen=True)
class Field:
    """One key of a config: dotted name, value, what it is."""

    key: str
    value: Any
    text: str


def explain(config_name: str, overrides: list[str], config_dir: str | None = None) -> str:
    """Return usage, the choices of every group, and every key with its value and meaning."""
    cfg, choices = _composed(config_name, overrides, config_dir)
    parts = [USAGE.format(name=config_name), "Choices"]
    for group, options in choices.items():
        parts += [f"  {f'{group}={name}':<26} {text}".rstrip() for name, text in options.items()]
    parts.append("  reward=motion+0.5*aesthetic: any weighted sum of rewards")
    parts.append("\nSettings")
    parts += [f"  {f.key}={_shown(f.value)}\n      {f.text}" for f in fields(Settings, cfg)]
    return "\n".join(parts)


def fields(cls: type, node: Any, prefix: str = "") -> Iterator[Field]:
    """Yield every key below a config node, described by the docstring of the class it builds; `node` is a
    plain container.
    """
    hints, texts = get_type_hints(cls), attributes(cls)
    for name in (f.name for f in dataclasses.fields(cls) if f.name in node):
        key, value = f"{prefix}{name}", node[name]
        inner = hints.get(name)
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from fields(inner, value, f"{key}.")
        elif isinstance(value, dict) and TARGET in value:
            yield from fields(locate(value[TARGET], key), value, f"{key}.")
        elif isinstance(value, dict) and any(isinstance(v, dict) and TARGET in v for v in value.values()):
            for term, child in value.items():
                yield from fields(locate(child[TARGET], f"{key}.{term}"), child, f"{key}.{term}.")
        else:
            yield Field(key, value, texts.get(name, ""))


def known_keys(config_name: str, config_dir: str | None = None) -> list[str]:
    """Return every dotted key and every group that a command line may override."""
    cfg, choices = _composed(config_name, [], config_dir)
    flat = [key for key in flatten(cfg) if not key.endswith(TARGET)]
    return [*flat, *cfg, *choices]


def groups() -> list[str]:
    """Return the config groups of this repository."""
    return sorted(p.name for p in CONF.iterdir() if p.is_dir() and any(p.glob("*.yaml")) and p.name != "local")


def _composed(
    name: str, overrides: list[str], config_dir: str | None
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(name, [*extra, *overrides])
        folders = [CONF, *([Path(config_dir)] if config_dir else [])]
        choices = {g: {c: _headline(folders, g, c) for c in _options(g, folders)} for g in groups()}
    return _plain(cfg), choices


def _options(group: str, folders: list[Path]) -> list[str]:
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})


def _headline(folders: list[Path], group: str, choice: str) -> str:
    """First comment of the file of a choice."""
    path = next(p for f in reversed(folders) if (p := f / group / f"{choice}.yaml").is_file())
    lines = [line.lstrip("# ").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((line for line in lines if not line.startswith("@")), "")


def _plain(cfg: DictConfig) -> dict[str, Any]:
    found = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
