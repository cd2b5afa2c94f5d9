"""The workers of a pool, as the control side lists and changes them."""

import asyncio

import msgspec

from tokentape.engines.base import EngineInfo
from tokentape.engines.pool import EnginePool, Worker
from tokentape.errors import NotFound, TokentapeError
from tokentape.types import Json


class WorkerAt(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /workers`."""

    url: str


class WorkerGone(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `DELETE /workers`, where its URL is not in the query. `abort`: it ends nothing first."""

    url: str = ""
    abort: bool = False


async def list_workers(pool: EnginePool | None) -> Json:
    """`GET /workers`: each worker as the pool and as it itself sees it.

    `servers` are those behind a router, and the name of the weights at each. `changes` has what was added
    (true) and removed (false) since the start.

    Raises:
        NotFound: the engine is not a pool of servers.
    """
    pool = known(pool)
    workers, num_sessions = pool.workers, pool.num_sessions()
    infos = await asyncio.gather(*(_info(worker) for worker in workers))
    return {
        "workers": [
            {
                "url": worker.url,
                "state": worker.state,
                "running": worker.num_running,
                "sessions": num_sessions.get(worker.url, 0),
                "failures_in_a_row": worker.num_failures,
                "ejections": worker.num_ejections,
                "generations": dict(worker.outcomes),
                "weight_version": info.weight_version if info else None,
                "servers": dict(info.weight_versions) if info else {},
                "last_error": worker.last_error,
            }
            for worker, info in zip(workers, infos, strict=True)
        ],
        "changes": pool.changes,
    }


def known(pool: EnginePool | None) -> EnginePool:
    """The pool.

    Raises:
        NotFound: there is none.
    """
    if pool is None:
        raise NotFound("this gateway's engine is part of it: it has no workers")
    return pool


async def _info(worker: Worker) -> EngineInfo | None:
    """What it says of itself; None where it does not answer."""
    if worker.state == "ejected":
        return None
    try:
        return await worker.engine.info()
    except TokentapeError:
        return None
