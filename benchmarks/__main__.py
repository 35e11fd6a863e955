"""`make bench`: `python -m benchmarks [--only live,overhead] [--iterations 5] [--repeats 3] [--batches 1,4,16,64] ...`.

Other arguments are overrides as for `experiments/grpo.py`, such as `device=cuda model=wan2.1_1.3b model.random=true`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from runtime import cli
from runtime.config import Plan

PARTS = ["rescoring", "rollout", "generation", "live", "overhead", "iteration"]
COMPILE = ("none", "default", "reduce-overhead", "max-autotune")
RESULTS = Path(__file__).resolve().parent / "results"


def run(plan: Plan, options: argparse.Namespace) -> None:
    """Measure everything, print it, and write it as JSON."""
    from rich.console import Console

    from benchmarks.report import show
    from runtime.session import Session

    console = Console()
    # Held-out clips are not measured; a session wants some.
    settings = replace(plan.settings, evaluation=replace(plan.settings.evaluation, clips=2))
    with cli.setup_phase():
        session = Session(settings, plan.config)
    result = measurements(session, options, console)
    show(console, result)
    path = RESULTS / f"{options.name}.json" if options.name else session.run_dir / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"overrides": sys.argv[1:], **result}, indent=1) + "\n")
    console.print(f"written to {path}", soft_wrap=True)


def measurements(session: Any, options: argparse.Namespace, console: Any) -> dict[str, Any]:
    """The chosen measurements of a session, by title."""
    from benchmarks.live import facts
    from benchmarks.measure import conditions

    result: dict[str, Any] = {"conditions": {**conditions(session), **facts(session), "medians of": options.repeats}}
    for name, measure in parts(session, options).items():
        if name in options.only:
            with console.status(name):
                result |= measure()
    return result


def parts(session: Any, options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """What can be measured, by the names that `--only` knows; the iteration comes last, for it changes the weights."""
    from benchmarks import iteration, live, overhead, policy

    batches, repeats = options.batches, options.repeats
    ends = sorted({batches[0], batches[-1]})
    frames = session.settings.rollout.frames
    scoring = f"re-scoring {frames} frames: one parallel pass against replay"
    rebuilding = "rollout: cached against rebuilding the history at every step"
    update = f"iteration, median of {options.iterations}"
    return {
        "rescoring": lambda: {scoring: policy.rescoring(session, batches, repeats)},
        "rollout": lambda: {rebuilding: policy.caching(session, ends, repeats)},
        "generation": lambda: {"generation": policy.generating(session, ends, repeats)},
        "live": lambda: live.measure(session, options.samples, options.compile),
        "overhead": lambda: {f"{frames} frames, batch 1, against diffusers": overhead.overhead(session, repeats)},
        "iteration": lambda: {update: iteration.phases(session, options.iterations, options.peak_tflops)},
    }


def main() -> None:
    """Parse the options; the rest goes to Hydra."""
    parser = argparse.ArgumentParser("python -m benchmarks", add_help=False, allow_abbrev=False)
    parser.add_argument("--iterations", type=int, default=5, help="updates that are timed, after one more")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of every other measurement")
    parser.add_argument("--batches", type=_sizes, default=[1, 4, 16, 64], help="batch sizes, such as 1,64")
    parser.add_argument("--only", type=_names, default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--samples", type=int, default=20, help="repeats of latencies, whose percentiles are given")
    parser.add_argument("--compile", default="none", help="of live generation: none or a mode of torch.compile")
    parser.add_argument("--peak-tflops", type=float, help="of the device; default: the maker's where it is known")
    parser.add_argument("--name", help="write benchmarks/results/NAME.json, not the run's folder")
    options, rest = parser.parse_known_args()
    if min(options.iterations, options.repeats, options.samples) < 1:
        parser.error("--iterations, --repeats and --samples must be at least 1")
    if options.compile not in COMPILE:
        parser.error(f"--compile must be one of {', '.join(COMPILE)}, got {options.compile!r}")
    if options.name is not None and not re.fullmatch(r"[\w-][\w.-]*", options.name):
        parser.error(f"--name must be a plain file name, got {options.name!r}")
    if {"-h", "--help"} & set(rest):
        parser.print_help()
    if not any(text.startswith("run_dir=") for text in rest):
        rest.append(f"run_dir=outputs/benchmarks/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    sys.argv[1:] = rest
    cli.main("grpo", partial(run, options=options))


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"choose some of {','.join(PARTS)}")
    return names


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError("batch sizes must be at least 1")
    return sorted(set(sizes))


if __name__ == "__main__":
    main()
