"""What runs when: groups of episodes side by side, retries, and what an earlier driver has left."""

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast

from tokentape.errors import ConfigError, GroupFailed, StoreError
from tokentape.rollout import names
from tokentape.rollout.control import Control
from tokentape.rollout.local import Runner
from tokentape.rollout.progress import Watch
from tokentape.rollout.records import Attempt, EpisodeFailure, Finished, Group, Member
from tokentape.types import Json

log = logging.getLogger(__name__)

OnFailure: TypeAlias = Literal["drop", "keep", "raise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a run is driven."""

    run: str
    group_size: int
    concurrency: int
    retries: int
    on_failure: OnFailure
    ahead: int


class _MemberLostError(Exception):
    """All attempts of a member have failed; `last` is the last one."""

    def __init__(self, last: EpisodeFailure) -> None:
        super().__init__(last.message)
        self.last = last


class Driver:
    """Runs the groups of all tasks but those in `skip`, and hands each to `deliver` when it is over.

    `taken` must be called for each that the consumer is done with: no more than the episodes need that run,
    and `ahead`, are begun without it.
    """

    def __init__(
        self,
        plan: Plan,
        control: Control,
        runner: Runner,
        skip: Collection[int],
        deliver: Callable[[Group], None],
        watch: Watch,
    ) -> None:
        self._plan = plan
        self._control = control
        self._runner = runner
        self._skip = skip
        self._deliver = deliver
        self._watch = watch
        self._known: set[str] = set()  # sessions of episodes that are delivered, or will be
        self._slots = asyncio.Semaphore(plan.concurrency)
        self._room = asyncio.Semaphore(math.ceil(plan.concurrency / plan.group_size) + plan.ahead)

    def taken(self) -> None:
        """The consumer is done with a group."""
        self._room.release()

    async def run(self, tasks: Iterable[Any]) -> None:
        """Run all.

        Raises:
            GroupFailed: a group has failed, and the run is to end with it.
            GatewayError: the gateway is gone or refuses.
            ConfigError: an earlier driver of this run had other tasks.
        """
        try:
            found = await self._found()
            async with asyncio.TaskGroup() as groups:
                for index, task in enumerate(tasks):
                    if index in self._skip:
                        self._watch.skipped(self._plan.group_size)
                        continue
                    await self._room.acquire()
                    groups.create_task(self._group(index, task, found.pop(index, {})))
            await self._delete_strays()
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors

    async def _found(self) -> dict[int, dict[int, tuple[str, Json]]]:
        """Sessions that are finished, by task and member; what is half done is deleted.

        There is one of a member: a driver begins an attempt when the last one is known to be deleted.
        """
        found: dict[int, dict[int, tuple[str, Json]]] = {}
        async for listed in self._control.listed(f"{self._plan.run}."):
            if (place := names.read(self._plan.run, listed.session_id)) is None:
                continue
            index, member = place
            members = found.setdefault(index, {})
            if listed.state == "finished" and member not in members:
                members[member] = (listed.session_id, listed.metadata.get("rollout", {}))
                self._known.add(listed.session_id)
                continue
            if listed.state == "finished":
                log.warning("session %s is a second one of its episode: deleted", listed.session_id)
            await self._control.delete(listed.session_id)
        return found

    async def _group(self, index: int, task: Any, found: Mapping[int, tuple[str, Json]]) -> None:
        group_id = names.group_id(self._plan.run, index)
        notes = self._notes(index, task, found)
        failures: list[EpisodeFailure] = []
        episodes: list[asyncio.Task[Member | None]] = []
        lost: EpisodeFailure | None = None
        try:
            async with asyncio.TaskGroup() as running:
                for member in range(self._plan.group_size):
                    first = Attempt(
                        session_id=names.session_id(group_id, member, 1),
                        group_id=group_id,
                        index=index,
                        member=member,
                        number=1,
                        task=task,
                        notes={**notes, "member": member, "attempt": 1},
                    )
                    earlier = found[member][0] if member in found else None
                    episodes.append(running.create_task(self._member(first, earlier, failures)))
        except* _MemberLostError as errors:
            lost = cast("_MemberLostError", _first(errors)).last
        there = [member for episode in episodes if (member := _result(episode)) is not None]
        if lost is not None:
            await self._drop(group_id, lost, failures)
        self._watch.ready(self._plan.group_size - len(there))
        self._deliver(
            Group(
                task=task,
                index=index,
                group_id=group_id,
                group_size=self._plan.group_size,
                members=tuple(there) if lost is None else (),
                failures=tuple(failures),
                resolve=self._runner.resolve,
            )
        )

    def _notes(self, index: int, task: Any, found: Mapping[int, tuple[str, Json]]) -> Json:
        """What a session says of the run in its metadata; those that are there must say the same."""
        plan = self._plan
        notes = {"run": plan.run, "task": index, "group_size": plan.group_size, "digest": names.digest(task)}
        for session_id, theirs in found.values():
            if any(theirs.get(name) != value for name, value in notes.items()):
                raise ConfigError(
                    f"run {plan.run!r} was begun with another task {index} or another group size: session "
                    f"{session_id} is of {theirs}, not of {notes}"
                )
        return notes

    async def _member(
        self, attempt: Attempt, earlier: str | None, failures: list[EpisodeFailure]
    ) -> Member | None:
        """An episode of a group, finished; None, or `_MemberLostError`, where all attempts failed."""
        async with self._slots:
            if earlier is not None:
                outcome = await self._runner.recover(earlier)
                if outcome is not None:
                    return self._finished(attempt, outcome)
            left = self._plan.retries + 1
            while isinstance(outcome := await self._runner.run(attempt), EpisodeFailure):
                failures.append(outcome)
                self._watch.failed()
                left -= not outcome.outage
                if not left:
                    break
                attempt = _next(attempt)
            else:
                return self._finished(attempt, outcome)
        if self._plan.on_failure == "keep":
            return None
        raise _MemberLostError(outcome)

    async def _drop(self, group_id: str, lost: EpisodeFailure, failures: list[EpisodeFailure]) -> None:
        """What becomes of a group that cannot be whole."""
        if self._plan.on_failure == "raise":
            raise GroupFailed(
                f"group {group_id}: all attempts of an episode failed, the last one with {lost.message}",
                failures=failures,
            )
        async for listed in self._control.listed(f"{group_id}."):
            await self._control.delete(listed.session_id)

    def _finished(self, attempt: Attempt, finished: Finished) -> Member:
        self._watch.finished(finished.reward)
        self._known.add(finished.session_id)
        return Member(
            member=attempt.member,
            session_id=finished.session_id,
            reward=finished.reward,
            num_samples=finished.num_samples,
            samples=finished.samples,
        )

    async def _delete_strays(self) -> None:
        """What lost calls, or tasks that outlived their driver, have left: no exporter is to find it."""
        async for listed in self._control.listed(f"{self._plan.run}."):
            ours = names.read(self._plan.run, listed.session_id) is not None
            if ours and listed.session_id not in self._known:
                log.warning("session %s (%s) is nobody's: deleted", listed.session_id, listed.state)
                await self._control.delete(listed.session_id)


def _next(attempt: Attempt) -> Attempt:
    number = attempt.number + 1
    session_id = names.session_id(attempt.group_id, attempt.member, number)
    return replace(attempt, session_id=session_id, number=number, notes={**attempt.notes, "attempt": number})


def _result(episode: asyncio.Task[Member | None]) -> Member | None:
    """The member that an episode has become; None where it was lost, or stopped because another one was."""
    return None if episode.cancelled() or episode.exception() is not None else episode.result()


def _leaf(error: BaseException) -> BaseException:
    return (
        _first(cast("BaseExceptionGroup[BaseException]", error))
        if isinstance(error, BaseExceptionGroup)
        else error
    )


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended a run; of several at a time one that says something."""
    leaves = [_leaf(error) for error in errors.exceptions]
    known = [error for error in leaves if isinstance(error, ConfigError | GroupFailed | StoreError)]
    return (known or leaves)[0]
