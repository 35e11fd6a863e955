"""A small HTTP service around local rewards; `rewards/remote.py` is its client."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewards.base import RewardFailed, RewardTerm
from rewards.composite import Composite, metrics_of
from rewards.remote import answer, known_clip, read_request

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response


@dataclass(frozen=True)
class Service:
    """Where the rewards are served.

    Attributes:
        host: address; 0.0.0.0 answers the whole network, so protect it.
        port: TCP port.
    """

    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"stage.port must lie in 1 .. 65535, got {self.port}")


def total(rewards: Composite, body: bytes) -> bytes:
    """Score a request by the weighted sum; the answer's metrics are the terms'.

    Raises:
        ValueError: not a request.
        RewardFailed: a term failed, or no sample could be scored.
    """
    video, batch = read_request(body)
    terms = rewards.evaluate(video, batch)
    found = rewards.add(terms)
    if not bool(found["valid"].any()):
        raise RewardFailed("no sample could be scored; the service's own messages say why")
    return answer(RewardTerm(found["reward"], found["valid"], metrics_of(terms)))


def application(rewards: Composite, largest: int = 2**30) -> Starlette:
    """`POST /score` takes a request, `GET /health` scores a known clip (503 where it cannot). One call is computed at a
    time, and none whose client has given up.

    Args:
        rewards: prepared.
        largest: bytes of a request; longer ones are refused.
    """
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    turn = asyncio.Lock()

    async def score(request: Request) -> Response:
        refused = PlainTextResponse(f"a request may have {largest} bytes", status_code=413)
        said = request.headers.get("content-length", "")
        if said.isdigit() and int(said) > largest:
            return refused
        body = bytearray()
        async for part in request.stream():  # the header need not say how much will come
            body += part
            if len(body) > largest:
                return refused
        whole = bytes(body)
        body.clear()
        await request.is_disconnected()  # a large body stops uvicorn's reading, and so its ears; asking starts it again
        try:
            async with turn:
                if await request.is_disconnected():  # nobody waits for it any more
                    return Response(status_code=499)
                found = await asyncio.to_thread(total, rewards, whole)
        except ValueError as error:
            return PlainTextResponse(str(error), status_code=400)
        except RewardFailed as error:
            return PlainTextResponse(str(error), status_code=503)
        return Response(found, media_type="application/octet-stream")

    async def health(request: Request) -> Response:
        clip, batch = known_clip()
        async with turn:
            found = await asyncio.to_thread(rewards.score, clip, batch)
        known = {"terms": sorted(rewards.terms), "known clip": found["reward"][0].tolist()}
        return JSONResponse(known, status_code=200 if bool(found["valid"].all()) else 503)

    return Starlette(routes=[Route("/score", score, methods=["POST"]), Route("/health", health)])
