"""Trials of what a run promises, by number: tests make a few, `python -m benchmarks.soak` makes them all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime import checkpoint
from tests.processes import begin, end, together, train

# Seconds after which launchers and schedulers kill what they have asked to stop.
GRACE = 30.0
POINTS = ("latent", "log_prob", "video", "reward", "loss", "gradient")

# Every run of a trial: an update takes a fraction of a second.
RUN = ["reward=aesthetic", "rollout.frames=2", "saving.every=1"]


def weights(run_dir: Path) -> str:
    """Hash of the files of the newest checkpoint that hold tensors."""
    newest = checkpoint.latest(run_dir)
    assert newest is not None
    files = sorted(newest.glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def history(run_dir: Path) -> str:
    """Metrics without what a clock says."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return json.dumps([{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows])


def _save_for_ever(run_dir: Path) -> None:
    """Write checkpoint after checkpoint, each full of its own number, as fast as can be."""
    import torch

    first = max(checkpoint.complete_steps(run_dir), default=0) + 1
    for step in range(first, first + 10**6):
        values = {str(i): torch.full((64, 64), float(step)) for i in range(4)}
        checkpoint.save(run_dir, checkpoint.Snapshot(step, {}, {"weights": values, "optimizer": values}), keep=2)


def kills_while_saving(folder: Path, trials: int, seed: int = 0) -> dict[str, int]:
    """kill -9 at random instants of saving; each time the newest checkpoint must load and be whole."""
    rng, found = random.Random(seed), Counter[str]()
    for _ in range(trials):
        before = max(checkpoint.complete_steps(folder), default=0)
        (process,) = begin(1, _save_for_ever, folder)
        while max(checkpoint.complete_steps(folder), default=0) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        debris = len(list((folder / "checkpoints").glob("step_*"))) - len(checkpoint.complete_steps(folder))
        newest = checkpoint.latest(folder)
        assert newest is not None
        state = checkpoint.load(newest)
        assert all(t.eq(state.step).all() for part in state.tensors.values() for t in part.values())
        assert state.step > before
        found.update(loads=1, left_debris=int(debris > 0))
    return dict(found)


def kills_anywhere(
    model: Path, folder: Path, kills: int, *overrides: str, updates: int = 4, ranks: int = 1, seed: int = 0
) -> dict[str, float]:
    """kill -9 at random instants of a run, resumed until it ends; all it leaves must equal the quiet run's bytes.

    An instant is so long after the start, or after one of the saves: half of them each.
    """
    rng, done, runs, where = random.Random(seed), 0, 0, Counter[str]()
    options = [*RUN, f"updates={updates}", "evaluation.every=2", "optimizer.ema=0.5", "saving.keep=3", *overrides]
    together(ranks, train, model, folder / "quiet", *options)
    began = time.monotonic()  # of a run whose imports are done
    together(ranks, train, model, folder / "again", *options)
    took = time.monotonic() - began
    assert weights(folder / "again") == weights(folder / "quiet")
    while done < kills:
        run_dir = folder / f"run{runs}"
        while True:
            processes = begin(ranks, train, model, run_dir, *options, "resume=true")
            if done < kills:
                saved = rng.choice([0, rng.randrange(1, updates)])
                while max(checkpoint.complete_steps(run_dir), default=0) < saved and processes[0].is_alive():
                    time.sleep(0.01)
                processes[0].join(rng.uniform(0, took / updates if saved else took))
            if done == kills or processes[0].exitcode is not None:
                end(processes)
                break
            for process in processes:
                process.kill()
                process.join()
            done += 1
            steps = max(checkpoint.complete_steps(run_dir), default=0)
            where[f"killed with {steps} updates saved"] += 1
        assert weights(run_dir) == weights(folder / "quiet"), "weights, optimizer or averages differ"
        assert history(run_dir) == history(folder / "quiet"), "the reward history differs"
        shutil.rmtree(run_dir)
        runs += 1
    return {"kills": done, "runs": runs, **where}


DAMAGES = ("flip", "cut", "delete", "swap")


def corruptions(folder: Path, trials: int, seed: int = 0) -> dict[str, int]:
    """Damage a checkpoint at random; it must be refused, or hold exactly what was written."""
    import torch

    rng, found, originals = random.Random(seed), Counter[str](), []
    for step in (1, 2):
        values = {k: {"w": torch.full((16, 16), 1.0 + step + i)} for i, k in enumerate(("weights", "ema", "optimizer"))}
        written = checkpoint.write(folder / "original" / f"step_{step:06d}", checkpoint.Snapshot(step, {}, values))
        originals.append(written)
    truth = checkpoint.load(originals[1])
    for _ in range(trials):
        broken = folder / "broken" / originals[1].name
        shutil.copytree(originals[1], broken)
        damage = rng.choice(DAMAGES)
        _damage(damage, rng, broken, originals[0])
        try:
            state = checkpoint.load(broken)
            same = (state.step, state.config, state.counters) == (truth.step, truth.config, truth.counters)
            same = same and all(torch.equal(state.tensors[k]["w"], v["w"]) for k, v in truth.tensors.items())
            assert same, f"{damage}: loaded something else without a word"
            found["harmless"] += 1
        except (ValueError, FileNotFoundError):
            found[f"refused after {damage}"] += 1
        shutil.rmtree(broken)
    return dict(found)


def _damage(damage: str, rng: random.Random, folder: Path, other: Path) -> None:
    files = sorted(folder.iterdir())
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif damage == "delete":
        path.unlink()
    elif rng.random() < 0.5:  # with a file of the same checkpoint, or the same file of another
        second = rng.choice([p for p in files if p != path])
        one, two = path.read_bytes(), second.read_bytes()
        path.write_bytes(two)
        second.write_bytes(one)
    else:
        shutil.copy(other / path.name, path)
        for name in files if rng.random() < 0.3 else []:  # all of it: a whole checkpoint under a wrong name
            shutil.copy(other / name.name, name)


def terminations(
    model: Path,
    folder: Path,
    trials: int,
    ranks: int = 1,
    number: int = signal.SIGTERM,
    seed: int = 0,
    compiled: bool = False,
) -> dict[str, float]:
    """SIGTERM at random instants of a run that saves at no other time; what was logged must be saved.

    Args:
        compiled: the blocks are compiled anew at their first call, and the instants are those of the compilation.
    """
    rng, slowest, lost, saved = random.Random(seed), 0.0, 0, 0
    target, longest = (_compiling, 30.0) if compiled else (train, 4.0)
    options = [*RUN, "saving.every=1000", "updates=1000", "evaluation.every=3", "rollout.group_size=4"]
    for trial in range(trials):
        run_dir = folder / f"term{trial}"
        processes = begin(ranks, target, model, run_dir, *options)
        while not (run_dir / "config.yaml").is_file():  # before that there is nothing to lose
            assert any(p.is_alive() for p in processes)
            time.sleep(0.02)
        time.sleep(rng.uniform(0, longest))
        began = time.monotonic()
        os.kill(processes[rng.randrange(ranks)].pid or 0, number)
        end(processes)
        slowest = max(slowest, time.monotonic() - began)
        assert slowest < GRACE
        missing, step = unsaved(run_dir)
        lost, saved = lost + missing, saved + (step > 0)
        shutil.rmtree(run_dir)
    return {"trials": trials, "updates_lost": lost, "saved_something": saved, "slowest_seconds": round(slowest, 2)}


def unsaved(run_dir: Path, said: str = "") -> tuple[int, int]:
    """Updates that a stopped run logged and did not save, one at most, and the last that it saved.

    Args:
        run_dir: its folder.
        said: what it printed, shown where it lost more.
    """
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = max((row["step"] for row in rows if "reward" in row), default=0)
    step = max(checkpoint.complete_steps(run_dir), default=0)
    assert 0 <= logged - step <= 1, f"{logged} updates logged, {step} saved: {said}"
    return logged - step, step


def _compiling(model: Path, run_dir: Path, *overrides: str) -> None:
    """A run whose blocks are compiled at their first calls; nothing of an earlier compilation is used."""
    from runtime.session import Session

    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(run_dir / "compiled"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    made = Session._make_learner

    def compiled(self: Session) -> None:
        made(self)
        for block in self.episodes.networks.transformer.blocks:
            block.compile()

    Session._make_learner = compiled  # type: ignore[method-assign]
    train(model, run_dir, *overrides)


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


def disk(model: Path, folder: Path) -> dict[str, Any]:
    """A real full disk (a small file system in memory, which takes root): the run goes on, and saves once there is
    space again.
    """
    import subprocess

    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    try:
        run_dir, filler = folder / "run", folder / "filler"
        (process,) = begin(1, train, model, run_dir, *RUN, "updates=100000", "evaluation.every=2")
        while max(checkpoint.complete_steps(run_dir), default=0) < 2:
            time.sleep(0.05)
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"\0" * 4096)
                file.flush()
        before = max(checkpoint.complete_steps(run_dir))
        time.sleep(5)
        full = max(checkpoint.complete_steps(run_dir))
        newest = checkpoint.latest(run_dir)
        assert process.is_alive() and newest is not None and checkpoint.load(newest).step == full
        filler.unlink()
        time.sleep(3)
        process.terminate()
        end([process])
        after = max(checkpoint.complete_steps(run_dir))
        rows = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert after > full and sorted(set(rows)) == list(range(after + 1)), "a row was lost"
        return {"saved_before": before, "saved_while_full": full - before, "saved_after": after - full}
    finally:
        subprocess.run(["umount", str(folder)], check=False)
