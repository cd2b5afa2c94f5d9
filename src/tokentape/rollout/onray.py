"""Episodes as Ray tasks: each reads its samples itself and leaves them in the object store as Arrow."""

# pyright: reportMissingImports=false, reportMissingTypeStubs=false
import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from tokentape.errors import ConfigError, EpisodeFailed, EpisodeTimeout, GatewayError
from tokentape.rollout.attempt import failure, perform, settle, unbroken
from tokentape.rollout.control import Control
from tokentape.rollout.records import Attempt, EpisodeFailure, Finished, Settings

_OLDEST = (2, 49)
_CANCEL_S = 10.0
_BEAT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class OnRay:
    """Run each episode as a Ray task: `rollouts(…, on=OnRay(num_cpus=0.5))`.

    Ray is initialised with `init` if it is not yet. `num_cpus` is what one episode takes of its node;
    `options` are other options of a Ray task (`resources`, `runtime_env`, …).
    """

    num_cpus: float = 0.1
    init: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


class RayRunner:
    """The runner that starts Ray tasks. One that dies with its worker is looked after from here.

    Raises:
        ConfigError: Ray is not there, or too old.
    """

    def __init__(self, control: Control, settings: Settings, on: OnRay) -> None:
        self._ray = _ray()
        self._control = control
        self._settings = settings
        if not self._ray.is_initialized():
            self._ray.init(**on.init)
        self._there = self._ray.put(settings)
        options = {"num_cpus": on.num_cpus, **on.options, "num_returns": 2, "max_retries": 0}
        self._perform = self._ray.remote(**options)(_perform)
        self._recover = self._ray.remote(**options)(_recover)

    async def run(self, attempt: Attempt) -> Finished | EpisodeFailure:
        """Run an attempt as a task. If that dies, what became of the session is asked, not guessed."""
        started = time.monotonic()
        said, samples = self._perform.remote(self._there, attempt)
        try:
            outcome = await said
        except asyncio.CancelledError:
            await unbroken(self._stop(said, attempt))
            raise
        except self._ray.exceptions.RayError as error:
            if isinstance(error, GatewayError):
                raise
            return await self._died(attempt, error, time.monotonic() - started)
        return replace(outcome, samples=samples) if isinstance(outcome, Finished) else outcome

    async def recover(self, session_id: str) -> Finished | None:
        """Fetch it in a task."""
        said, samples = self._recover.remote(self._there, session_id)
        try:
            outcome = await said
        except self._ray.exceptions.RayError as error:
            if isinstance(error, GatewayError):
                raise
            return await self._settled(session_id)
        return None if outcome is None else replace(outcome, samples=samples)

    def resolve(self, samples: Sequence[Any]) -> Sequence[pa.Table]:
        """Read tables from the object store; their arrays stay in it."""
        return self._ray.get(list(samples))

    async def _died(self, attempt: Attempt, error: Exception, elapsed_s: float) -> Finished | EpisodeFailure:
        if (finished := await self._settled(attempt.session_id)) is not None:
            return finished
        if elapsed_s >= self._settings.deadline_s:
            return failure(
                attempt, EpisodeTimeout(f"its Ray task died behind its deadline: {error}"), elapsed_s
            )
        return failure(
            attempt, EpisodeFailed(f"its Ray task died: {type(error).__name__}: {error}"), elapsed_s
        )

    async def _settled(self, session_id: str) -> Finished | None:
        finished = await settle(self._control, session_id)
        return None if finished is None else replace(finished, samples=self._ray.put(finished.samples))

    async def _stop(self, said: Any, attempt: Attempt) -> None:
        """Cancel a task, which then deletes its session; where it does not, it is killed, and we do."""
        self._ray.cancel(said, force=False)
        over, _ = await asyncio.to_thread(self._ray.wait, [said], timeout=_CANCEL_S)
        if not over:
            self._ray.cancel(said, force=True)
        with contextlib.suppress(GatewayError, TimeoutError):  # it stays open; whoever resumes deletes it
            async with asyncio.timeout(_CANCEL_S):
                if await self._control.finished(attempt.session_id) is None:
                    await self._control.delete(attempt.session_id)


def _ray() -> Any:
    """The package, imported when it is asked for.

    Raises:
        ConfigError: it is not there, or too old.
    """
    needed = f"episodes on Ray need ray {'.'.join(map(str, _OLDEST))} or newer: pip install 'tokentape[ray]'"
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"{needed} ({error})") from error
    ray_: Any = ray
    if tuple(map(int, ray_.__version__.split(".")[:2])) < _OLDEST:
        raise ConfigError(f"{needed} (this is {ray_.__version__})")
    return ray_


# -- in the Ray worker


def _perform(settings: Settings, attempt: Attempt) -> tuple[Finished | EpisodeFailure, pa.Table | None]:
    async def run() -> Finished | EpisodeFailure:
        async with _watched(settings) as control:
            return await perform(control, settings, attempt)

    return _apart(asyncio.run(run()))


def _recover(settings: Settings, session_id: str) -> tuple[Finished | None, pa.Table | None]:
    async def run() -> Finished | None:
        async with Control(settings) as control:
            return await settle(control, session_id)

    return _apart(asyncio.run(run()))


def _apart(outcome: Any) -> tuple[Any, pa.Table | None]:
    """The samples become an object of their own, which goes to who reads it."""
    return (
        (replace(outcome, samples=None), outcome.samples)
        if isinstance(outcome, Finished)
        else (outcome, None)
    )


@contextlib.asynccontextmanager
async def _watched(settings: Settings) -> AsyncGenerator[Control]:
    """A loop that an agent blocks beyond its deadline cannot cancel it: then the worker ends itself."""
    last = time.monotonic()

    async def beat() -> None:
        nonlocal last
        while True:
            last = time.monotonic()
            await asyncio.sleep(_BEAT_S)

    def blocked() -> bool:
        return time.monotonic() - last > settings.deadline_s + 2 * _BEAT_S

    beating = asyncio.create_task(beat())
    try:
        with _ending(blocked):
            async with Control(settings) as control:
                yield control
    finally:
        beating.cancel()


@contextlib.contextmanager
def _ending(when: Callable[[], bool]) -> Generator[None]:
    """End the process, at once and without asking anyone, when it is so."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_BEAT_S):
            if when():
                os._exit(1)

    thread = threading.Thread(target=watch, name="tokentape-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
