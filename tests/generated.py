"""Command lines as people and their mistakes make them: generated from the configuration tree itself, by seed."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException

from runtime import explain, schema
from runtime.cli import readable
from runtime.config import CONF, Plan, plain, validate
from runtime.identity import flatten
from runtime.overrides import check

PRIMARIES = ("grpo", "ppo", "dpo", "train", "evaluate", "agreement", "finetune", "distill", "serve")
REWARDS = sorted(path.stem for path in (CONF / "reward").glob("*.yaml"))
ABSENT = ("recipe", "debug", "stage", "strategy")  # groups that not every primary has
ODD = (
    "",
    "null",
    "true",
    "-1",
    "0",
    "1.5",
    "1e999",
    "nan",
    "inf",
    "abc",
    "[1,2]",
    "[]",
    "{a:1}",
    "???",
    "${nosuch}",
    "'",
)


@dataclass(frozen=True)
class Outcome:
    """What became of a command line: a plan, or one line of refusal; and the seconds of CPU time it took."""

    plan: Plan | None
    refusal: str
    seconds: float


@lru_cache
def defaults(primary: str) -> dict[str, Any]:
    """Flat keys and values of a primary as it stands."""
    return {k: v for k, v in flatten(plain(compose(primary))).items() if not k.endswith(schema.TARGET)}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def near(rng: random.Random, value: Any) -> str:
    """A value of the same type, valid or nearly."""
    if isinstance(value, bool):
        return rng.choice(["true", "false"])
    if isinstance(value, int):
        return str(rng.choice([value, value + 1, 2 * value, 1, 2, 3, 4, 6]))
    if isinstance(value, float):
        return repr(rng.choice([value, value / 2, value * 2, 0.5, 0.0, 1.0]))
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]" if rng.random() < 0.7 else "[1.0,0.5,0.0]"
    return "null" if value is None else str(rng.choice([value, "net", "head", "clip", "global", "hard", "one_pair"]))


def weight(rng: random.Random) -> str:
    return rng.choice(["", f"{rng.uniform(-2, 2):.3g}*", f"{rng.randrange(1, 9)}*", "1e-2*", "1e+1*", ".5*"])


def reward_sum(rng: random.Random) -> str:
    """A valid sum."""
    names = rng.sample(REWARDS, rng.randrange(1, 4))
    return "+".join(f"{weight(rng)}{name}" for name in names)


def command_line(rng: random.Random) -> tuple[str, list[str]]:
    """A primary and overrides: some choices, some settings near their defaults, now and then a mistake."""
    primary = rng.choice(PRIMARIES)
    line = []
    for group in rng.sample(explain.groups(), rng.randrange(0, 5)):
        plus = "+" if group in ABSENT and group not in defaults_of(primary) else ""
        value = reward_sum(rng) if group == "reward" else rng.choice(choices(group))
        line.append(f"{plus}{group}={value}")
    flat = defaults(primary)
    for key in rng.sample(sorted(flat), rng.randrange(0, 4)):
        line.append(f"{key}={near(rng, flat[key])}")
    for _ in range(rng.randrange(0, 3) if rng.random() < 0.4 else 0):
        line.append(mistake(rng, flat))
    return primary, line


def mistake(rng: random.Random, flat: dict[str, Any]) -> str:
    """An override as someone mistypes it."""
    key = rng.choice([*flat, *explain.groups(), "optimizer", "rollout"])
    kind = rng.randrange(4)
    if kind == 0:
        return f"{rng.choice(['', '+', '++', '~'])}{key}={rng.choice(ODD)}"
    if kind == 1:
        cut = rng.randrange(len(key))
        return f"{key[:cut]}{rng.choice('xz_.')}{key[cut:]}=1"
    if kind == 2:
        return f"{rng.choice(explain.groups())}={rng.choice(['nosuch', 'Motion', 'tiny/x', '1', '[1,2]', 'a,b'])}"
    return rng.choice([key, f"{key}=", f"={key}", f"{key}==1", f"{key}=1=2", "@", f"{key}@x=1", "~" + key])


def reward_string(rng: random.Random) -> str:
    """A sum, whole, damaged, or noise."""
    text = reward_sum(rng)
    kind = rng.randrange(4)
    if kind == 0:
        return text
    if kind == 1:  # one slip of the finger
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.choice("+*-.e0nx /@:=,'\"[]{}$ ~") + text[at + rng.randrange(2) :]
    if kind == 2:
        odd = (
            "",
            "nosuch",
            "motion",
            "nan",
            "inf",
            "*",
            "2",
            "1e5",
            "motion*2",
            "-motion",
            "2*3*motion",
            "none",
            "null",
        )
        return "+".join(rng.choice(odd) for _ in range(rng.randrange(1, 4)))
    return "".join(rng.choice("motinaeshc+*.-0123e _/\\") for _ in range(rng.randrange(0, 24)))


def defaults_of(primary: str) -> set[str]:
    """Groups in a primary's list of defaults."""
    text = (CONF / f"{primary}.yaml").read_text() + (CONF / "config.yaml").read_text()
    return set(re.findall(r"^  - (?:override )?(\w+)", text, re.M))


def outcome(primary: str, line: list[str]) -> Outcome:
    """Compose and validate as the command line does. What is neither a plan nor a refusal is raised."""
    began = time.process_time()
    try:
        check(line)
        plan, refusal = validate(compose(primary, line), primary), ""
    except (HydraException, ValueError, OSError) as error:
        plan, refusal = None, readable(error, partial(known, primary))
    return Outcome(plan, refusal, time.process_time() - began)


@lru_cache
def known(primary: str) -> list[str]:
    """As `explain.known_keys`, within the tests' own Hydra."""
    flat = defaults(primary)
    return [*flat, *{key.split(".")[0] for key in flat}, *explain.groups()]


def in_tree(action: Callable[[], Any]) -> Any:
    """Run with Hydra at this repository's tree."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return action()


def names_its_key(refusal: str, line: list[str]) -> bool:
    """Whether a refusal says what it is about: a key or group of the line, or, of a rule between settings, any key."""
    given = [re.split(r"[=@]", text.lstrip("+~"))[0] for text in line]
    words = {word for key in given for word in (key, key.split(".")[-1], key.split(".")[0]) if word}
    words |= set(explain.groups())
    keyed = re.search(r"\b[a-z_]+(\.[a-z_0-9]+)+\b|\b[a-z_]+=", refusal) is not None
    return keyed or any(re.search(rf"\b{re.escape(word)}\b", refusal) for word in words)


def run(lines: int, sums: int, first: int = 0) -> dict[str, Any]:
    """Generate and judge; what is wrong, and the seeds of the command lines that are valid."""
    wrong: list[str] = []
    valid: list[int] = []
    accepted = 0
    for seed in range(first, first + lines):
        primary, line = command_line(random.Random(seed))
        found = outcome(primary, line)
        wrong += faults(f"{primary} {line}", found, line)
        valid += [seed] if found.plan is not None else []
    for seed in range(first, first + sums):
        line = [f"reward={reward_string(random.Random(seed))}"]
        found = outcome("grpo", line)
        wrong += faults(str(line), found, ["reward"])
        accepted += found.plan is not None
    heavy = sorted({"torch", "diffusers", "transformers", "cv2", "av"} & set(sys.modules))
    return {"wrong": wrong, "valid": valid, "sums": accepted, "imported": heavy}


def faults(what: str, found: Outcome, line: list[str]) -> list[str]:
    """What is wrong with an outcome: more than a second, more than one line, or a refusal that names no key."""
    slow = [f"{what}: {found.seconds:.2f} s"] if found.seconds >= 1 else []
    long = [f"{what}: {found.refusal}"] if "\n" in found.refusal else []
    vague = found.plan is None and not names_its_key(found.refusal, line)
    return slow + long + ([f"{what}: names no key: {found.refusal}"] if vague else [])


if __name__ == "__main__":
    print(json.dumps(in_tree(partial(run, *map(int, sys.argv[1:])))))
