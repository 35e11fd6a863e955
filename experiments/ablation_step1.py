"""Step 1 side by side: `python experiments/ablation_step1.py` (`make ablation-step1`).

For every seed one student per way of making clips, from the same teacher with the same number of updates: Self-Rollout
and Self-Forcing with chunks of 1 and of 3 frames (3 is the paper's baseline), teacher forcing. Beside them the initial
model and the teacher, which take many steps and see the whole clip. All on the same held-out clips and noise, with the
last weights: sampled by the ODE and by re-noising, at the training length and at two and four times that, there also
with caches of 15 and 25 frames (of the paper's student, Self-Rollout with chunks of 1).
A probe with one step less says how good the guesses are that Self-Forcing shows to later frames. The result is
`docs/results/step1.jsonl`, `step1.md` (a table per sampler) and `step1.png` (error along the clip). Interrupt it at
will: it goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

from runtime.cells import (
    BUSY,
    FRAMES,
    RESULTS,
    Cell,
    Probe,
    Row,
    arguments,
    arms_of,
    figure,
    latency,
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

CLIPS = 64
# Of every student: teacher forcing, the same for all students of a seed and chunk, then distribution matching.
POOL = "stage.pool=512"
WARM_UP = (POOL, "stage.teacher_forcing.steps=800", "stage.match=false", "evaluation.clips=2")
# 100 generator steps leave 0.6 % of the warm-up in the averaged weights (the default decay, for long runs, 37 %).
UPDATES, DECAY = "updates=100", "stage.dmd.ema=0.95"
MATCHING = (POOL, "stage.teacher_forcing.steps=0", "stage.from_teacher=false", UPDATES, DECAY)
# Options that only one of the two runs of a student reads.
WARM_UP_ONLY, MATCHING_ONLY = ("stage.teacher_forcing.",), ("strategy.", "stage.dmd.", "updates=")
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
RENOISE = "evaluation.sampler=renoise"
LONGER = {"long2": 2 * FRAMES, "long4": 4 * FRAMES}
# Table: its lines, each a probe (or the run's own evaluation, "") and its clips.
TABLES = {
    "ODE steps": {
        "": "training length",
        "two_steps": "training length, 2 steps",
        "long2": "2 x length",
        "long4": "4 x length",
        "cache15": "4 x length, cache 15",
        "cache25": "4 x length, cache 25",
    },
    "Re-noised steps": {"renoise": "training length", "renoise_long2": "2 x length", "renoise_long4": "4 x length"},
}
# Top of the figure, px: beyond it is the initial model, which does not follow the drag.
HIGHEST = 13
# Sampler: the probes whose error along the clip is drawn.
CURVES = {"ODE steps": ("", *LONGER), "Re-noised steps": ("renoise", *(f"renoise_{name}" for name in LONGER))}


def cells(seeds: int, clips: int, initial: str, teacher: str, options: list[str]) -> list[Cell]:
    """All cells of the table.

    Args:
        seeds: seeds 0 .. seeds - 1.
        clips: held-out clips.
        initial, teacher: folders of the two models.
        options: overrides of every `distill.py`; those of `world` hold for all evaluations too, those of `rollout` for
            the students'.
    """
    shared = (f"evaluation.clips={clips}", "evaluation.every=0", "logger=local")
    world = tuple(text for text in options if text.startswith("world"))
    found = [whole(name, path, (*shared, *world)) for name, path in (("initial", initial), ("teacher", teacher))]
    common = [text for text in options if text.startswith(("rollout.", "world"))]
    matching = [text for text in options if not text.startswith(WARM_UP_ONLY)]
    warming = [text for text in options if not text.startswith(MATCHING_ONLY)]
    for seed in range(seeds):
        for arm, strategy in STUDENTS.items():
            chunk = [text for text in strategy if text.startswith("rollout.chunk")]
            taught, ends = (*chunk, f"stage.teacher={teacher}"), (f"seed={seed}", "resume=true")
            warm = (*shared, *WARM_UP, *taught, *warming, *ends)
            after = Cell("warm_up_" + (chunk[0].rpartition("=")[2] if chunk else "1"), seed, "distill.py", warm)
            student = (*shared, *common, *chunk, "model.transformer={folder}/transformer")
            probes = tuple(Probe(name, (*student, *how)) for name, how in probed(arm).items())
            start = "model.transformer={after}/transformer"
            overrides = (*shared, strategy[0], *MATCHING, start, *taught, *matching, *ends)
            found.append(Cell(arm, seed, "distill.py", overrides, probes, after))
    return found


def probed(arm: str) -> dict[str, tuple[str, ...]]:
    """What a student's probes differ in from the evaluation of its run."""
    found: dict[str, tuple[str, ...]] = {"two_steps": ("rollout.sigmas=[1.0,0.755,0.0]",), "renoise": (RENOISE,)}
    for name, frames in LONGER.items():
        found[name] = (f"rollout.frames={frames}",)
        found[f"renoise_{name}"] = (*found[name], RENOISE)
    if arm == "self_rollout":
        found |= {f"cache{size}": (*found["long4"], f"rollout.window={size}") for size in (15, 25)}
    return found


def whole(name: str, path: str, shared: tuple[str, ...]) -> Cell:
    """Cell of a model that sees whole clips, in many steps."""
    probes = [Probe(key, (*shared, *many_steps(path, n))) for key, n in LONGER.items()]
    return Cell(name, 0, "evaluate.py", (*shared, *many_steps(path)), tuple(probes))


def weights_in(initial: str, teacher: str) -> str:
    """Hashes of all weights that a cell may start from or be judged by."""
    return " ".join(
        weights_of(Pretrained("assets/tiny", transformer=part).network) for part in (*JUDGES, initial, teacher)
    )


def measured_as(probe: str, members: list[Row]) -> list[Row]:
    """What a probe, or the run's own evaluation (""), measured of an arm; empty where it has none."""
    return [m["probes"][probe] if probe else m for m in members if not probe or probe in m["probes"]]


def tables(rows: list[Row]) -> str:
    """Markdown: a table per sampler, with a line per arm, length and cache: mean ± standard deviation over seeds."""
    heads = ["", "clips", "seeds", *METRICS.values(), "first frame, s", "seconds of training"]
    parts, arms = [], arms_of(rows)
    for title, probes in TABLES.items():
        lines = [
            [arm, clips, str(len(found)), *values(found), latency(found), "" if probe else mean_seconds(members)]
            for probe, clips in probes.items()
            for arm, members in arms.items()
            if (found := measured_as(probe, members))
        ]
        parts.append(f"**{title}**\n\n{markdown(heads, lines)}")
    truth = values([{"after": row["truth"]} for row in rows if row["truth"]][:1])
    clips = ", ".join(f"{name} {value}" for name, value in zip(METRICS.values(), truth, strict=True))
    extractor = next((row["extractor"] for row in rows if row.get("extractor")), "?")
    notes = f"""± is the standard deviation over seeds. True clips of the training length: {clips}.
Frechet distances are between features of {extractor}, to true clips of the same length.
Initial model and teacher take 16 steps, without guidance; distribution matching asks the teacher with it. Caches of 15
and 25 frames are those of evaluation: in training, on clips of {FRAMES} frames, they would hardly differ from 7.
{BUSY}
"""
    return "\n".join([*parts, notes])


def values(measured: list[Row]) -> list[str]:
    """Every metric of an arm, as text."""
    return [spread([each["after"][key] for each in measured], key) for key in METRICS]


def draw(rows: list[Row], path: Path) -> None:
    """Plot the error along the clip, by sampler and length: mean over seeds, and its range."""
    page, panels = figure(len(CURVES["ODE steps"]), width=14, height=8, rows=len(CURVES), sharey=True)
    for line, (sampler, probes) in zip(panels, CURVES.items(), strict=True):
        for axes, probe, times in zip(line, probes, (1, 2, 4), strict=True):
            found = {}
            for arm, members in arms_of(rows).items():
                # an arm that was not sampled so is an empty curve: the others keep their colours
                curves = [each["error_by_frame"] for each in measured_as(probe, members)] or [[]]
                found[arm] = (range(1, len(curves[0]) + 1), curves)
            plot_ranges(axes, found)
            axes.get_legend().remove()  # one for all panels, below them
            axes.axvline(FRAMES - 1, color="0.5", linestyle="--", linewidth=1)  # the end of the clips in training
            axes.set(title=f"{sampler}, {times} x the training length", xlabel="latent frame")
        line[0].set_ylabel("motion error, px")
    panels[0][0].set_ylim(0, HIGHEST)  # of all panels, once all is drawn
    handles, arms = panels[0][0].get_legend_handles_labels()
    page.legend(handles, arms, loc="outside lower center", ncols=len(arms), frameon=False)
    page.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing; write tables and figure."""
    parser = arguments(__doc__, "outputs/step1", clips=CLIPS)
    parser.add_argument("--initial", default="initial", help="the initial model, as model.transformer names it")
    parser.add_argument("--teacher", default="teacher", help="the teacher, likewise")
    parser.add_argument("options", nargs="*", help="overrides of distill.py, such as updates=100")
    options = parser.parse_args()
    todo = cells(options.seeds, options.clips, options.initial, options.teacher, options.options)
    rows = run_all("step1", todo, options.out, weights_in(options.initial, options.teacher), options.jobs)
    publish("step1", tables(rows))
    draw(rows, RESULTS / "step1.png")


if __name__ == "__main__":
    main()
