"""What a process of a gateway that starts learns from the others: a pause, and engines that came or went."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import aiohttp
import msgspec

from tokentape.errors import TokentapeError
from tokentape.gateway.parts import Gateway
from tokentape.gateway.passing import PASSED_ON, Peer

log = logging.getLogger(__name__)

_ASK_S = 10.0


class _Health(msgspec.Struct):
    paused: bool


class _Worker(msgspec.Struct):
    url: str
    state: str


class _Workers(msgspec.Struct):
    workers: list[_Worker]


async def catch_up(gateway: Gateway, peers: Sequence[Peer]) -> None:
    """Be paused where the others are, and have their engines; the first that answers is believed.

    One that is asked to pause at this moment asks all that it knows of: whoever catches up is known already.
    """
    for peer in peers:
        try:
            async with asyncio.timeout(_ASK_S):
                paused = msgspec.json.decode(await _get(gateway, peer, "/healthz"), type=_Health).paused
                workers = None
                if gateway.pool is not None:
                    workers = msgspec.json.decode(await _get(gateway, peer, "/workers"), type=_Workers)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            log.debug("%s does not answer, another is asked: %s", peer.url, error)
            continue
        if paused:
            with contextlib.suppress(TokentapeError):  # the engine is away: it is paused all the same
                await gateway.weights.pause()
        if workers is not None:
            await _take_over(gateway, {one.url for one in workers.workers if one.state != "draining"})
        return


async def _take_over(gateway: Gateway, urls: set[str]) -> None:
    assert gateway.pool is not None  # noqa: S101  # who asks knows
    known = {worker.url for worker in gateway.pool.workers}
    for url in sorted(urls - known):
        with contextlib.suppress(TokentapeError):  # it does not answer now: whoever added it sees it, too
            await gateway.pool.add(url)
    for url in sorted(known - urls):
        with contextlib.suppress(TokentapeError):
            await gateway.pool.remove(url)


async def _get(gateway: Gateway, peer: Peer, path: str) -> bytes:
    key = gateway.config.api_key
    headers = PASSED_ON | ({} if key is None else {"Authorization": f"Bearer {key}"})
    async with peer.client.get(f"{peer.url}{path}", headers=headers) as answer:
        answer.raise_for_status()
        return await answer.read()
