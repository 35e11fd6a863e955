"""The paper's Tables 2 and 3 and Figure 6 on the embedded world: `python experiments/tables.py` (`make tables`).

Every row is measured by `evaluate.py` on the benchmark of 206 clips, 4 times as long for Table 3 (where a cache of 7
latent frames is shorter than a clip). What a row needs is taken from the cells of `learn.py` (GRPO on the shipped
student) and of `ablation_step1.py` (students distilled another way) and trained there where it is missing; a student
that was not made by the shipped chain first sees weak tracks as the shipped one does, then GRPO. Nothing is trained for
a row that is recorded. Latencies are measured last, one run at a time, of the runs whose folders are here. `--rows`
names some rows only, such as `--rows no_rl,initial,teacher`, which need no training; what is published is all that is
recorded. Interrupt it at will: it goes on where it stopped. The result is `docs/results/tables.jsonl`, `tables.md` and,
where there are GRPO runs, `tables.png`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import ablation_step1, learn
from runtime.cells import (
    BUSY,
    DIGITS,
    FRAMES,
    RESULTS,
    ROOT,
    Cell,
    Home,
    Row,
    arguments,
    arms_of,
    evaluated,
    figure,
    latency,
    many_steps,
    markdown,
    plot_ranges,
    publish,
    recorded,
    run_all,
    spread,
    weights_of,
)
from runtime.runlog import read as read_log

METRICS = ("frechet", "frechet_video", "aesthetic", "smoothness", "motion_consistency", "motion_error_px")
REWARDS = ("motion", "aesthetic")
# Clips of the run that measures latency: `speed` takes one of them.
ALONE = 8
# Updates that make a point of the figure: each has prompts of its own, so that single ones say little.
MEANS = 10
HEADS = ("first frame, s", "FID", "FVD", "aesthetic", "smoothness", "motion consistency", "ObjMC, px")
# row: (title, the paper's latency, FID, FVD, aesthetic, smoothness, motion consistency); the title alone where the
# paper has no such row.
TABLE2 = {
    "full": ("full", ".44", "28.98", "187.49", "4.07", ".9948", "4.37"),
    "no_rl": ("without RL", ".44", "31.65", "210.35", "3.92", ".9926", "4.12"),
    "initial": ("initial model", "45.72", "35.94", "303.16", "3.84", ".9915", "3.22"),
    "teacher": ("teacher", "45.64", "29.38", "151.46", "4.15", ".9941", "4.36"),
    "no_self_rollout": ("without Self-Rollout", ".44", "38.13", "353.75", "3.38", ".9904", "4.02"),
    "no_self_rollout_own": ("without Self-Rollout, adapted on its own history",),
}
TABLE3 = {
    "cache7": ("chunk 1, cache 7", ".44", "28.98", "187.49", "4.07", ".9948", "4.37"),
    "chunk3": ("chunk 3", ".94", "27.47", "179.23", "4.09", ".9945", "4.37"),
    "cache15": ("cache 15", ".44", "28.96", "188.08", "4.07", ".9946", "4.34"),
    "cache25": ("cache 25", ".46", "28.99", "185.31", "4.05", ".9948", "4.39"),
}
LONG = f"rollout.frames={4 * FRAMES}"
# The models that are shipped, as `evaluate.py` names them.
SHIPPED = {"no_rl": (), "initial": many_steps("initial"), "teacher": many_steps("teacher")}
# row: arm of ablation_step1.py, the stage that shows it weak tracks, and its chunk.
STUDENTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "no_self_rollout": ("teacher_forcing", "teacher_forcing", ()),
    "no_self_rollout_own": ("teacher_forcing", "own_history", ()),
    "chunk3": ("self_rollout_chunk3", "own_history", ("rollout.chunk=3",)),
}
# The last stage of the shipped chain (algorithms/pretraining/chain.py), with own or with true history.
WEAK = (
    "stage.from_teacher=false",
    "stage.eta=0",
    "stage.pool=768",
    "stage.track_noise=4",
    "stage.match=false",
)


@dataclass(frozen=True)
class Rows:
    """Names the cells that measure the rows, and the runs that these start from; trains nothing.

    Attributes:
        learned: where `learn.py` keeps its cells.
        distilled: where `ablation_step1.py` keeps its cells.
        updates: of GRPO.
        steps: of the last stage of students that were not made by the shipped chain.
        clips: of the benchmark.
    """

    learned: Home
    distilled: Home
    updates: int
    steps: int
    clips: int

    def alone(self, row: str) -> Cell:
        """The cell that measures how fast a row's first policy is: few clips, and nothing else runs beside it."""
        return replace(replace(self, clips=ALONE).cell(row, 0), arm=alone(row))

    def cell(self, row: str, seed: int) -> Cell:
        """The cell that measures a row's policy."""
        shared = ("evaluation.split=benchmark", f"evaluation.clips={self.clips}", "evaluation.every=0", "logger=local")
        longer = (LONG,) if row in TABLE3 else ()
        cache = (f"rollout.window={row.removeprefix('cache')}",) if row in ("cache15", "cache25") else ()
        if row in SHIPPED:
            return Cell(row, seed, "evaluate.py", (*shared, *SHIPPED[row], *longer, *cache))
        trained = self.student(row, seed) if row in STUDENTS else self.full(seed)
        policy = f"checkpoint={{after}}/checkpoints/step_{self.updates:06d}"
        return Cell(row, seed, "evaluate.py", (*shared, policy, *longer, *cache), after=trained)

    def full(self, seed: int) -> Cell:
        """GRPO on the shipped student."""
        cells = learn.cells(seed + 1, self.updates, learn.CLIPS)
        return replace(next(c for c in cells if (c.arm, c.seed) == ("grpo", seed)), home=self.learned)

    def student(self, row: str, seed: int) -> Cell:
        """A student distilled another way, then adapted to weak tracks, then GRPO."""
        arm, stage, chunk = STUDENTS[row]
        cells = ablation_step1.cells(seed + 1, ablation_step1.CLIPS, "initial", "teacher", [])
        student = replace(next(c for c in cells if (c.arm, c.seed) == (arm, seed)), home=self.distilled)
        shared = ("evaluation.every=0", "logger=local", f"seed={seed}", "resume=true", *chunk)
        stages = ("own_history", "teacher_forcing")
        length = [f"stage.{name}.steps={self.steps if name == stage else 0}" for name in stages]
        length += [f"stage.{stage}.lr=2e-3", f"stage.{stage}.ema=0.995"]
        start = "model.transformer={after}/transformer"
        weak = Cell(f"{row}_weak", seed, "distill.py", (*shared, *WEAK, *length, start), after=student)
        learning = (*shared, f"updates={self.updates}", "saving.every=10", start)
        return Cell(f"{row}_grpo", seed, "grpo.py", learning, after=weak)


def alone(row: str) -> str:
    """The arm of the run that measures a row's latency."""
    return f"{row}_alone"


def is_here(cell: Cell, out: Path) -> bool:
    """Whether the run that a cell starts from is there: for its latency alone nothing is trained."""
    if cell.after is None:
        return True
    home = cell.after.home.out if cell.after.home else out
    return (home / cell.after.name / "result.json").is_file()


def seeds_of(row: str, seeds: int) -> range:
    """The shipped models have no seeds of their own."""
    return range(1 if row in SHIPPED else seeds)


def measured(folder: Path) -> Row:
    """What an evaluation left, with its intervals and, of a checkpoint, the rewards of the run that made it."""
    found = json.loads((folder / "evaluation.json").read_text())
    checkpoint = found["config"]["checkpoint"]
    return {
        **evaluated(folder),
        "intervals": found["intervals"],
        "rewards": rewards_of(Path(checkpoint).parents[1]) if checkpoint else None,
    }


def rewards_of(run_dir: Path) -> dict[str, list[float]]:
    """Both terms of the reward, unweighted, after each update of a run."""
    rows = read_log(run_dir)
    keys = {term: f"reward_terms/{term}" for term in REWARDS}
    return {term: [round(float(row[key]), 5) for row in rows if key in row] for term, key in keys.items()}


def table(rows: list[Row], titles: Mapping[str, tuple[str, ...]]) -> str:
    """Markdown: two lines per row, ours and the paper's."""
    lines = []
    arms = arms_of(rows)
    for row, (title, *paper) in titles.items():
        if row in arms:
            members = arms[row]
            first_frame = latency(arms.get(alone(row), members))
            lines.append([title, str(len(members)), first_frame, *(_cell(members, key) for key in METRICS)])
            lines += [["&emsp;the paper", "", *paper, ""]] if paper else []
    return markdown(["", "seeds", *HEADS], lines) if lines else ""


def _cell(members: list[Row], key: str) -> str:
    """Mean ± standard deviation over seeds; of one policy its value (± half a 95 % interval over clips)."""
    values, digits = [float(m["after"][key]) for m in members], DIGITS.get(key, 3)
    if len(values) > 1:
        return spread(values, key)
    return f"{values[0]:.{digits}f} (± {members[0]['intervals'][key]['half']:.{digits}f})"


def text_of(rows: list[Row]) -> str:
    """Markdown: both tables, and how to read them."""
    parts = {"Table 2": table(rows, TABLE2), "Table 3, clips 4 times as long": table(rows, TABLE3)}
    notes = (
        "± is the standard deviation over seeds of training; (±), of one policy, half a 95 % interval over clips.",
        f"FID and FVD are Frechet distances between features of {rows[0]['extractor']}: "
        "not comparable with the paper's.",
        f"First frame: on one thread. {BUSY}",
    )
    return "".join(f"**{title}**\n\n{text}\n" for title, text in parts.items() if text) + "\n".join(notes) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Plot both rewards over the updates of GRPO, means of `MEANS` updates: mean over seeds, and their range."""
    page, axes = figure(2, width=10, height=4)
    for panel, term in zip(axes, REWARDS, strict=True):
        logs = [row["rewards"][term] for row in rows]
        length = min(map(len, logs))  # an update that was left out has none
        ends = range(min(MEANS, length), length + 1, MEANS)
        curves = [[statistics.mean(log[max(0, end - MEANS) : end]) for end in ends] for log in logs]
        plot_ranges(panel, {f"full, {len(rows)} seeds": (ends, curves)})
        panel.set(xlabel=f"update (means of {MEANS})", ylabel=f"reward term {term}, unweighted")
    page.savefig(path, dpi=120)


def main() -> None:
    """Train and measure what is missing; write tables and figure."""
    parser = arguments(__doc__ or "", "outputs/tables", clips=206)
    rows = [*TABLE2, *TABLE3]
    parser.add_argument("--rows", default=",".join(rows), help="rows to measure, such as no_rl,initial,teacher")
    parser.add_argument("--updates", type=int, default=learn.UPDATES, help="GRPO updates")
    parser.add_argument("--steps", type=int, default=300, help="steps on weak tracks of other students")
    parser.add_argument("--learn", type=Path, default=Path("outputs/learn"), help="cells of learn.py")
    parser.add_argument("--step1", type=Path, default=Path("outputs/step1"), help="cells of ablation_step1.py")
    options = parser.parse_args()
    chosen = options.rows.split(",")
    unknown = [row for row in chosen if row not in rows]
    if unknown:
        parser.error(f"--rows: {unknown[0]} is none of {', '.join(rows)}")
    weights = weights_of(ROOT / "assets" / "tiny")
    distilled = Home(options.step1, ablation_step1.weights_in("initial", "teacher"))
    named = Rows(Home(options.learn, weights), distilled, options.updates, options.steps, options.clips)
    every = [named.cell(row, seed) for row in rows for seed in seeds_of(row, options.seeds)]
    todo = [cell for cell in every if cell.arm in chosen]
    run_all("tables", todo, options.out, weights, options.jobs, measured)
    fast = {row: named.alone(row) for row in rows}
    timed = [cell for row, cell in fast.items() if row in chosen and is_here(cell, options.out)]
    run_all("tables", timed, options.out, weights, 1, measured)
    known = list(recorded("tables", [*every, *fast.values()], weights).values())
    publish("tables", text_of(known))
    full = [row for row in known if row["arm"] == "full"]
    if full:
        draw(full, RESULTS / "tables.png")


if __name__ == "__main__":
    main()
