"""`tokentape.rollouts`: a run, as its consumer sees it."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from tokentape.errors import ConfigError
from tokentape.rollout import names
from tokentape.rollout.attempt import unbroken
from tokentape.rollout.control import Control
from tokentape.rollout.driver import Driver, OnFailure, Plan
from tokentape.rollout.journal import Journal
from tokentape.rollout.local import Local
from tokentape.rollout.onray import OnRay, RayRunner
from tokentape.rollout.progress import Watch
from tokentape.rollout.records import EpisodeFunction, Group, Settings

T = TypeVar("T")
_OURS = frozenset({"session_id", "group_id", "deadline_s", "metadata"})


class Rollouts:
    """Groups as they are complete, once, asynchronously or not.

        async with rollouts(…) as groups:          with rollouts(…) as groups:
            async for group in groups: …               for group in groups: …

    Leaving the context stops what runs and deletes its sessions; the next driver of the run goes on. A group
    is delivered when the next one is asked for: the one in hand at a crash comes again, with the same
    `group_id` and the same sessions.

    Raises, while iterating:
        GatewayUnavailable: the gateway did not answer for `gateway_timeout_s`.
        GatewayRefused: it answered something that no repetition changes.
        GroupFailed: with `on_failure="raise"`, a group's episode failed for good.
        ConfigError: the run was begun with other tasks, or its journal is another's or in use.
        StoreError: the journal cannot be written.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        tasks: Iterable[Any],
        on: OnRay | None,
        journal: Path | None,
        *,
        progress: bool,
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._tasks = tasks
        self._on = on
        self._journal_path = journal
        self._progress = progress
        self._journal: Journal | None = None
        self._driver: Driver | None = None
        self._work: asyncio.Task[None] | None = None
        self._ready: asyncio.Queue[Group | None] = asyncio.Queue()
        self._in_hand: Group | None = None
        self._opened = contextlib.AsyncExitStack()
        self._thread: _LoopThread | None = None

    @property
    def run(self) -> str:
        """The run's name: what its sessions begin with, and what resumes it."""
        return self._plan.run

    # -- asynchronously

    async def __aenter__(self) -> Self:
        if self._work is not None:
            raise ConfigError("a run is iterated once: call rollouts() again to resume it")
        async with contextlib.AsyncExitStack() as opened:
            if self._journal_path is not None:
                self._journal = opened.enter_context(
                    Journal(self._journal_path, self._plan.run, self._plan.group_size)
                )
            control = await opened.enter_async_context(Control(self._settings))
            runner = (
                Local(control, self._settings)
                if self._on is None
                else RayRunner(control, self._settings, self._on)
            )
            size = len(self._tasks) * self._plan.group_size if isinstance(self._tasks, Sized) else None
            watch = opened.enter_context(Watch(shown=self._progress, total=size))
            skip = frozenset(self._journal.delivered) if self._journal is not None else frozenset[int]()
            self._driver = Driver(self._plan, control, runner, skip, self._ready.put_nowait, watch)
            self._work = asyncio.create_task(self._driver.run(self._tasks))
            self._work.add_done_callback(lambda _: self._ready.put_nowait(None))
            self._opened = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop what runs; return when its sessions are deleted."""
        if self._work is not None:
            self._work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await unbroken(_ended(self._work))
            _ = self._work.cancelled() or self._work.exception()  # somebody has looked at it
        await self._opened.aclose()

    async def __aiter__(self) -> AsyncGenerator[Group]:
        async with contextlib.AsyncExitStack() as here:
            if self._work is None:
                await here.enter_async_context(self)
            while (group := await self.next()) is not None:
                yield group

    async def next(self) -> Group | None:
        """The next group, None behind the last one; the one before it is delivered herewith."""
        if self._work is None or self._driver is None:
            raise ConfigError("a run is iterated inside `async with` or `with`")
        if self._in_hand is not None:
            if self._journal is not None:
                await unbroken(asyncio.to_thread(self._journal.mark, self._in_hand.index))
            self._in_hand = None
            self._driver.taken()
        group = await self._ready.get()
        if group is None:
            self._ready.put_nowait(None)  # it is the end also for who asks again
            return None if self._work.cancelled() else self._work.result()
        self._in_hand = group
        return group

    # -- for a trainer that has no event loop

    def __enter__(self) -> Self:
        self._thread = _LoopThread()
        try:
            self._thread.call(self.__aenter__())
        except BaseException:
            self._thread.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            try:
                self._thread.call(self.aclose())
            finally:
                self._thread.stop()
                self._thread = None

    def __iter__(self) -> Generator[Group]:
        with contextlib.ExitStack() as here:
            if self._thread is None:
                here.enter_context(self)
            while self._thread is not None and (group := self._thread.call(self.next())) is not None:
                yield group


class _LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tokentape-rollouts", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there, and wait for it; interrupted, cancel it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})


def rollouts(
    episode_fn: EpisodeFunction | Sequence[str],
    tasks: Iterable[Any],
    *,
    gateway: str = "http://127.0.0.1:8000",
    api_key: str | None = None,
    group_size: int = 1,
    concurrency: int = 16,
    deadline_s: float = 3600.0,
    retries: int = 2,
    on_failure: OnFailure = "drop",
    on: Literal["local", "ray"] | OnRay = "local",
    run: str | None = None,
    journal: str | Path | Literal[False] | None = None,
    ahead: int = 4,
    session: Mapping[str, Any] | None = None,
    model: str = "policy",
    gateway_timeout_s: float = 300.0,
    progress: bool = True,
) -> Rollouts:
    """Run `group_size` episodes of every task through a gateway, and deliver the groups that are complete.

    Nothing runs before the result is entered or iterated.

    Args:
        episode_fn: an async function `(task, episode) -> reward | Result`, or a command and its arguments.
        tasks: one a group; any iterable, read as far as there is room. A command is given its task as JSON.
        gateway: where the gateway listens.
        api_key: the gateway's key, where it has one; agents get their session's own.
        group_size: episodes of a task; they have one `group_id`.
        concurrency: episodes that run at a time.
        deadline_s: seconds for an attempt, also the session's `deadline_s`; one that is late is stopped, and
            has failed.
        retries: further attempts after one that failed, each in a session of its own.
        on_failure: a group with an episode whose attempts all failed is delivered empty, its other episodes
            deleted ("drop"), or with what there is ("keep"), in both cases with its failures and not
            `complete`; or ends the run ("raise").
        on: "local", this process; "ray" or `OnRay(…)`, a Ray task each.
        run: a name makes the run resumable: the same call again goes on where the last one ended or died.
            Tasks must come in the same order.
        journal: the file that says which groups are delivered; None: `RUN.rollouts.jsonl` for a run with a
            name; False: none, and a resumed run delivers all finished groups again.
        ahead: groups that may wait for the consumer, beside those whose episodes run.
        session: what else `POST /sessions` takes: `sampling`, `max_turns`, `max_tokens`.
        model: the model's name, for agents that must say one.
        gateway_timeout_s: seconds that the gateway may be away before the run ends.
        progress: show a bar where stderr is a terminal.

    Raises:
        ConfigError: an option cannot be used.
    """
    _check(group_size=group_size, concurrency=concurrency, deadline_s=deadline_s, retries=retries + 1)
    _check(ahead=ahead + 1, gateway_timeout_s=gateway_timeout_s)
    if on_failure not in ("drop", "keep", "raise"):
        raise ConfigError(f"on_failure {on_failure!r}: it is drop, keep or raise")
    if not (isinstance(on, OnRay) or on in ("local", "ray")):
        raise ConfigError(f"on {on!r}: it is local, ray or OnRay(…)")
    if not gateway.startswith(("http://", "https://")):
        raise ConfigError(f"gateway {gateway!r}: it is a URL, http://HOST:PORT")
    if taken := _OURS & set(session or {}):
        raise ConfigError(f"session: {', '.join(sorted(taken))} is set here, not by the caller")
    path = None if run is None else Path(f"{run}.rollouts.jsonl")
    if journal is not None:
        path = Path(journal) if journal is not False else None
    if run is None and path is not None:
        raise ConfigError("a journal is for a run with a name: give run=…")
    return Rollouts(
        Plan(
            run=names.new_run() if run is None else names.checked_run(run),
            group_size=group_size,
            concurrency=concurrency,
            retries=retries,
            on_failure=on_failure,
            ahead=ahead,
        ),
        Settings(
            gateway=gateway,
            api_key=api_key,
            model=model,
            deadline_s=deadline_s,
            gateway_timeout_s=gateway_timeout_s,
            session=dict(session or {}),
            work=_work(episode_fn),
        ),
        tasks,
        on if isinstance(on, OnRay) else OnRay() if on == "ray" else None,
        path,
        progress=progress,
    )


def _check(**positive: float) -> None:
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{name} is {value}: it must be more than 0")


def _work(episode_fn: EpisodeFunction | Sequence[str]) -> EpisodeFunction | tuple[str, ...]:
    if callable(episode_fn):
        return episode_fn
    if isinstance(episode_fn, str) or not episode_fn:
        raise ConfigError("a command is a list of its words, such as ['python', 'agent.py']")
    return tuple(episode_fn)
