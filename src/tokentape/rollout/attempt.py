"""One attempt: a session is opened, its agent runs, and it is finished or deleted. Nothing between."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, SupportsFloat, TypeVar

from tokentape.errors import (
    EpisodeEmpty,
    EpisodeFailed,
    EpisodeResultWrong,
    EpisodeTimeout,
    GatewayError,
    GatewayRefused,
)
from tokentape.rollout.command import run_command
from tokentape.rollout.control import Control
from tokentape.rollout.records import Attempt, Episode, EpisodeFailure, Finished, Result, Settings

log = logging.getLogger(__name__)
T = TypeVar("T")

_GRACE_S = 5.0
_GIVE_UP_S = 5.0
_LONGEST_MESSAGE = 1000


async def perform(control: Control, settings: Settings, attempt: Attempt) -> Finished | EpisodeFailure:
    """Run an attempt to its end.

    Finished: its session is in the store, whole. Failed, or cancelled: its session is deleted, and will never
    be finished.

    Raises:
        GatewayError: the gateway is gone or refuses; what became of the session must be asked another time.
    """
    started = time.monotonic()
    try:
        result = await _played(control, settings, attempt)
        await unbroken(_finish(control, attempt, result), give_up_s=_GIVE_UP_S)
        return await collect(control, attempt.session_id, result.reward)
    except EpisodeFailed as error:
        await unbroken(control.delete(attempt.session_id), give_up_s=_GIVE_UP_S)
        log.info("episode %s failed: %s", attempt.session_id, error, exc_info=error.__cause__)
        elapsed_s = time.monotonic() - started
        await control.ready()  # an attempt that an outage has spoiled is not held against the episode
        return failure(attempt, error, elapsed_s, outage=control.last_away >= started)


async def collect(control: Control, session_id: str, reward: float | None) -> Finished:
    """The samples of a finished session.

    Raises:
        EpisodeEmpty: there are none.
    """
    table = await control.samples(session_id)
    if not table.num_rows:
        raise EpisodeEmpty("the agent took no turn: there is nothing to train")
    return Finished(session_id=session_id, reward=reward, num_samples=table.num_rows, samples=table)


async def settle(control: Control, session_id: str) -> Finished | None:
    """What became of an attempt that nobody watched to its end; deleted unless it is finished and whole."""
    if (reward := await control.finished(session_id)) is not None:
        with contextlib.suppress(EpisodeEmpty):
            return await collect(control, session_id, *reward)
    await control.delete(session_id)
    return None


def failure(
    attempt: Attempt, error: EpisodeFailed, elapsed_s: float, *, outage: bool = False
) -> EpisodeFailure:
    """The record of a failed attempt."""
    return EpisodeFailure(
        kind=error.kind,
        message=str(error)[:_LONGEST_MESSAGE],
        session_id=attempt.session_id,
        member=attempt.member,
        attempt=attempt.number,
        elapsed_s=elapsed_s,
        outage=outage,
    )


async def _played(control: Control, settings: Settings, attempt: Attempt) -> Result:
    """Open the session and run the agent. Cancelled, it leaves no session behind."""
    try:
        opened = await control.create(attempt)
        episode = Episode(
            base_url=opened.base_url,
            api_key=opened.api_key or "not-needed",
            model=settings.model,
            task=attempt.task,
            session_id=attempt.session_id,
            group_id=attempt.group_id,
            index=attempt.index,
            member=attempt.member,
            attempt=attempt.number,
            deadline_s=settings.deadline_s,
        )
        return _checked(await _within(settings, episode))
    except asyncio.CancelledError:
        try:
            await unbroken(control.delete(attempt.session_id, within_s=_GIVE_UP_S))
        except GatewayError as error:
            log.warning("session %s stays open: %s", attempt.session_id, error)
        raise


async def _within(settings: Settings, episode: Episode) -> object:
    """What the agent returns, before its deadline."""
    running = asyncio.ensure_future(_work(settings, episode))
    try:
        return await _before(running, settings.deadline_s)
    except EpisodeFailed:
        raise
    except asyncio.CancelledError as error:
        if running.cancelled():  # itself, not us
            raise EpisodeFailed("the episode was cancelled from inside") from error
        raise
    except Exception as error:  # a bad rollout is data: it is recorded, the others go on
        raise EpisodeFailed(f"{type(error).__name__}: {error}") from error
    finally:
        await _stop(running, episode)


async def _work(settings: Settings, episode: Episode) -> object:
    work = settings.work
    return await (work(episode.task, episode) if callable(work) else run_command(work, episode))


async def _before(running: "asyncio.Future[Any]", deadline_s: float) -> object:
    await asyncio.wait({running}, timeout=deadline_s)
    if not running.done():
        raise EpisodeTimeout(f"not over after {deadline_s:g} s (deadline_s)")
    return running.result()


async def _stop(running: "asyncio.Future[Any]", episode: Episode) -> None:
    """Cancel an agent; one that does not listen is left alone: its session takes no more turns."""
    if not running.done():
        running.cancel()
        await asyncio.wait({running}, timeout=_GRACE_S)
    if not running.done():
        log.warning("episode %s does not end when it is cancelled", episode.session_id)
    running.add_done_callback(lambda done: done.cancelled() or done.exception())  # somebody has looked at it


def _checked(returned: object) -> Result:
    """A result that the gateway can take, its rewards as floats.

    Raises:
        EpisodeResultWrong: it is none.
    """
    try:
        return _read(returned)
    except EpisodeResultWrong:
        raise
    except Exception as error:  # it may be anything, with code of its own: a tensor's `__float__`
        raise EpisodeResultWrong(f"the result cannot be read: {type(error).__name__}: {error}") from error


def _read(returned: object) -> Result:
    if not isinstance(returned, Result | SupportsFloat):
        shown = repr(returned)[:100]
        raise EpisodeResultWrong(f"an episode returns its reward, or a Result; this one returned {shown}")
    result = returned if isinstance(returned, Result) else Result(float(returned))
    if "rollout" in result.metadata:
        raise EpisodeResultWrong("the metadata key `rollout` says which episode it is: it is not the agent's")
    return replace(
        result,
        reward=_number(result.reward),
        turn_rewards={turn_id: _number(reward) for turn_id, reward in result.turn_rewards.items()},
        branch_rewards={turn_id: _number(reward) for turn_id, reward in result.branch_rewards.items()},
    )


def _number(reward: Any) -> Any:
    """A reward as JSON has it: NumPy's and a tensor's are none of its numbers. None stays None."""
    if reward is None:
        return None
    if not isinstance(reward, SupportsFloat):
        raise EpisodeResultWrong(f"a reward is a number, not {reward!r:.100}")
    if not math.isfinite(number := float(reward)):
        raise EpisodeResultWrong("a reward is not a finite number")
    return number


async def _finish(control: Control, attempt: Attempt, result: Result) -> None:
    try:
        await control.finish(attempt.session_id, result)
    except (TypeError, ValueError, RecursionError) as error:  # metadata that no JSON can hold
        raise EpisodeResultWrong(f"the result cannot be sent: {error}") from error
    except GatewayRefused as error:
        if error.code in (400, 409):  # rewards of turns that are not there; finished by the agent itself
            raise EpisodeResultWrong(str(error)) from error
        raise


async def unbroken(work: Coroutine[Any, Any, T], *, give_up_s: float | None = None) -> T:
    """Await work that must not stop half-way: a caller cancelled meanwhile is so only after its end.

    With `give_up_s`, it is so after that many seconds at the latest, and what has become of the work is not
    known: a gateway that is away must not hold up who leaves.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if not cancelled and give_up_s is not None:
                asyncio.get_running_loop().call_later(give_up_s, task.cancel)
            cancelled = True
    if not cancelled:
        return task.result()
    if task.cancelled():
        log.warning("stopped while the gateway is away: a session may stay open")
    else:
        task.exception()  # somebody has looked at it
    raise asyncio.CancelledError
