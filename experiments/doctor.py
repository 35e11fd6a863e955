"""Will it run, does it fit, how long does it take: `python experiments/doctor.py [experiment] [overrides]`.

    python experiments/doctor.py                                          # the embedded default of grpo.py
    python experiments/doctor.py ppo algorithm.critic=net rollout.group_size=32
    python experiments/doctor.py model=wan2.1_1.3b --memory 80 --tflops 400 --processes 8

Checks packages, devices, the config, the run folder; estimates memory and seconds of an iteration (docs/doctor.md) and
names the two settings that would help most. Loads no weights. Exit code 1 where something will not work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException

from runtime import estimate, machine, schema
from runtime.cli import readable
from runtime.config import CONF, plain, validate
from runtime.explain import known_keys
from runtime.machine import Check, size
from runtime.overrides import check
from runtime.rules import split
from runtime.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.estimate import Workload

# Share of a product's speed that a whole iteration reaches, and of a device's memory that is worth a warning.
EFFICIENCY, NEARLY_FULL = 0.45, 0.85
TRAINED = ("gradients", "ZeRO's own copy", "optimizer", "averaged weights")
MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fails": "[red]fails[/]"}


def configured(
    experiment: str, overrides: list[str], folder: str | None, processes: int | None = None
) -> tuple[Settings | None, Check]:
    """Compose and validate; the settings where they could at least be built, and what to say."""
    where = [f"hydra.searchpath=[file://{Path(folder).resolve()}]"] if folder else []
    GlobalHydra.instance().clear()
    settings = None
    try:
        check(overrides)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(experiment, [*where, *overrides])
        settings = schema.build(Settings, plain(cfg))
        validate(cfg, experiment)
        if processes and settings.stage is None:
            split(settings.rollout.prompts, processes)
    except (HydraException, ValueError, OSError) as error:
        return settings, Check("config", readable(error, partial(known_keys, experiment, folder)), "fails")
    return settings, Check("config", f"conf/{experiment}.yaml {' '.join(overrides)} composes and is valid")


def needed(settings: Settings) -> frozenset[str]:
    """Extras that a config cannot do without. (Without wandb a run says so and goes on.)"""
    names = [f"{type(part).__module__}.{type(part).__name__}".lower() for part in vars(settings).values()]
    names += [name.lower() for name in settings.reward]
    words = {"deepspeed": "deepspeed", "remote": "remote", "cotracker": "tracker"}
    return frozenset(extra for word, extra in words.items() if any(word in name for name in names))


def devices(settings: Settings) -> Iterator[Check]:
    """The device of the config, and what else is here."""
    import torch

    from runtime.hardware import device_of

    cores = f"{torch.get_num_threads()} threads, {size(machine.cpu_memory())} of memory"
    yield Check("CPU", cores)
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        yield Check(f"cuda:{i}", f"{card.name}, {size(card.total_memory)}")
    try:
        yield Check("device", f"device={settings.device}: {device_of(settings.device)}")
    except ValueError as error:
        yield Check("device", str(error), "fails")


def fits(work: Workload, libraries: float, memory: float) -> Check:
    """Whether the peak is below what the device has."""
    peak = estimate.peak_bytes(work, libraries)
    text = f"estimated peak {size(peak)} of {size(memory)}"
    if peak > memory:
        return Check("memory", f"{text}: will not fit", "fails")
    return Check("memory", text, "note" if peak > NEARLY_FULL * memory else "ok")


def measured(settings: Settings, options: argparse.Namespace, console: Console) -> Iterator[Check]:
    """Estimate memory, time and disk of a config; print the tables on the way."""
    import torch

    from runtime import workload

    # A device that is described by its numbers is an accelerator, whatever stands here.
    kind = "cuda" if options.memory or options.tflops else workload.device_kind(settings.device)
    here = kind if kind == "cpu" or torch.cuda.is_available() else "cpu"
    work = workload.workload(settings, options.processes, kind)
    libraries = estimate.LIBRARIES["cpu" if kind == "cpu" else "cuda"]
    memory = options.memory * 1e9 if options.memory else memory_of(here)
    rate = options.tflops * 1e12 if options.tflops else workload.measured_rate(work, here)
    seconds = estimate.seconds(work, EFFICIENCY * rate)
    console.print(memory_table(work, libraries), time_table(work, seconds, rate, settings.updates))
    yield fits(work, libraries, memory)
    if workload.encoder_elsewhere(settings, kind):
        encoder, room = workload.encoder_bytes(settings.model), machine.cpu_memory()
        text = f"{size(encoder)} on the CPU, which has {size(room)}"
        yield Check("text encoder", text, "fails" if encoder > room else "ok")
    best = estimate.advice(work, libraries)
    yield Check("helps most", "; ".join(f"{a.setting}: peak {size(a.peak)}" for a in best) or "nothing that is known")
    folder = Path(settings.run_dir or "outputs")
    state = 4 * work.trainable * (1 + estimate.MOMENTS + work.averaged)
    yield machine.run_folder(folder, state, settings.saving.keep + 1)


def memory_of(kind: str) -> float:
    """Bytes of the first device of a kind."""
    import torch

    cuda = kind == "cuda"
    return float(torch.cuda.get_device_properties(0).total_memory if cuda else machine.cpu_memory())


def memory_table(work: Workload, libraries: float) -> object:
    """What stands, and what comes and goes, with the phase that peaks."""
    from rich.table import Table

    table = Table("memory of an iteration, per process", "", "", title_justify="left")
    table.add_row("libraries", size(libraries), "about")
    for name, count in estimate.standing(work).items():
        shown = f"{count_of(work, name)}"
        table.add_row(name, size(count), shown)
    table.add_section()
    peaks = {phase: sum(rows.values()) for phase, rows in estimate.phases(work).items()}
    for phase, rows in estimate.phases(work).items():
        mark = " <- peak" if peaks[phase] == max(peaks.values()) else ""
        parts = ", ".join(f"{name} {size(count)}" for name, count in rows.items())
        table.add_row(f"while: {phase}", size(peaks[phase]) + mark, parts)
    table.add_section()
    table.add_row("peak", size(estimate.peak_bytes(work, libraries)), "estimated; activations and decoder about")
    return table


def count_of(work: Workload, name: str) -> str:
    """How many numbers a row stands for."""
    if name in ("weights", "initial policy"):
        return f"{work.parameters / 1e6:.2f} M parameters"
    return f"{work.trainable / 1e6:.2f} M train" if name in TRAINED else ""


def time_table(work: Workload, seconds: dict[str, float], rate: float, updates: int) -> object:
    """Seconds by phase, and of the run."""
    from rich.table import Table

    table = Table("seconds of an iteration", "about", f"at {EFFICIENCY:g} x {rate / 1e12:.3g} TFLOP/s")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.3g}", "")
    total = sum(seconds.values())
    clips = f"{work.samples} clips of {work.frames} latent frames, {work.tokens} tokens each"
    table.add_row("all", f"{total:.3g}", clips)
    table.add_row(f"{updates} updates", f"{total * updates / 3600:.3g} h", "without evaluations and rewards")
    return table


def checks(options: argparse.Namespace, overrides: list[str], console: Console) -> Iterator[Check]:
    """Everything that is looked at, in order; estimates print their tables on the way."""
    settings, verdict = configured(options.experiment, overrides, options.config_dir, options.processes)
    yield from machine.packages(needed(settings) if settings is not None else frozenset())
    yield verdict
    if settings is None:
        return
    yield from devices(settings)
    if settings.stage is not None:
        yield Check("estimate", "none for supervised training: it counts iterations of reinforcement learning", "note")
        return
    try:
        yield from measured(settings, options, console)
    except (ValueError, OSError) as error:
        yield Check("estimate", str(error), "fails")


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and overrides for Hydra."""
    names = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "config")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help=f"an experiment ({', '.join(names)}), then its overrides")
    parser.add_argument("--memory", type=float, help="GB of a device that is not here")
    parser.add_argument("--tflops", type=float, help="TFLOP/s of a device that is not here (its data sheet's number)")
    parser.add_argument("--processes", type=int, help="ranks that share the work")
    parser.add_argument("--config-dir", "-cd", help="a folder with choices of your own (CONTRIBUTING.md)")
    options = parser.parse_intermixed_args(argv)
    for name in ("memory", "tflops", "processes"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name} must be positive")
    overrides = options.overrides
    options.experiment = overrides.pop(0) if overrides and overrides[0] in names else "grpo"
    if options.config_dir is not None:
        sys.path.append(str(Path(options.config_dir).resolve()))
    return options, overrides


def main(argv: list[str] | None = None) -> int:
    """Print what was found; return the exit code."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    options, overrides = arguments(sys.argv[1:] if argv is None else argv)
    console = Console()
    found = list(checks(options, overrides, console))
    table = Table("", "checked", "found")
    for row in found:
        table.add_row(MARKS[row.verdict], row.what, escape(row.found))
    console.print(table)
    broken = [row for row in found if row.verdict == "fails"]
    console.print(f"[red]{len(broken)} of these will not work[/]" if broken else "[green]this will run[/]")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
