"""Trials of what a run keeps, by number: tests make a few, `python -m benchmarks.soak` makes them all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime import checkpoint
from tests.processes import begin, end, together, train

# Seconds after which launchers and schedulers kill what they have asked to stop.
GRACE = 30.0
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

    def compiled(self: Session, learns: bool) -> None:
        made(self, learns)
        for block in self.episodes.networks.transformer.blocks:
            block.compile()

    Session._make_learner = compiled  # type: ignore[method-assign]
    train(model, run_dir, *overrides)


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
