"""What a process of a gateway learns from the others that it may have missed: new weights, a pause, engines.

Orders to all are missed by one that is being started, and by one that the others believe to be gone.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import aiohttp
import msgspec

from tokentape.errors import TokentapeError
from tokentape.gateway.parts import Gateway
from tokentape.gateway.passing import PASSED_ON, Peer

log = logging.getLogger(__name__)

_ASK_S = 5.0


class _Health(msgspec.Struct):
    paused: bool
    current: bool = True


class _Workers(msgspec.Struct):
    changes: dict[str, bool] = {}


@dataclass(frozen=True, slots=True)
class Orders:
    """What all were told, as far as one process has heard it: how often to pause or resume, which engines."""

    num_pauses: int
    changes: Mapping[str, bool]


def orders(gateway: Gateway) -> Orders:
    """What this process was told until now."""
    changes = {} if gateway.pool is None else dict(gateway.pool.changes)
    return Orders(gateway.weights.num_pauses, changes)


async def catch_up(gateway: Gateway, peers: Sequence[Peer], before: Orders) -> None:
    """Be paused where the others are, know the weights that were announced, have the engines that came.

    `before` is what was told here until others could be told what is missing. What was told since then holds,
    whatever a peer says: it may be about to be told. One that may have missed something itself is believed
    only where there is no other.

    Raises:
        StoreError: the store does not say which weights there were.
    """
    await gateway.weights.load()
    peer, paused = await _ask_all(gateway, peers)
    changes: Mapping[str, bool] = {}
    if peer is not None and gateway.pool is not None:
        changes = await _changes(gateway, peer)
    now = orders(gateway)
    if now.num_pauses == before.num_pauses and paused and not gateway.engine.paused:
        gateway.engine.doubt()  # weights may have been exchanged under what runs here
        with contextlib.suppress(TokentapeError):  # the engine is away: it is paused all the same
            await gateway.engine.pause()
    elif now.num_pauses == before.num_pauses and not paused:
        gateway.engine.resume()
    was, known = before.changes, now.changes
    await _take_over(
        gateway, {url: is_in for url, is_in in changes.items() if was.get(url) == known.get(url)}
    )


async def _ask_all(gateway: Gateway, peers: Sequence[Peer]) -> tuple[Peer | None, bool]:
    """Who is to be believed, and whether it is paused: the first that has missed nothing.

    Where there is none, a pause of any holds: what waits needlessly is seen, what should have waited is not.
    """
    known, paused = None, gateway.engine.paused
    asked = [asyncio.ensure_future(_health(gateway, peer)) for peer in peers]
    try:
        async with asyncio.timeout(_ASK_S):  # side by side: a mute one costs nothing where another is sure
            for answer in asyncio.as_completed(asked):
                peer, health = await answer
                if health is not None and health.current:
                    return peer, health.paused
                if health is not None:
                    known, paused = peer, paused or health.paused
    except TimeoutError:
        log.warning("of the other gateways some do not answer, and none is sure whether there is a pause")
    finally:
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    return known, paused


async def _health(gateway: Gateway, peer: Peer) -> tuple[Peer, _Health | None]:
    try:
        return peer, msgspec.json.decode(await _get(gateway, peer, "/healthz"), type=_Health)
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
        log.debug("%s does not answer: %s", peer.url, error)
        return peer, None


async def _changes(gateway: Gateway, peer: Peer) -> Mapping[str, bool]:
    try:
        async with asyncio.timeout(_ASK_S):
            return msgspec.json.decode(await _get(gateway, peer, "/workers"), type=_Workers).changes
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
        log.warning("%s does not say which engines came and went: %s", peer.url, error)
        return {}


async def _take_over(gateway: Gateway, changes: Mapping[str, bool]) -> None:
    """Have what was added at run time and not what was removed; what either was started with is its own."""
    if gateway.pool is None:
        return
    there = {worker.url for worker in gateway.pool.workers if worker.state != "draining"}
    for url in [url for url, is_in in changes.items() if is_in and url not in there]:
        with contextlib.suppress(TokentapeError):  # it does not answer now: whoever added it sees it, too
            await gateway.pool.add(url)
    for url in [url for url, is_in in changes.items() if not is_in and url in there]:
        with contextlib.suppress(TokentapeError):
            await gateway.pool.remove(url)
    gateway.pool.changes.update(changes)  # who comes next may ask here


async def _get(gateway: Gateway, peer: Peer, path: str) -> bytes:
    key = gateway.config.api_key
    headers = PASSED_ON | ({} if key is None else {"Authorization": f"Bearer {key}"})
    async with peer.client.get(f"{peer.url}{path}", headers=headers) as answer:
        answer.raise_for_status()
        return await answer.read()
