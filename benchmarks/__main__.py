"""`make bench`: `python -m benchmarks [--iterations 5] [--repeats 3] [--batches 1,4,16,64] [--name NAME]`.

Other arguments are overrides as for `experiments/grpo.py`, such as `device=cuda engine.threads=1`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from runtime import cli
from runtime.config import Plan

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
    """All measurements of a session, by title."""
    from benchmarks import iteration, policy
    from benchmarks.measure import conditions

    batches, repeats = options.batches, options.repeats
    ends = sorted({batches[0], batches[-1]})
    frames = session.settings.rollout.frames
    result: dict[str, Any] = {"conditions": {**conditions(session), "medians of": repeats}}
    with console.status("re-scoring"):
        title = f"re-scoring {frames} frames: one parallel pass against replay"
        result[title] = policy.rescoring(session, batches, repeats)
    with console.status("rollout"):
        title = "rollout: cached against rebuilding the history at every step"
        result[title] = policy.caching(session, ends, repeats)
    with console.status("generation"):
        result["generation"] = policy.generating(session, ends, repeats)
        result["first frame, batch 1"] = policy.first_frame(session, repeats)
    # Last, because it changes the weights.
    result[f"iteration, median of {options.iterations}"] = iteration.phases(session, options.iterations)
    return result


def main() -> None:
    """Parse the options; the rest goes to Hydra."""
    parser = argparse.ArgumentParser("python -m benchmarks", add_help=False, allow_abbrev=False)
    parser.add_argument("--iterations", type=int, default=5, help="updates that are timed, after one more")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of every other measurement")
    parser.add_argument("--batches", type=_sizes, default=[1, 4, 16, 64], help="batch sizes, such as 1,64")
    parser.add_argument("--name", help="write benchmarks/results/NAME.json, not the run's folder")
    options, rest = parser.parse_known_args()
    if min(options.iterations, options.repeats) < 1:
        parser.error("--iterations and --repeats must be at least 1")
    if options.name is not None and not re.fullmatch(r"[\w-][\w.-]*", options.name):
        parser.error(f"--name must be a plain file name, got {options.name!r}")
    if {"-h", "--help"} & set(rest):
        parser.print_help()
    if not any(text.startswith("run_dir=") for text in rest):
        rest.append(f"run_dir=outputs/benchmarks/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    sys.argv[1:] = rest
    cli.main("grpo", partial(run, options=options))


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError("batch sizes must be at least 1")
    return sorted(set(sizes))


if __name__ == "__main__":
    main()
