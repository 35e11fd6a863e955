"""The learning result of the README: `python experiments/learn.py` (`make learn`).

Cells, each a run of its own in `outputs/learn/<arm>_<seed>`: GRPO, the same updates with shuffled advantages, and
continued supervised training (the student's last stage goes on), for every seed; and, as they are, the student, the
same before it was adapted to a weak tracker's tracks ("exact"), and the many-step teacher. All are measured on the same
held-out clips and noise, with the last weights, by a tracker and a vision tower that took no part in the reward.
Interrupt it at will: a finished cell is not run again as long as its command and the weights it starts from are the
same, and an unfinished one goes on from its last checkpoint. The result is `docs/results/learn.jsonl` (one line per
cell) and `docs/results/learn.md` (the table).
"""

from __future__ import annotations

from runtime.cells import (
    ROOT,
    Cell,
    Row,
    arguments,
    arms_of,
    interval,
    many_steps,
    markdown,
    mean_seconds,
    publish,
    run_all,
    spread,
    weights_of,
)

# What `tables.py` takes from here is trained as here.
UPDATES, CLIPS = 200, 128
# The last stage of algorithms/pretraining/chain.py, with steps that take about as long as 200 GRPO
# updates (the table gives seconds). Most of the clips are new to the student.
SUPERVISED = (
    "stage.from_teacher=false",
    "stage.eta=0",
    "stage.track_noise=4",
    "stage.teacher_forcing.steps=0",
    "stage.own_history.steps=1250",
    "stage.own_history.lr=2e-3",
    "stage.own_history.ema=0.995",
    "stage.match=false",
)
ARMS = ("student", "exact", "teacher", "grpo", "shuffled", "supervised")
METRICS = {
    "motion_error_px": "motion error, px",
    "aesthetic": "aesthetic",
    "frechet": "Frechet",
    "frechet_video": "Frechet, video",
}


def cells(seeds: int, updates: int, clips: int) -> list[Cell]:
    """All cells of the table."""
    shared = (f"evaluation.clips={clips}", "evaluation.every=0", "logger=local")
    rl = (*shared, f"updates={updates}", "saving.every=10", "resume=true")
    found = [
        Cell("student", 0, "evaluate.py", shared),
        Cell("exact", 0, "evaluate.py", (*shared, "model.transformer=few_step")),
        Cell("teacher", 0, "evaluate.py", (*shared, *many_steps("teacher"))),
    ]
    for seed in range(seeds):
        found += [
            Cell("grpo", seed, "grpo.py", (*rl, f"seed={seed}")),
            Cell("shuffled", seed, "grpo.py", (*rl, f"seed={seed}", "algorithm.shuffle_advantages=true")),
            Cell("supervised", seed, "distill.py", (*shared, *SUPERVISED, f"seed={seed + 2}", "resume=true")),
        ]
    return sorted(found, key=lambda c: (ARMS.index(c.arm), c.seed))


def change(members: list[Row], student: dict[str, float]) -> str:
    """Change of the motion error against the student for every seed, and the 95 % interval of its mean over seeds."""
    found = [100 * (m["after"]["motion_error_px"] / student["motion_error_px"] - 1) for m in members]
    text = ", ".join(f"{c:+.1f} %" for c in found)
    if len(found) < 2:
        return text
    low, high = interval(found)
    return f"{text}; mean in [{low:+.1f}, {high:+.1f}] %"


def table(rows: list[Row]) -> str:
    """Markdown: a line per arm, mean ± standard deviation over seeds, and the change against the student."""
    student = next(r for r in rows if r["arm"] == "student")["after"]
    heads = ["", "seeds", *METRICS.values(), "motion error against the student", "seconds of training"]
    lines = []
    for arm, members in arms_of(rows).items():
        values = [spread([m["after"][key] for m in members]) for key in METRICS]
        each = change(members, student) if arm != "student" else ""
        lines.append([arm, str(len(members)), *values, each, mean_seconds(members)])
    truth = next(r for r in rows if r["truth"])["truth"]
    lines.append(["true clips", "", *(f"{truth[key]:.3f}" for key in METRICS), "", ""])
    return markdown(heads, lines)


def main() -> None:
    """Run what is missing and write the table."""
    parser = arguments(__doc__, "outputs/learn", clips=CLIPS)
    parser.add_argument("--updates", type=int, default=UPDATES, help="GRPO updates per run")
    options = parser.parse_args()
    todo, weights = cells(options.seeds, options.updates, options.clips), weights_of(ROOT / "assets" / "tiny")
    rows = run_all("learn", todo, options.out, weights, options.jobs)
    publish("learn", table(rows))


if __name__ == "__main__":
    main()
