"""A reward over HTTP says what it says locally, and a service that fails never counts as zero."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards.base import RewardContext, RewardFailed, RewardTerm, latent_frames
from rewards.composite import Composite
from rewards.motion import Motion
from rewards.remote import Remote, answer, known_clip, read_answer, read_request, request
from rewards.smoothness import Smoothness
from runtime.reward_server import Service, application
from tests.moving import asking, line, render
from tracking.ncc import NCC

pytest.importorskip("uvicorn")
CONTEXT = RewardContext("cpu", NCC(), Path("assets"))
PATH = line((8.0, 9.0), (0.7, 0.6))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served(app: Any) -> Iterator[str]:
    """An application on a port of its own."""
    import uvicorn

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def local(**terms: Any) -> Composite:
    found = Composite(terms=terms, on_failure="stop")
    found.prepare(CONTEXT)
    return found


def plain(path: str, respond: Any) -> Any:
    """A service of one route."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    return Starlette(routes=[Route(path, respond, methods=["POST"])])


def test_a_request_holds_what_a_reward_may_see_and_nothing_else() -> None:
    clip = render(PATH)
    control = asking(PATH, video=clip).repeat(2)
    video, batch = read_request(request(clip[None].repeat(2, 1, 1, 1, 1), control))
    torch.testing.assert_close(video[0], clip, atol=1e-3, rtol=0)
    assert torch.equal(batch.trajectory.xy, control.trajectory.xy) and batch.prompts == control.prompts
    assert torch.equal(batch.video[:, :, 0], control.video[:, :, 0])
    assert torch.equal(batch.video[:, :, -1], control.video[:, :, 0]), "later true frames do not travel"


ANSWER = answer(RewardTerm(torch.zeros(1, 2), torch.ones(1, 2) > 0))


@pytest.mark.parametrize("body", [b"", b"\x80\x04pickle", b"\xff" * 64, ANSWER])
def test_what_is_not_a_request_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a message of ardrag-reward-1"):
        read_request(body)
    with pytest.raises(ValueError, match="expected"):
        read_answer(ANSWER, 2, 2)


def test_a_served_sum_says_what_it_says_locally() -> None:
    rewards = local(motion=Motion(), smoothness=Smoothness(weight=0.5))
    clip = render(PATH)[None].repeat(2, 1, 1, 1, 1)
    control = asking(PATH, video=render(PATH)).repeat(2)
    expected = rewards.score(clip, control)
    with served(application(rewards)) as url:
        remote = Remote(url=url)
        remote.prepare(CONTEXT)
        term = remote.score(clip, control)
    torch.testing.assert_close(term.value, expected["reward"], atol=2e-3, rtol=0)
    assert torch.equal(term.valid, expected["valid"]) and term.metrics["motion/error_px"] < 1


def test_health_scores_a_known_clip() -> None:
    import httpx

    rewards = local(motion=Motion())
    with served(application(rewards)) as url:
        found = httpx.get(f"{url}/health").json()
    clip, batch = known_clip()
    assert found == {"terms": ["motion"], "known clip": rewards.score(clip, batch)["reward"][0].tolist()}
    assert found["known clip"][1] > 4, "the square is where it was asked to go"


class Broken:
    """A reward whose network does not fit its card."""

    weight = 1.0

    def prepare(self, context: RewardContext) -> None: ...

    def score(self, video: Tensor, batch: Any) -> RewardTerm:
        raise RuntimeError("out of memory")


@pytest.mark.filterwarnings("ignore:reward broken failed")
def test_a_service_that_cannot_score_is_not_healthy_and_not_valid() -> None:
    import httpx

    with served(application(Composite(terms={"broken": Broken()}))) as url:
        assert httpx.get(f"{url}/health").status_code == 503
        with pytest.raises(ValueError, match="answers 503: no sample could be scored"):
            Remote(url=url, retries=0).prepare(CONTEXT)


@dataclass
class Slow:
    """A reward that takes its time; `calls` says how often it was asked."""

    seconds: float
    calls: int = 0
    weight: float = 1.0

    def prepare(self, context: RewardContext) -> None: ...

    def score(self, video: Tensor, batch: Any) -> RewardTerm:
        self.calls += 1
        time.sleep(self.seconds)
        value = torch.zeros(len(video), latent_frames(video.shape[2]))
        return RewardTerm(value, value == 0)


def test_a_service_does_not_work_for_clients_that_have_given_up() -> None:
    slow = Slow(seconds=2.0)
    clip, control = render(PATH)[None], asking(PATH)
    with served(application(Composite(terms={"slow": slow}))) as url:
        impatient, patient = Remote(url=url, retries=0, deadline=0.8, breaker=9), Remote(url=url, deadline=30.0)
        patient.score(clip, control)  # the first request imports what later ones need
        ask = [threading.Thread(target=_refused, args=(impatient, clip, control)) for _ in range(4)]
        for thread in ask:
            thread.start()
        for thread in ask:
            thread.join()
        patient.score(clip, control)
    assert slow.calls == 3, "of the impatient ones the first only"


def _refused(remote: Remote, clip: Tensor, control: Any) -> None:
    with pytest.raises(RewardFailed):
        remote.score(clip, control)


@pytest.mark.parametrize(("value", "valid"), [(1.0, False), (math.nan, True)])
def test_a_service_that_has_no_score_for_the_known_clip_is_refused(value: float, valid: bool) -> None:
    from starlette.responses import Response

    term = RewardTerm(torch.full((1, 2), value), torch.full((1, 2), valid))

    async def respond(request: Any) -> Response:
        return Response(answer(term))

    with served(plain("/score", respond)) as url, pytest.raises(ValueError, match="does not score a known clip"):
        Remote(url=url).prepare(CONTEXT)


def test_a_large_request_is_cut_off_whatever_its_header_says() -> None:
    import httpx

    def parts() -> Iterator[bytes]:
        for _ in range(50):
            yield bytes(100)

    with served(application(local(motion=Motion()), largest=1000)) as url:
        assert httpx.post(f"{url}/score", content=parts()).status_code == 413  # in pieces, without a length
        assert httpx.post(f"{url}/score", content=bytes(900)).status_code == 400


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fps": None}, "fps must be positive"),
        ({"prompts": ["one"]}, "prompts must be 2 texts"),
        ({"first": torch.zeros(3, 1, 32, 32)}, "first is .3, 1, 32, 32."),
        ({"presence": torch.ones(2, 1, 16, dtype=torch.bool)}, "presence is .2, 1, 16., expected .2, 1, 17."),
        ({"xy": torch.zeros(2, 1, 17, 3)}, "xy is .2, 1, 17, 3."),
    ],
)
def test_a_request_whose_parts_do_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    from safetensors.torch import load, save

    body = request(render(PATH)[None].repeat(2, 1, 1, 1, 1), asking(PATH).repeat(2))
    size = int.from_bytes(body[:8], "little")
    note = json.loads(body[8 : 8 + size])["__metadata__"]
    tensors, text = load(body), json.loads(note["text"])
    for name, value in change.items():
        (tensors if isinstance(value, Tensor) else text)[name] = value
    with pytest.raises(ValueError, match=words):
        read_request(save(tensors, {**note, "text": json.dumps(text)}))


@pytest.mark.parametrize("text", [{}, {"metrics": None}, {"metrics": {"a": "high"}}, {"metrics": [1.0]}])
def test_metrics_that_are_no_numbers_are_a_wrong_answer(text: dict[str, Any]) -> None:
    from safetensors.torch import save

    tensors = {"value": torch.ones(1, 2), "valid": torch.ones(1, 2) > 0}
    with pytest.raises(ValueError, match="metrics are not numbers"):
        read_answer(save(tensors, {"format": "ardrag-reward-1", "text": json.dumps(text)}), 1, 2)


def test_a_failing_service_is_asked_again_then_left_alone() -> None:
    from starlette.responses import PlainTextResponse, Response

    calls: list[float] = []

    async def respond(request: Any) -> Response:
        calls.append(time.monotonic())
        if len(calls) == 2:
            return Response(answer(RewardTerm(torch.ones(1, 5), torch.ones(1, 5) > 0)))
        return PlainTextResponse("out of memory\non the card", status_code=500)

    clip, control = render(PATH)[None], asking(PATH)
    with served(plain("/score", respond)) as url:
        remote = Remote(url=url, retries=1, breaker=2, cooldown=0.3, deadline=5.0)
        assert remote.score(clip, control).value.sum() == 5, "the second attempt"
        for _ in range(2):
            with pytest.raises(RewardFailed, match="answers 500: out of memory on the card"):
                remote.score(clip, control)
        asked = len(calls)
        with pytest.raises(RewardFailed, match="2 calls in a row failed"):
            remote.score(clip, control)
        assert len(calls) == asked == 6
        time.sleep(0.35)
        with pytest.raises(RewardFailed, match="answers 500"):
            remote.score(clip, control)
        assert len(calls) == asked + 2, "a trial after the cooldown"


def test_a_request_that_the_service_refuses_is_not_repeated() -> None:
    rewards = local(motion=Motion())
    with served(application(rewards, largest=100)) as url, pytest.raises(RewardFailed, match="answers 413"):
        Remote(url=url).score(render(PATH)[None], asking(PATH))


def test_a_slow_or_absent_service_fails_within_the_deadline() -> None:
    import asyncio

    from starlette.responses import Response

    async def respond(request: Any) -> Response:
        await asyncio.sleep(1.0)
        return Response(b"")

    clip, control = render(PATH)[None], asking(PATH)
    with served(plain("/score", respond)) as url:
        began = time.monotonic()
        with pytest.raises(RewardFailed, match=r"no answer"):
            Remote(url=url, deadline=0.4).score(clip, control)
        assert time.monotonic() - began < 0.9
    absent = Remote(url=f"http://127.0.0.1:{free_port()}", retries=0)
    with pytest.raises(ValueError, match="start it with experiments"):
        absent.prepare(CONTEXT)


def test_a_service_that_contradicts_itself_is_refused() -> None:
    from starlette.responses import Response

    async def respond(request: Any) -> Response:
        return Response(answer(RewardTerm(torch.rand(1, 2), torch.ones(1, 2) > 0)))

    with served(plain("/score", respond)) as url, pytest.raises(ValueError, match="differently when asked twice"):
        Remote(url=url).prepare(CONTEXT)


def test_what_a_service_calls_invalid_is_invalid() -> None:
    class Half:
        weight = 1.0

        def prepare(self, context: RewardContext) -> None: ...

        def score(self, video: Tensor, batch: Any) -> RewardTerm:
            valid = torch.arange(len(video))[:, None].expand(-1, 5) == 0
            return RewardTerm(torch.ones(len(video), 5), valid)

    with served(application(Composite(terms={"half": Half()}))) as url:
        term = Remote(url=url).score(render(PATH)[None].repeat(2, 1, 1, 1, 1), asking(PATH).repeat(2))
    assert term.valid[0].all() and not term.valid[1].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "localhost:8000"}, "must be an address such as http"),
        ({"url": "http://127.0.0.1:80a"}, "must be an address such as http"),
        ({"url": "http://[::1"}, "must be an address such as http"),
        ({"url": "http://\x7fhost:80"}, "must be an address such as http"),
        ({"url": "http://my host:80"}, "must be an address such as http"),
        ({"deadline": 0.0}, "deadline must be positive"),
        ({"breaker": 0}, "breaker at least 1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Remote(**settings)
    with pytest.raises(ValueError, match=r"stage\.port"):
        Service(port=0)
