"""Cross-field rules: what a single component cannot know about itself. Each raises a one-line ValueError
naming key and fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.draws import Stream, generator
from data.pairs import read_pairs
from metrics.features import tower
from runtime import unused
from runtime.checkpoint import complete_steps, read_state
from runtime.identity import BEGUN
from runtime.interfaces import whole
from runtime.settings import Settings, require
from runtime.team import ranks

# Most latent frames of a schedule's dry run.
_DRY_FRAMES = 1024


def check(settings: Settings, trains: bool = True) -> None:
    """Apply every rule but `parts`.

    Args:
        settings: what is asked for.
        trains: whether the experiment takes gradients; one that measures, exports or serves does without the rules of
            learning.

    Raises:
        ValueError: settings that contradict each other.
        FileNotFoundError: a file or folder that does not exist.
    """
    rl, stages = (groups, minibatches, stochasticity, alarms), (step1, preferences)
    learning = (*(rl if settings.stage is None else ()), precision) if trains else ()
    own = stages if settings.stage is not None else ()
    # What is measured was rewarded as its checkpoint says (`config._check_judges`), not as this command line does.
    judges = () if settings.checkpoint is not None and not trains else (trackers, scorers)
    for rule in (whole, *own, *learning, engines, *judges, frames, sizes, clips, run_folder):
        rule(settings)


def groups(settings: Settings) -> None:
    """Group-relative algorithms compare the samples of a group."""
    size = settings.rollout.group_size
    relative, pairs = settings.algorithm.group_relative, getattr(settings.algorithm, "pairs", 1)
    require(
        size >= 2 or not relative,
        f"rollout.group_size={size}: {_name(settings.algorithm)} compares the samples of a group; use 2 or more",
    )
    require(
        2 * pairs <= size or not relative,
        f"algorithm.pairs={pairs} needs groups of {2 * pairs} or more; make rollout.group_size={size} larger",
    )


def minibatches(settings: Settings) -> None:
    """Mini-batches cut the samples of an update into equal parts."""
    parts, whole = settings.algorithm.minibatches, settings.algorithm.whole_groups
    samples = settings.rollout.prompts * (1 if whole else settings.rollout.group_size)
    what = (
        "groups of an update (rollout.prompts)"
        if whole
        else "samples of an update (rollout.prompts x rollout.group_size)"
    )
    require(
        samples % parts == 0,
        f"algorithm.minibatches={parts} does not divide the {samples} {what}; use {parts_of(samples)}",
    )


def precision(settings: Settings) -> None:
    """Rounding of bfloat16 weights loses small updates. Copies that an engine keeps in float32 would not be in a
    checkpoint, which holds the weights themselves.
    """
    if getattr(settings.model, "precision", "float32") != "bfloat16":
        return
    instead = "model.precision=float32 engine.precision=bf16"
    require(
        not getattr(settings.stage, "match", False),
        "model.precision=bfloat16 rounds most of an update away, and distribution matching trains all weights of the "
        f"fake score; use {instead}",
    )
    require(
        settings.adaptation.kind == "lora",
        f"model.precision=bfloat16 rounds most of an update away; use adaptation=lora, or {instead}",
    )


def stochasticity(settings: Settings) -> None:
    """Log-probs exist at stochastic steps only; a stochastic step needs a kernel with noise and a next
    level above 0.
    """
    sigmas = settings.rollout.sigmas
    random_steps = settings.schedule.learnable
    require(
        settings.transition.learnable or not random_steps,
        "transition=ode has no stochastic steps for this schedule; choose schedule=none or transition=cps",
    )
    require(
        random_steps or not settings.algorithm.needs_log_prob,
        f"schedule=none leaves {_name(settings.algorithm)} nothing to learn from: "
        f"it needs the log-probs of stochastic steps; "
        f"choose schedule=single",
    )
    require(
        random_steps or not settings.algorithm.group_relative or not settings.rollout.share_initial_noise,
        "schedule=none with rollout.share_initial_noise=true makes all samples of a group the same; "
        "set rollout.share_initial_noise=false",
    )
    require(
        len(sigmas) >= 3 or not random_steps,
        f"rollout.sigmas={sigmas}: the only step ends at 0 and cannot be "
        f"stochastic; add a level between, such as "
        f"[1.0,0.522,0.0]",
    )
    frames = min(settings.rollout.frames, _DRY_FRAMES)
    available = np.array([[sigma > 0 for sigma in sigmas[1:]]] * frames)
    try:  # the schedule knows how many steps it needs
        settings.schedule.choose(available, generator(Stream.SCHEDULE, settings.seed), 0)
    except ValueError as error:
        raise ValueError(f"schedule does not fit rollout.sigmas={sigmas}: {error}") from error


def alarms(settings: Settings) -> None:
    """An alarm that is asked for can go off."""
    algorithm, limit = settings.algorithm, settings.alarms.kl
    require(
        limit is None or algorithm.needs_log_prob,
        f"alarms.kl={limit}: {_name(algorithm)} uses no log-probs, so there is no KL to watch; take it out",
    )
    require(
        limit is None or algorithm.kl_weight > 0 or algorithm.needs_reference,
        f"alarms.kl={limit}: a run without algorithm.kl_weight does not measure the KL; set it, such as "
        f"algorithm.kl_weight=0.001, or take the alarm out",
    )


def split(prompts: int, processes: int) -> None:
    """Groups are whole in every process."""
    require(
        prompts % processes == 0,
        f"rollout.prompts={prompts} cannot be split over {processes} processes; make it a multiple of {processes}",
    )


def engines(settings: Settings) -> None:
    """The engine is installed; step 1 has loops of its own."""
    engine, processes = settings.engine, ranks()
    engine.check()
    split(settings.rollout.prompts, processes)
    schedule = settings.schedule
    require(
        getattr(engine, "stage", 0) < 3 or processes == 1 or getattr(schedule, "scope", "") != "one_pair",
        "engine=deepspeed_z3 gathers weights in every pass, and with schedule.scope=one_pair some processes may need "
        "more passes than others and wait for ever; take engine=deepspeed_z2, or another scope",
    )
    if settings.stage is not None:
        changed = [f for f in dataclasses.fields(engine) if getattr(engine, f.name) != f.default]
        shape = ("threads", "precision", "activation_checkpointing")  # what they do, they do to a network
        idle = [f"engine.{f.name}={getattr(engine, f.name)}" for f in changed if f.name not in shape]
        require(
            not engine.distributed and processes == 1 and not idle,
            f"this experiment runs in one process, with the plain engine alone; drop {', '.join(idle) or 'engine'}"
            + (f", and start it without a launcher ({processes} processes)" if processes > 1 else ""),
        )


def trackers(settings: Settings) -> None:
    """A tracker that rewards is cheated first; it cannot also be the judge. In step 1 and in DPO from pairs nothing
    rewards.
    """
    require(
        not _rewarded(settings) or type(settings.tracker) is not type(settings.evaluation.tracker),
        f"tracker and evaluation.tracker are both {_name(settings.tracker)}; the "
        f"one that evaluates must not be the one that "
        f"rewards: change one, such as tracker=ncc tracker@evaluation.tracker=lucas_kanade",
    )


def parts(settings: Settings, experiment: str = "train") -> None:
    """What trackers, rewards and judges need is there. Some of it may lie in the model's folder: look for that first.

    Args:
        settings: what is asked for.
        experiment: `export` loads neither rewards nor the judge of looks, `serve` rewards alone, all others both.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a package is missing, or a file is another one.
    """
    judges = settings.evaluation
    for tracker in (settings.tracker, judges.tracker):
        if hasattr(tracker, "check"):
            tracker.check()
    rewards = settings.reward.values() if experiment != "export" else ()
    looks = (judges.looks,) if experiment not in ("export", "serve") else ()
    for part in (*rewards, *looks, judges.extractor, judges.interpolator):
        if hasattr(part, "check"):
            part.check(settings.model.folder)


def scorers(settings: Settings) -> None:
    """Likewise for the tower that judges looks, however its folder is named."""
    judge, assets = settings.evaluation.scorer, settings.model.folder
    named = [getattr(term, "model", None) for term in settings.reward.values()] if _rewarded(settings) else []
    require(
        not rewards_by(assets, judge, named),
        f"evaluation.scorer={judge} is the model of a reward; the one that evaluates must not be the one that rewards: "
        f"change one, such as evaluation.scorer=aesthetic_eval",
    )


def rewards_by(assets: Path, judge: str, models: Iterable[object]) -> bool:
    """Whether the tower of a judge is among the models of rewards, which are no text where a reward has none."""
    return tower(assets, judge).resolve() in [tower(assets, m).resolve() for m in models if isinstance(m, str)]


def frames(settings: Settings) -> None:
    """Clips are as long as rollouts."""
    wanted = pixel_frames(settings.rollout.frames)
    got = settings.world.frames
    require(
        got == wanted,
        f"world.frames={got} but rollout.frames={settings.rollout.frames} latent frames "
        f"are {wanted} pixel frames; set rollout.frames "
        f"only, world.frames follows it",
    )


def sizes(settings: Settings) -> None:
    """Frames can be cut into the model's patches."""
    step = getattr(settings.model, "pixel_multiple", 1)
    odd = [f"{height}x{width}" for height, width in settings.world.buckets if height % step or width % step]
    require(not odd, f"world.sizes has {', '.join(odd)}; height and width must be multiples of {step} for this model")


def clips(settings: Settings) -> None:
    """There is something to train on and something to evaluate on. Looks at files, decodes none."""
    held, asked, buckets = settings.evaluation.split, settings.evaluation.clips, len(settings.world.buckets)
    for split in ("train", held):
        require(
            settings.world.size(split) != 0,
            f"world={_name(settings.world).lower()} has no clips in its {split} split; add "
            f"clips, or choose another evaluation.split or world",
        )
    size = settings.world.size(held)
    require(
        size is None or -(-asked // buckets) <= size,
        f"evaluation.clips={asked}: the {held} split holds {size} clips; use at most {(size or 0) * buckets}",
    )


def step1(settings: Settings) -> None:
    """What `finetune.py` and `distill.py` are asked to do."""
    stage, whole = settings.stage, getattr(settings.adaptation, "kind", "full") == "full"
    tokens, kind = getattr(settings.model, "image_frames", "none"), getattr(settings.model, "kind", "i2v")
    require(
        tokens == "none",
        f"model.image_frames={tokens}: step 1 trains without image tokens; use model.image_frames=none, here and after",
    )
    require(
        kind == "i2v" or not getattr(stage, "fresh", False),
        "stage.fresh=true makes an image-to-video model; use model.random=true for random weights of kind t2v",
    )
    for option in ("from_teacher", "fresh"):
        require(
            whole or not getattr(stage, option, False),
            f"stage.{option}=true replaces all weights, but only a part trains; use adaptation=full, or "
            f"stage.{option}=false and model.transformer=<folder to start from>",
        )
        require(
            settings.checkpoint is None or not getattr(stage, option, False),
            f"checkpoint={settings.checkpoint} has no effect with stage.{option}=true; take one of them out",
        )
    for text in unused.changed(settings):
        raise ValueError(f"{text} has no effect here; {unused.instead(text.partition('=')[0], stage)}")
    wide = getattr(settings.strategy, "frames", 0)
    require(
        wide <= settings.rollout.frames,
        f"strategy.frames={wide} is more than rollout.frames={settings.rollout.frames}; make it smaller",
    )


def preferences(settings: Settings) -> None:
    """DPO from a file: the list can be read, and nothing is set that only rollouts have."""
    stage, algorithm = settings.stage, settings.algorithm
    if not hasattr(stage, "criterion"):
        return
    require(
        hasattr(algorithm, "beta"), f"stage=pairs is DPO, not {_name(algorithm)}; use algorithm=dpo, or no stage=pairs"
    )
    for name, default in unused.choice("algorithm", "dpo").items():
        value = getattr(algorithm, name, default)
        require(
            name == "beta" or value == default,
            f"algorithm.{name}={value} has no effect with stage=pairs, which learns from clips and not from "
            f"rollouts; take it out",
        )
    read_pairs(Path(stage.file).expanduser(), stage.criterion)


def run_folder(settings: Settings) -> None:
    """Runs are not mixed in one folder, and a checkpoint to start from is complete and of the same model."""
    if settings.run_dir and not settings.resume and complete_steps(Path(settings.run_dir)):
        raise ValueError(
            f"run_dir={settings.run_dir} holds the checkpoints of an earlier run; "
            f"add resume=true to go on with it, or choose "
            f"another run_dir"
        )
    if settings.run_dir and not settings.resume and (Path(settings.run_dir) / BEGUN).is_file():
        raise ValueError(f"run_dir={settings.run_dir} holds an earlier run; add resume=true, or choose another run_dir")
    if settings.checkpoint is not None:
        read_state(Path(settings.checkpoint))


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames T = 1 + 4 (M - 1) of M latent frames."""
    return 1 + 4 * (latent_frames - 1)


def parts_of(samples: int, most: int = 64) -> str:
    """Return the divisors of `samples` up to `most`, as text."""
    found = [str(d) for d in range(1, min(samples, most) + 1) if samples % d == 0]
    return ", ".join(found[:-1]) + f" or {found[-1]}" if len(found) > 1 else found[0]


def _rewarded(settings: Settings) -> bool:
    return settings.stage is None or hasattr(settings.stage, "port")


def _name(component: Any) -> str:
    return type(component).__name__
