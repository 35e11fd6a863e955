"""Trials of what updates compute under faults and engines: tests make a few, `python -m benchmarks.soak` all."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime import checkpoint
from tests.processes import begin, together, train
from tests.trials import RUN

POINTS = ("latent", "log_prob", "video", "reward", "loss", "gradient")


def _spoiled(model: Path, run_dir: Path, point: str, rank: int, iteration: int, *overrides: str) -> None:
    """A run in which something is not finite, which notes the weights of every process."""
    from runtime.session import Session
    from tests.faulty import spoil

    spoil(point, rank, iteration)
    skip = Session.skip

    def noted(self: Session, found: Any) -> Any:
        before = _digest(self)
        metrics = skip(self, found)
        assert _digest(self) == before
        (run_dir / f"digest{self.team.rank}").write_text(f"{found.point} {before}")
        return metrics

    Session.skip = noted  # type: ignore[method-assign]
    train(model, run_dir, *overrides)


def _digest(session: Any) -> str:
    from runtime.state import tensors_of

    common, own = tensors_of(session)
    digest = hashlib.sha256()
    for part in (common["weights"], common.get("critic", {}), {**common, **own}["optimizer"] if not own else {}):
        for key in sorted(part):
            digest.update(key.encode() + part[key].detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def injection(model: Path, folder: Path, point: str, *overrides: str, ranks: int = 2, iteration: int = 1) -> Path:
    """Something not finite on the last of some processes, in one update: all leave it out, weights as they were.

    Returns:
        The run's folder.
    """
    run_dir, last = folder / point, ranks - 1
    run_dir.mkdir(parents=True)
    fault = ["algorithm._target_=tests.faulty.FaultyGRPO", f"+algorithm.where={point}", "+algorithm.prompt=1"]
    fault = [*fault, f"+algorithm.iteration={iteration}"] if point in ("loss", "gradient") else []
    options = [*RUN, "updates=3", "saving.keep=5", *fault, *overrides]
    together(ranks, _spoiled, model, run_dir, point, last, iteration, *options)
    digests = {(run_dir / f"digest{rank}").read_text() for rank in range(ranks)}
    assert len(digests) == 1 and digests.pop().split()[0] == point
    saved = [run_dir / "checkpoints" / f"step_{n:06d}" for n in (iteration, iteration + 1)]
    steps = [checkpoint.load(path).tensors["weights"] for path in saved]
    assert all(steps[0][k].numpy().tobytes() == steps[1][k].numpy().tobytes() for k in steps[0])
    return run_dir


def growth(model: Path, folder: Path, updates: int, warmup: int, percent: float = 2.0) -> dict[str, float]:
    """Memory, file descriptors and threads of a run after `warmup` updates and at its end: as many, and no more than
    `percent` more memory.
    """
    together(1, _watched, model, folder, updates, warmup)
    first, last = json.loads((folder / "growth.json").read_text())
    counts = {f"{k}_{when}": row[k] for k in ("descriptors", "threads") for when, row in (("0", first), ("1", last))}
    grown = 100 * (last["rss"] / first["rss"] - 1)
    assert grown < percent and all(first[k] == last[k] for k in ("descriptors", "threads")), (first, last)
    return {"memory_growth_percent": round(grown, 3), **counts}


def _watched(model: Path, run_dir: Path, updates: int, warmup: int) -> None:
    import gc

    from runtime.session import Session

    rows: list[dict[str, int]] = []
    after = Session._end_update

    def measured(self: Session) -> None:
        after(self)
        if self.iteration in (warmup, updates):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            counts = [len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("fd", "task")]
            rows.append({"rss": pages * 4096, "descriptors": counts[0], "threads": counts[1]})

    Session._end_update = measured  # type: ignore[method-assign]
    train(model, run_dir, *RUN, f"updates={updates}", "saving.every=20", "evaluation.every=50")
    (run_dir / "growth.json").write_text(json.dumps(rows))


def soak(
    model: Path, folder: Path, seconds: float, every: float, report: Callable[[str], None], seed: int = 0
) -> dict[str, Any]:
    """A run with a random fault every so often, beside a quiet one: each update's weights must be the quiet one's."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, faults, flags = random.Random(seed), Counter[str](), {k: folder / f"{k}.flag" for k in ("outage", "disk")}
    outage = ["reward.aesthetic._target_=tests.faulty.OutAtTimes", "scoring.on_failure=stop"]
    options = [*RUN, *outage, "updates=1000000", "evaluation.every=0", "saving.every=3"]
    where = "+reward.aesthetic.outage={}"  # the quiet run looks for a file that never comes
    (quiet,) = begin(1, _hashed, model, folder / "quiet", None, 0.5, *options, where.format(folder / "never"))
    options = [*options, where.format(flags["outage"])]
    ends = time.monotonic() + seconds
    process: Any = None
    expected: int | None = 0
    while time.monotonic() < ends:
        if process is None or not process.is_alive():
            assert process is None or process.exitcode == expected, (process.exitcode, expected)
            faults["starts"] += 1
            (process,) = begin(1, _hashed, model, folder / "run", flags["disk"], 0.3, *options, "resume=true")
        fault = rng.choice(["kill", "terminate", "outage", "disk"])
        _wait(min(every, ends - time.monotonic()), process)
        assert process.is_alive(), process.exitcode
        faults[fault] += 1
        expected = {"kill": -9, "terminate": 0, "outage": 1, "disk": None}[fault]
        if fault == "kill":
            process.kill()
            process.join()
        elif fault == "terminate":
            process.terminate()
            process.join(60)
        else:  # for a while; the disk's fault does not end the run, the reward's does
            flags[fault].touch()
            _wait(5, process)
            flags[fault].unlink()
    assert quiet.is_alive()
    _stopped(process)
    _stopped(quiet)
    rows = [
        dict(line.split() for line in (folder / name / "hashes").read_text().splitlines()) for name in ("quiet", "run")
    ]
    both = rows[0].keys() & rows[1].keys()
    assert all(rows[0][k] == rows[1][k] for k in both) and len(both) > 1
    report(f"updates: quiet {len(rows[0])}, with faults {len(rows[1])}")
    return {**faults, "updates_compared": len(both), "different": 0}


def _wait(seconds: float, process: Any) -> None:
    process.join(max(0.0, seconds))


def _stopped(process: Any) -> None:
    if process is not None and process.is_alive():
        process.terminate()
        process.join(60)


def _hashed(model: Path, run_dir: Path, disk: Path | None, pause: float, *overrides: str) -> None:
    """A run that notes a hash of its weights after every update."""
    from runtime.session import Session
    from tests.faulty import full_disk

    if disk is not None:
        full_disk(disk)
    after = Session._end_update
    run_dir.mkdir(parents=True, exist_ok=True)

    def noted(self: Session) -> None:
        after(self)
        time.sleep(pause)
        with (run_dir / "hashes").open("a") as file:
            file.write(f"{self.iteration} {_digest(self)}\n")

    Session._end_update = noted  # type: ignore[method-assign]
    train(model, run_dir, *overrides)


def distance(run_dir: Path, other: Path, step: int) -> float:
    """Distance of a run's weights after some updates from another run's, relative to the norm of these."""
    import torch

    ours, theirs = (
        checkpoint.load(folder / "checkpoints" / f"step_{step:06d}").tensors["weights"] for folder in (run_dir, other)
    )
    gap = torch.stack([(ours[k] - v).square().sum() for k, v in theirs.items()]).sum().sqrt()
    return float(gap / torch.stack([v.square().sum() for v in theirs.values()]).sum().sqrt())


ENGINES = {
    "plain": (1,),
    "two-processes": (2,),
    "accumulation-8x1": (1, "engine.accumulation=8"),
    "ZeRO-1": (2, "engine=deepspeed_z1"),
    "ZeRO-2": (2, "engine=deepspeed_z2"),
    "ZeRO-3-accumulation-2": (2, "engine=deepspeed_z3", "engine.accumulation=2"),
    "ZeRO-2-offloaded": (2, "engine=deepspeed_z2", "engine.offload=optimizer"),
    "ZeRO-3-offloaded": (2, "engine=deepspeed_z3", "engine.offload=parameters"),
}


def engines(model: Path, folder: Path, updates: int, *overrides: str) -> dict[str, float]:
    """The same run under every engine: distance of the weights from the plain one's, relative to their norm."""
    sizes = ["rollout.prompts=4", "rollout.group_size=4", "algorithm.minibatches=1"]  # an update is one optimizer step
    options = ["reward=aesthetic", *sizes, f"updates={updates}", *overrides]
    found, steps = {}, sorted({1, updates})
    for name, (ranks, *engine) in ENGINES.items():
        keep = ["saving.every=1", f"saving.keep={updates}"]
        together(int(ranks), train, model, folder / name, *options, *keep, *map(str, engine))
        for step in steps:
            found[f"{name} after {step}"] = float(f"{distance(folder / name, folder / 'plain', step):.2e}")
    assert max(found.values()) <= 1e-6, found
    return found


def injected(model: Path, folder: Path, point: str, *overrides: str) -> str:
    """`injection`, then the replay of its bundle, which must find it again."""
    run_dir = injection(model, folder, point, *overrides)
    bundle = run_dir / "replay" / "step_000001"
    together(1, replayed, bundle, point)
    if point in ("loss", "gradient"):  # of the algorithm itself
        return "weights unchanged in both processes, reproduced"
    together(1, replayed, bundle, "", 1)
    return "weights unchanged in both processes, reproduced; not where the fault is gone"


def replayed(bundle: Path, point: str = "", code: int = 0) -> None:
    """The replay of a bundle; its exit code must be `code`. For `begin`.

    Args:
        bundle: its folder.
        point: where the fault of the run is there again, as one that follows from weights and draws would be.
        code: 0 where something must be found again, 1 where nothing may be.
    """
    import sys

    from experiments.replay import Replay
    from runtime.cli import main
    from tests.faulty import spoil

    if point:
        spoil(point, 0, int(bundle.name.rpartition("_")[2]))
    replay = Replay()
    sys.argv = ["replay.py", f"checkpoint={bundle}", f"run_dir={bundle.parent / 'looked_at'}"]
    try:
        main("replay", replay.run, replay.prepare)
    except SystemExit as left:
        assert (left.code or 0) == code, left.code
    else:
        assert code == 0
