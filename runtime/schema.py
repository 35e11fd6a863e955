"""Builds typed dataclasses from plain configuration nodes, strictly: nothing is coerced, clamped or
ignored."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

TARGET = "_target_"
MISSING = "???"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?` where a known name is close, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def locate(target: object, path: str) -> type:
    """Import the dataclass that a `_target_` names.

    Raises:
        ValueError: it cannot be imported, or is not a dataclass.
    """
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}.{TARGET}: cannot import {target!r} ({error}); name a class "
            f"as module.Class, and put the folder of "
            f"its file on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"{path}.{TARGET}: {target!r} is not a dataclass; see CONTRIBUTING.md")
    return found


def build(cls: type, node: object, path: str = "") -> Any:
    """Build `cls` from a mapping of its fields; nested dataclasses and `_target_` nodes are built first.

    Args:
        cls: a dataclass.
        node: plain containers, as from `OmegaConf.to_container`.
        path: dotted key of the node, for messages.

    Raises:
        ValueError: an unknown or missing field, a value of the wrong type, or one that the class refuses.
            One line.
    """
    if not isinstance(node, Mapping):
        raise ValueError(f"{path} must hold the fields of {cls.__name__}, got {node!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in node:
        if name not in fields and name != TARGET:
            raise ValueError(f"{_join(path, name)} does not exist; {suggest(str(name), fields)}")
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if node.get(name, None if optional else MISSING) == MISSING:
            raise ValueError(f"{_join(path, name)} is missing; add {_join(path, name)}=...")
    hints = get_type_hints(cls)
    values = {k: convert(node[k], hints[k], _join(path, k)) for k in fields if k in node}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(_located(str(error), path)) from error


def convert(value: object, hint: Any, path: str) -> Any:
    """Return `value` as `hint` asks, or raise a one-line ValueError naming `path`."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    if hint is Any:
        return component(value, path)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(value, args, path)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{path} must be one of {', '.join(map(str, args))}; got {value!r}")
        return value
    if (origin or hint) in (list, tuple):
        return _sequence(value, hint, path)
    if (origin or hint) is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} must be a mapping, got {value!r}")
        inner = args[1] if args else object
        return {k: convert(v, inner, _join(path, k)) for k, v in value.items()}
    return _scalar(value, hint, path)


def component(value: object, path: str) -> Any:
    """Build the dataclass that a node with `_target_` names.

    Raises:
        ValueError: the node names no class, or its class refuses it.
    """
    if not isinstance(value, Mapping) or TARGET not in value:
        raise ValueError(f"{path} must be a choice of its config group (a node with {TARGET}), got {value!r}")
    return build(locate(value[TARGET], path), value, path)


def attributes(cls: type) -> dict[str, str]:
    """Return the `Attributes:` sections of a class and its bases as name -> one line of text; its own come last."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        found |= _own_attributes(inspect.cleandoc(owner.__doc__ or ""))
    return found


def _own_attributes(doc: str) -> dict[str, str]:
    section = doc.partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.strip() and not line.startswith("    "):
            break
        if line.startswith("     "):
            found[name] = f"{found[name]} {line.strip()}"
        elif ":" in line:
            name, _, text = line.strip().partition(":")
            found[name] = text.strip()
    return found


_NOUNS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def _scalar(value: object, hint: Any, path: str) -> Any:
    if hint in (object, type(value)):
        return value
    if hint is float and type(value) is int:
        return float(value)
    raise ValueError(f"{path} must be {_NOUNS.get(hint, hint)}, got {value!r}")


def _union(value: object, options: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in (o for o in options if o is not type(None)):
        try:
            return convert(value, option, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[0])


def _sequence(value: object, hint: Any, path: str) -> Any:
    kind, args = get_origin(hint) or hint, get_args(hint)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path} must be a list, got {value!r}")
    fixed = kind is tuple and args and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise ValueError(f"{path} must hold {len(args)} values, got {list(value)}")
    inner = args if fixed else (args[:1] or (object,)) * len(value)
    return kind(convert(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True)))


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _located(message: str, path: str) -> str:
    # a class names its own group or field ("motion.alpha must be positive"); others are told where they stand
    first = message.split(" ")[0].strip(":")
    known = not path or "." in first or first in path.split(".")
    return " ".join(message.split()) if known else f"{path}: {' '.join(message.split())}"
