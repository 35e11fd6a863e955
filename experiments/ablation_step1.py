"""Step 1 side by side: `python experiments/ablation_step1.py` (`make ablation-step1`).

For every seed one student per way of making clips, from the same teacher with the same number of updates: Self-Rollout
and Self-Forcing with chunks of 1 and of 3 frames (3 is the paper's baseline), teacher forcing. Beside them the initial
model and the teacher, which take many steps and see the whole clip. All on the same held-out clips and noise, with the
last weights: sampled by the ODE and by re-noising, at the training length and at two and four times that, there with
caches of 7, 15 and 25 frames.
A probe with one step less says how good the guesses are that Self-Forcing shows to later frames. The result is
`docs/results/step1.jsonl`, `step1.md` (the table) and `step1.png` (error along the clip). Interrupt it at will: it goes
on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

from runtime.cells import (
    FRAMES,
    RESULTS,
    Cell,
    Probe,
    Row,
    arguments,
    arms_of,
    figure,
    many_steps,
    markdown,
    mean_seconds,
    plot_ranges,
    publish,
    run_all,
    spread,
    weights_of,
)
from runtime.models import Pretrained

# Of every student: teacher forcing, the same for all students of a seed and chunk, then distribution matching.
POOL = "stage.pool=512"
WARM_UP = (POOL, "stage.teacher_forcing.steps=800", "stage.match=false", "evaluation.clips=2")
MATCHING = (POOL, "stage.teacher_forcing.steps=0", "stage.from_teacher=false", "updates=100")
JUDGES = ("vae", "text_encoder", "tokenizer", "aesthetic_eval")
STUDENTS = {
    "self_rollout": ("strategy=self_rollout",),
    "self_rollout_chunk3": ("strategy=self_rollout", "rollout.chunk=3"),
    "self_forcing": ("strategy=self_forcing",),
    "self_forcing_chunk3": ("strategy=self_forcing", "rollout.chunk=3"),
    "teacher_forcing": ("strategy=teacher_forcing",),
}
METRICS = {
    "motion_error_px": "motion error, px",
    "motion_consistency": "motion consistency",
    "smoothness": "smoothness",
    "frechet": "Frechet",
    "frechet_video": "Frechet, video",
}
PROBES = {
    "renoise": "re-noised",
    "two_steps": "2 steps",
    "long2": "2 x length",
    "long4": "4 x length",
    "cache15": "4 x length, cache 15",
    "cache25": "4 x length, cache 25",
}


def cells(seeds: int, clips: int, initial: str, teacher: str, options: list[str]) -> list[Cell]:
    """All cells of the table.

    Args:
        seeds: seeds 0 .. seeds - 1.
        clips: held-out clips.
        initial, teacher: folders of the two models.
        options: overrides of every `distill.py`; those of `rollout` and `world` hold for the evaluations too.
    """
    shared = (f"evaluation.clips={clips}", "evaluation.every=0", "logger=local")
    found = [whole(name, path, shared) for name, path in (("initial", initial), ("teacher", teacher))]
    common = [text for text in options if text.startswith(("rollout.", "world"))]
    for seed in range(seeds):
        for arm, strategy in STUDENTS.items():
            chunk = [text for text in strategy if text.startswith("rollout.chunk")]
            begun = (*chunk, f"stage.teacher={teacher}", *options, f"seed={seed}", "resume=true")
            warm = (*shared, *WARM_UP, *begun)
            after = Cell("warm_up_" + (chunk[0].rpartition("=")[2] if chunk else "1"), seed, "distill.py", warm)
            student = (*shared, *common, *chunk, "model.transformer={folder}/transformer")
            probes = (
                Probe("renoise", (*student, "evaluation.sampler=renoise")),
                Probe("two_steps", (*student, "rollout.sigmas=[1.0,0.755,0.0]")),
                Probe("long2", (*student, f"rollout.frames={2 * FRAMES}")),
                Probe("long4", (*student, f"rollout.frames={4 * FRAMES}")),
                Probe("cache15", (*student, f"rollout.frames={4 * FRAMES}", "rollout.window=15")),
                Probe("cache25", (*student, f"rollout.frames={4 * FRAMES}", "rollout.window=25")),
            )
            start = "model.transformer={after}/transformer"
            overrides = (*shared, strategy[0], *MATCHING, start, *begun)
            found.append(Cell(arm, seed, "distill.py", overrides, probes, after))
    return found


def whole(name: str, path: str, shared: tuple[str, ...]) -> Cell:
    """Cell of a model that sees whole clips, in many steps."""
    lengths = {"long2": 2 * FRAMES, "long4": 4 * FRAMES}
    probes = [Probe(key, (*shared, *many_steps(path, n))) for key, n in lengths.items()]
    return Cell(name, 0, "evaluate.py", (*shared, *many_steps(path)), tuple(probes))


def table(rows: list[Row]) -> str:
    """Markdown: a line per arm, mean ± standard deviation over seeds; further samplers and lengths by motion error."""
    heads = ["", "seeds", *METRICS.values(), *(f"{name}: px" for name in PROBES.values()), "seconds"]
    lines = []
    for arm, members in arms_of(rows).items():
        values = [spread([m["after"][key] for m in members]) for key in METRICS]
        values += [
            spread([m["probes"][name]["after"]["motion_error_px"] for m in members])
            if name in members[0]["probes"]
            else ""
            for name in PROBES
        ]
        lines.append([arm, str(len(members)), *values, mean_seconds(members)])
    truth = next(r for r in rows if r["truth"])["truth"]
    extractor = next((r["extractor"] for r in rows if r.get("extractor")), "?")
    lines.append(["true clips", "", *(f"{truth[key]:.3f}" for key in METRICS), *[""] * (len(PROBES) + 1)])
    return markdown(heads, lines) + f"\nFrechet distances are between features of {extractor}.\n"


def draw(rows: list[Row], path: Path) -> None:
    """Plot the error along clips of four times the training length: mean over seeds, and its range."""
    found = {}
    for arm, members in arms_of(rows).items():
        curves = [m["probes"]["long4"]["error_by_frame"] for m in members]
        found[arm] = (range(1, len(curves[0]) + 1), curves)
    page, axes = figure(width=8)
    plot_ranges(axes, found)
    axes.axvline(FRAMES - 1, color="0.5", linestyle="--", linewidth=1)
    axes.annotate("end of the clips in training", (FRAMES - 0.8, 0), xycoords=("data", "axes fraction"), color="0.4")
    axes.set(xlabel="latent frame", ylabel="motion error, px", ylim=(0, None))
    page.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing; write table and figure."""
    parser = arguments(__doc__, "outputs/step1", clips=64)
    parser.add_argument("--initial", default="initial", help="the initial model, as model.transformer names it")
    parser.add_argument("--teacher", default="teacher", help="the teacher, likewise")
    parser.add_argument("options", nargs="*", help="overrides of distill.py, such as updates=100")
    options = parser.parse_args()
    todo = cells(options.seeds, options.clips, options.initial, options.teacher, options.options)
    parts = (*JUDGES, options.initial, options.teacher)
    weights = " ".join(weights_of(Pretrained("assets/tiny", transformer=part).network) for part in parts)
    rows = run_all("step1", todo, options.out, weights, options.jobs)
    publish("step1", table(rows))
    draw(rows, RESULTS / "step1.png")


if __name__ == "__main__":
    main()
