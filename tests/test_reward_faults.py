"""Fifteen ways in which a reward fails, under the three policies: what docs/rewards.md says happens, in time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.advantages import group_advantage, group_valid
from rewards.base import Reward, RewardFailed, RewardTerm
from rewards.composite import Composite
from rewards.remote import Remote, answer, read_answer
from tests.moving import asking, line
from tests.test_remote import free_port, served

pytest.importorskip("uvicorn")
# Two groups of two samples of two latent frames; faults that strike one sample strike the first.
VIDEO = torch.zeros(4, 3, 5, 8, 8)
BATCH = asking(line((1.0, 1.0), (0.1, 0.1), 5), (8, 8)).repeat(4)
GOOD = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 9]])
OTHER = torch.tensor([[10.0, 20], [30, 40], [50, 60], [70, 90]])
ANSWER = answer(RewardTerm(GOOD, GOOD > 0))
# Seconds of a call: of faults that end by the clock, and of the others.
SHORT, LONG = 0.5, 5.0
LATE = 1.2
ONE, ALL = "its group", "every group"


@dataclass(frozen=True)
class Local:
    """A reward that answers as it is told."""

    fault: str = ""
    weight: float = 2.0

    def prepare(self, context: Any) -> None:
        pass

    def score(self, video: Tensor, batch: Any) -> RewardTerm:
        value, valid = GOOD.clone(), GOOD > 0
        if self.fault == "raise":
            raise ZeroDivisionError("no one expects it")
        if self.fault in ("nan", "inf"):
            value[0, 1] = float(self.fault)
        shapes = {"wrong shape": (4, 3), "wrong length": (3, 2)}
        if self.fault in shapes:
            return RewardTerm(torch.ones(shapes[self.fault]), torch.ones(shapes[self.fault]).bool())
        if self.fault == "none":
            rows: Any = [None, *value[1:]]
            return RewardTerm(rows, valid)
        return RewardTerm(value, valid)


def service() -> Any:
    """Answers a request to /<fault>/score by failing in that way."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    late: list[str] = []

    async def trickle() -> AsyncIterator[bytes]:
        for i in range(10):
            yield ANSWER[i : i + 1]
            await asyncio.sleep(LATE / 10)
        yield ANSWER[10:]

    async def respond(request: Request) -> Response:
        await request.body()
        fault = request.path_params["fault"]
        if fault in ("hang", "late answer"):
            await asyncio.sleep(LATE)
        if fault == "late once" and not late:
            late.append(fault)
            await asyncio.sleep(LATE)
            return Response(answer(RewardTerm(OTHER, OTHER > 0)))
        if fault == "slow answer":
            return StreamingResponse(trickle())
        if fault in ("500", "429"):
            return PlainTextResponse("not now", status_code=int(fault))
        bodies = {
            "hang": b"",
            "truncated json": ANSWER[:40],
            "10 MB": ANSWER + bytes(10_000_000),
            "wrong version": ANSWER.replace(b"ardrag-reward-1", b"ardrag-reward-2"),
        }
        return Response(bodies.get(fault, ANSWER))

    return Starlette(routes=[Route("/{fault}/score", respond, methods=["POST"])])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(service()) as found:
        yield found


# fault: (how much of the batch it strikes, what is said of it)
FAULTS = {
    "raise": (ALL, "ZeroDivisionError: no one expects it"),
    "nan": (ONE, "invalid for 1 of 4 samples"),
    "inf": (ONE, "invalid for 1 of 4 samples"),
    "wrong shape": (ALL, r"its value is torch.float32 \(4, 3\), expected numbers of shape \(4, 2\)"),
    "wrong length": (ALL, r"its value is torch.float32 \(3, 2\)"),
    "none": (ALL, "its value is list"),
    "hang": (ALL, "no answer"),
    "500": (ALL, "answers 500: not now"),
    "429": (ALL, "answers 429: not now"),
    "slow answer": (ALL, "out of time"),
    "truncated json": (ALL, "a wrong answer: not a message"),
    "10 MB": (ALL, "a wrong answer: more than"),
    "refused": (ALL, "no answer .ConnectError"),
    "late answer": (ALL, "out of time"),
    "wrong version": (ALL, "not a message of ardrag-reward-1: ardrag-reward-2"),
}
LOCAL = list(FAULTS)[:6]


def deadline(fault: str) -> float:
    return SHORT if fault in ("hang", "slow answer", "late answer") else LONG


def failing(fault: str, url: str) -> Reward:
    if fault in LOCAL:
        return Local(fault)
    place = f"http://127.0.0.1:{free_port()}" if fault == "refused" else f"{url}/{fault}"
    return Remote(2.0, place, deadline=deadline(fault), retries=1, breaker=99)


def test_there_are_fifteen_and_the_service_is_right_otherwise(url: str) -> None:
    assert len(FAULTS) == 15
    assert torch.equal(Remote(url=f"{url}/none of them").score(VIDEO, BATCH).value, GOOD)


@pytest.mark.filterwarnings("ignore:reward bad failed")
@pytest.mark.parametrize("policy", ["skip the group", "drop the term", "stop"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_outcome_in_time(fault: str, policy: str, url: str) -> None:
    struck, words = FAULTS[fault]
    terms: dict[str, Reward] = {"bad": failing(fault, url), "good": Given()}
    optional = ["bad"] if policy == "drop the term" else []
    composite = Composite(terms, on_failure="stop" if policy == "stop" else "drop", optional=optional)
    began = time.monotonic()
    if policy == "stop":
        with pytest.raises(RewardFailed, match=f"^reward bad .*{words}"):
            composite.score(VIDEO, BATCH, group=2)
        assert time.monotonic() - began < deadline(fault) + 0.4
        return
    evaluated = composite.evaluate(VIDEO, BATCH)
    assert time.monotonic() - began < deadline(fault) + 0.4
    found = composite.add(evaluated, group=2)
    hit = torch.tensor([True, True, struck == ALL, struck == ALL])
    whole, without = 2 * GOOD + OTHER, OTHER
    trained = group_valid(found["valid"], 2)[:, 0]
    assert found["reward"].isfinite().all()
    assert evaluated["bad"].metrics["failed"] == (1.0 if struck == ALL else 0.25)
    if policy == "skip the group":
        assert torch.equal(trained, ~hit), "no sample of a group that was struck is learned from"
        assert torch.equal(found["reward"][trained], whole[trained])
        assert group_advantage(found["reward"], 2)[trained].isfinite().all()
    else:
        assert trained.all()
        assert torch.equal(found["reward"], torch.where(hit[:, None], without, whole)), "one sum for a whole group"


class Given:
    """A reward that works."""

    weight = 1.0

    def prepare(self, context: Any) -> None: ...

    def score(self, video: Tensor, batch: Any) -> RewardTerm:
        return RewardTerm(OTHER, OTHER > 0)


def test_a_late_answer_is_not_taken_for_the_next_one(url: str) -> None:
    remote = Remote(url=f"{url}/late once", deadline=LATE / 2, retries=0)
    with pytest.raises(RewardFailed, match="out of time"):
        remote.score(VIDEO, BATCH)
    time.sleep(LATE)
    assert torch.equal(remote.score(VIDEO, BATCH).value, GOOD)


def test_a_group_whose_terms_have_all_failed_is_dropped_although_each_is_optional() -> None:
    composite = Composite({"bad": Local("nan")}, optional=["bad"])
    assert composite.score(VIDEO, BATCH, group=2)["valid"].all(1).tolist() == [False, False, True, True]


def test_without_groups_an_optional_term_counts_for_all_samples_or_none() -> None:
    composite = Composite({"bad": Local("nan"), "good": Given()}, optional=["bad"])
    assert torch.equal(composite.score(VIDEO, BATCH)["reward"], OTHER)


def test_normalized_terms_leave_out_what_failed() -> None:
    composite = Composite({"bad": Local("nan"), "good": Given()}, "normalize_then_sum", epsilon=1e-8, optional=["bad"])
    found = composite.score(VIDEO, BATCH, group=2)["reward"]
    torch.testing.assert_close(found[:2], torch.tensor([[-1.0, -1], [1, 1]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[2:], torch.tensor([[-3.0, -3], [3, 3]]), atol=1e-5, rtol=0)


def test_failures_are_said_aloud_and_unknown_names_refused() -> None:
    with pytest.warns(UserWarning, match="reward bad failed, its groups are dropped: ZeroDivisionError"):
        Composite({"bad": Local("raise")}).score(VIDEO, BATCH)
    with pytest.warns(UserWarning, match="reward bad failed, its groups are summed without it: ZeroDivisionError"):
        Composite({"bad": Local("raise"), "good": Given()}, optional=["bad"]).score(VIDEO, BATCH)
    with pytest.raises(ValueError, match="optional names aesthetic, which is none of the terms bad"):
        Composite({"bad": Local()}, optional=["aesthetic"])


def test_an_answer_holds_numbers_of_the_right_size_only() -> None:
    assert math.prod(read_answer(ANSWER, 4, 2).value.shape) == 8
    with pytest.raises(ValueError, match="expected"):
        read_answer(ANSWER, 2, 4)
