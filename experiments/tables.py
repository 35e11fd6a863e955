"""The paper's Tables 2 and 3 and Figure 6 on the embedded world: `python experiments/tables.py` (`make tables`).

Every row is measured by `evaluate.py` on the benchmark of 206 clips, 4 times as long for Table 3 (where a cache of 7
latent frames is shorter than a clip). What a row needs is taken from the cells of `learn.py` (GRPO on the shipped
student) and of `ablation_step1.py` (students distilled another way) and trained there where it is missing; a student
that was not made by the shipped chain first sees weak tracks as the shipped one does, then GRPO. `--rows` names some
rows only, such as `--rows no_rl,initial,teacher`, which need no training. Interrupt it at will: it goes on where it
stopped. The result is `docs/results/tables.jsonl`, `tables.md` and, where there are GRPO runs, `tables.png`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from experiments import ablation_step1, learn
from runtime.cells import (
    FRAMES,
    RESULTS,
    ROOT,
    Cell,
    Row,
    arguments,
    arms_of,
    evaluated,
    figure,
    many_steps,
    markdown,
    plot_ranges,
    publish,
    run,
    run_all,
    spread,
    weights_of,
)
from runtime.models import Pretrained
from runtime.runlog import read as read_log

METRICS = ("frechet", "frechet_video", "aesthetic", "smoothness", "motion_consistency", "motion_error_px")
HEADS = ("first frame, s", "FID", "FVD", "aesthetic", "smoothness", "motion consistency", "ObjMC, px")
# row: (title, the paper's latency, FID, FVD, aesthetic, smoothness, motion consistency)
TABLE2 = {
    "full": ("full", ".44", "28.98", "187.49", "4.07", ".9948", "4.37"),
    "no_rl": ("without RL", ".44", "31.65", "210.35", "3.92", ".9926", "4.12"),
    "initial": ("initial model", "45.72", "35.94", "303.16", "3.84", ".9915", "3.22"),
    "teacher": ("teacher", "45.64", "29.38", "151.46", "4.15", ".9941", "4.36"),
    "no_self_rollout": ("without Self-Rollout", ".44", "38.13", "353.75", "3.38", ".9904", "4.02"),
}
TABLE3 = {
    "cache7": ("chunk 1, cache 7", ".44", "28.98", "187.49", "4.07", ".9948", "4.37"),
    "chunk3": ("chunk 3", ".94", "27.47", "179.23", "4.09", ".9945", "4.37"),
    "cache15": ("cache 15", ".44", "28.96", "188.08", "4.07", ".9946", "4.34"),
    "cache25": ("cache 25", ".46", "28.99", "185.31", "4.05", ".9948", "4.39"),
}
LONG = f"rollout.frames={4 * FRAMES}"
# row: arm of ablation_step1.py, and whether its weak tracks come with the student's own history.
STUDENTS = {"no_self_rollout": ("teacher_forcing", False), "chunk3": ("self_rollout_chunk3", True)}
# The last stage of the shipped chain (algorithms/pretraining/chain.py), with own or with true history.
WEAK = (
    "stage.from_teacher=false",
    "stage.eta=0",
    "stage.track_noise=4",
    "stage.match=false",
    *(f"stage.{name}.{key}" for name in ("own_history", "teacher_forcing") for key in ("lr=2e-3", "ema=0.995")),
)


def evaluation(row: str, seed: int, policy: tuple[str, ...], clips: int) -> Cell:
    """The cell that measures a row's policy."""
    shared = ("evaluation.split=benchmark", f"evaluation.clips={clips}", "evaluation.every=0", "logger=local")
    longer = (LONG,) if row in TABLE3 else ()
    cache = (f"rollout.window={row.removeprefix('cache')}",) if row in ("cache15", "cache25") else ()
    return Cell(row, seed, "evaluate.py", (*shared, *policy, *longer, *cache))


class Sources:
    """Finds or trains what the rows measure.

    Args:
        learned: folder of the cells of `learn.py`.
        where: folder of the cells of `ablation_step1.py`.
        out: folder of this script's own cells.
        updates: of GRPO.
        steps: of the last stage of students that were not made by the shipped chain.
    """

    def __init__(self, learned: Path, where: Path, out: Path, updates: int, steps: int) -> None:
        self.learned, self.where, self.out = learned, where, out
        self.updates, self.steps = updates, steps
        self.weights = weights_of(ROOT / "assets" / "tiny")

    def full(self, seed: int) -> tuple[str, ...]:
        """GRPO on the shipped student."""
        cell = next(c for c in learn.cells(seed + 1, self.updates, 128) if (c.arm, c.seed) == ("grpo", seed))
        run(cell, self.learned, 1, self.weights)
        return (self._checkpoint(self.learned / cell.name),)

    def student(self, row: str, seed: int) -> tuple[str, ...]:
        """A student distilled another way, then adapted to weak tracks, then GRPO."""
        arm, own = STUDENTS[row]
        students = ablation_step1.cells(seed + 1, 64, "initial", "teacher", [])
        step1 = next(c for c in students if (c.arm, c.seed) == (arm, seed))
        parts = (*ablation_step1.JUDGES, "initial", "teacher")
        run(step1, self.where, 1, " ".join(weights_of(Pretrained("assets/tiny", transformer=p).network) for p in parts))
        chunk = ("rollout.chunk=3",) if row == "chunk3" else ()
        shared = ("evaluation.every=0", "logger=local", f"seed={seed}", "resume=true", *chunk)
        steps = {True: "own_history", False: "teacher_forcing"}
        length = [f"stage.{name}.steps={self.steps if kind is own else 0}" for kind, name in steps.items()]
        start = f"model.transformer={self.where / step1.name / 'transformer'}"
        weak = Cell(f"{row}_weak", seed, "distill.py", (*shared, *WEAK, *length, start))
        run(weak, self.out, 1, self.weights)
        start = f"model.transformer={self.out / weak.name / 'transformer'}"
        grpo = Cell(f"{row}_grpo", seed, "grpo.py", (*shared, f"updates={self.updates}", "saving.every=10", start))
        run(grpo, self.out, 1, self.weights)
        return (self._checkpoint(self.out / grpo.name),)

    def policy(self, row: str, seed: int) -> tuple[str, ...]:
        """Overrides of `evaluate.py` that name a row's policy."""
        fixed = {"no_rl": (), "initial": many_steps("initial"), "teacher": many_steps("teacher")}
        if row in fixed:
            return fixed[row]
        return self.student(row, seed) if row in STUDENTS else self.full(seed)

    def _checkpoint(self, folder: Path) -> str:
        path = folder / "checkpoints" / f"step_{self.updates:06d}"
        if not path.is_dir():
            raise RuntimeError(f"{folder} is finished but holds no {path.name}; remove {folder} to train it again")
        return f"checkpoint={path}"


def seeds_of(row: str, seeds: int) -> range:
    """The shipped models have no seeds of their own."""
    return range(1 if row in ("no_rl", "initial", "teacher") else seeds)


def measured(folder: Path) -> Row:
    """What an evaluation left, with its intervals and its speed."""
    found = json.loads((folder / "evaluation.json").read_text())
    return {**evaluated(folder), "intervals": found["intervals"], "speed": found["speed"]}


def table(rows: list[Row], titles: Mapping[str, tuple[str, ...]]) -> str:
    """Markdown: two lines per row, ours (mean ± standard deviation over seeds, else ± half a 95 % interval over clips)
    and the paper's.
    """
    lines = []
    arms = arms_of(rows)
    for row, (title, *paper) in titles.items():
        if row in arms:
            members = arms[row]
            busy = any(m["speed"].get("load", math.inf) > m["speed"].get("cores", 0) for m in members)
            latency = spread([m["speed"]["latency_s"] for m in members]) + " †" * busy
            lines.append([title, str(len(members)), latency, *(_cell(members, key) for key in METRICS)])
            lines.append(["&emsp;the paper", "", *paper, ""])
    return markdown(["", "seeds", *HEADS], lines) if lines else ""


def _cell(members: list[Row], key: str) -> str:
    if len(members) > 1:
        return spread([m["intervals"][key]["value"] for m in members])
    known = members[0]["intervals"][key]
    return (
        f"{known['value']:.4f} ± {known['half']:.4f}"
        if key == "smoothness"
        else (f"{known['value']:.3f} ± {known['half']:.3f}")
    )


def draw(folders: list[Path], path: Path) -> None:
    """Plot both rewards over the updates of GRPO: mean over seeds, and their range."""
    page, axes = figure(2, width=10, height=4)
    for panel, term in zip(axes, ("motion", "aesthetic"), strict=True):
        logs = [[r[f"reward_terms/{term}"] for r in read_log(f) if f"reward_terms/{term}" in r] for f in folders]
        length = min(map(len, logs))
        plot_ranges(panel, {"grpo": (range(1, length + 1), [log[:length] for log in logs])})
        panel.set(xlabel="update", ylabel=f"reward term {term}, unweighted")
    page.savefig(path, dpi=120)


def main() -> None:
    """Train and measure what is missing; write tables and figure."""
    parser = arguments(__doc__ or "", "outputs/tables", clips=206)
    rows = [*TABLE2, *TABLE3]
    parser.add_argument("--rows", default=",".join(rows), help="rows to measure, such as no_rl,initial,teacher")
    parser.add_argument("--updates", type=int, default=200, help="GRPO updates")
    parser.add_argument("--steps", type=int, default=300, help="steps on weak tracks of other students")
    parser.add_argument("--learn", type=Path, default=Path("outputs/learn"), help="cells of learn.py")
    parser.add_argument("--step1", type=Path, default=Path("outputs/step1"), help="cells of ablation_step1.py")
    options = parser.parse_args()
    chosen = options.rows.split(",")
    unknown = [row for row in chosen if row not in rows]
    if unknown:
        parser.error(f"--rows: {unknown[0]} is none of {', '.join(rows)}")
    sources = Sources(options.learn, options.step1, options.out, options.updates, options.steps)
    wanted = [(row, seed) for row in chosen for seed in seeds_of(row, options.seeds)]
    todo = [evaluation(row, seed, sources.policy(row, seed), options.clips) for row, seed in wanted]
    found = run_all("tables", todo, options.out, sources.weights, options.jobs, measured)
    extractor = next(row["extractor"] for row in found)
    note = (
        f"FID and FVD are Frechet distances between features of {extractor}: not comparable with the paper's.\n"
        "† measured while the machine was busy with other work: an upper bound.\n"
    )
    parts = {"Table 2": table(found, TABLE2), "Table 3, clips 4 times as long": table(found, TABLE3)}
    texts = [f"**{title}**\n\n{text}\n" for title, text in parts.items() if text]
    publish("tables", "".join(texts) + note)
    runs = [options.learn / f"grpo_{seed}" for seed in range(options.seeds)]
    runs = [folder for folder in runs if (folder / "metrics.jsonl").is_file()]
    if runs:
        draw(runs, RESULTS / "tables.png")


if __name__ == "__main__":
    main()
