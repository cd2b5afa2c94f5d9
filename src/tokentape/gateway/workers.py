"""The workers of a pool, as the control side lists and changes them."""

import asyncio

import msgspec

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

    Raises:
        NotFound: the engine is not a pool of servers.
    """
    pool = known(pool)
    workers, num_sessions = pool.workers, pool.num_sessions()
    versions = await asyncio.gather(*(_version(worker) for worker in workers))
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
                "weight_version": version,
                "last_error": worker.last_error,
            }
            for worker, version in zip(workers, versions, strict=True)
        ]
    }


def known(pool: EnginePool | None) -> EnginePool:
    """The pool.

    Raises:
        NotFound: there is none.
    """
    if pool is None:
        raise NotFound("this gateway's engine is part of it: it has no workers")
    return pool


async def _version(worker: Worker) -> str | None:
    """What it samples with; None where it does not answer."""
    if worker.state == "ejected":
        return None
    try:
        return (await worker.engine.info()).weight_version
    except TokentapeError:
        return None
