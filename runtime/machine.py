"""What this machine has: packages, devices, memory, disk. Each check is a row with a verdict."""

from __future__ import annotations

import os
import platform
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from runtime.models import ROOT

Verdict = Literal["ok", "note", "fails"]
EXTRAS = {
    "wandb": "logger=wandb: metrics to Weights & Biases",
    "deepspeed": "engine=deepspeed_*: optimizer, gradients and weights split over processes",
    "tracker": "tracker=cotracker3: CoTracker3 finds the motion",
    "remote": "reward=remote and experiments/serve.py",
    "dev": "tests and linters",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, what was found, and how to mend it."""

    what: str
    found: str
    verdict: Verdict = "ok"


def declared() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Requirements of the project, and of each of its extras: from pyproject.toml, or as it was installed."""
    path = ROOT / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text())["project"]
        extras = {name: [Requirement(r) for r in rows] for name, rows in project["optional-dependencies"].items()}
        return [Requirement(r) for r in project["dependencies"]], extras
    found = [Requirement(text) for text in requires("ardrag") or []]
    extras = {name: [r for r in found if r.marker and r.marker.evaluate({"extra": name})] for name in EXTRAS}
    return [r for r in found if not (r.marker and "extra" in str(r.marker))], extras


def problem(requirement: Requirement) -> str:
    """Why a requirement is not met; empty where it is."""
    try:
        here = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier and not requirement.specifier.contains(here, prereleases=True):
        return f"{requirement.name} is {here}, needed {requirement.specifier}"
    return ""


def packages(needed: frozenset[str] = frozenset()) -> Iterator[Check]:
    """Python, required packages, and the extras.

    Args:
        needed: extras that the config cannot do without.
    """
    three = tuple(map(int, platform.python_version_tuple()[:2]))
    yield Check("Python", platform.python_version(), "ok" if three >= (3, 11) else "fails")
    required, extras = declared()
    broken = [text for text in map(problem, required) if text]
    here = f"{len(required)} required packages in range"
    yield Check("packages", "; ".join(broken) or here, "fails" if broken else "ok")
    for name, purpose in EXTRAS.items():
        missing = [text for r in extras.get(name, []) if r.name != "ardrag" and (text := problem(r))]
        if not missing:
            yield Check(f"extra {name}", f"installed; {purpose}")
            continue
        verdict: Verdict = "fails" if name in needed else "note"
        yield Check(f"extra {name}", f"{'; '.join(missing)}: pip install -e '.[{name}]' for {purpose}", verdict)


def cpu_memory() -> int:
    """Bytes of memory that this process may use: of the machine, or of its control group."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            whole = min(whole, int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return whole


def nearest(folder: Path) -> Path:
    """The folder, or its closest parent that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def run_folder(folder: Path, checkpoint: float, kept: int) -> Check:
    """Whether a run can write there, and whether its checkpoints fit on the disk.

    Args:
        folder: of the run, or the one it will be made in.
        checkpoint: bytes of one.
        kept: how many stay, one that is being written included.
    """
    base = nearest(folder)
    if not (base.is_dir() and os.access(base, os.W_OK | os.X_OK)):
        return Check("run folder", f"{base} cannot be written; choose another run_dir", "fails")
    free = shutil.disk_usage(base).free
    text = f"{free / 1e9:.1f} GB free at {base}; {kept} checkpoints of {size(checkpoint)}"
    if free < checkpoint * kept:
        return Check(
            "run folder", f"{text} do not fit; free space, lower saving.keep or choose another run_dir", "fails"
        )
    return Check("run folder", text, "note" if free < 2 * checkpoint * kept else "ok")


def size(count: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.{1 if count >= 10 * factor else 2}f} {unit}"
    return f"{count / 1e3:.0f} kB"
