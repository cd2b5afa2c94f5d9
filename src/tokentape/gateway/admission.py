"""Who may begin a turn now, who waits, who is turned away; how long a turn may take."""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass

from tokentape.errors import LimitReached, Overloaded, TokentapeError, TurnTimeout
from tokentape.gateway.session import Session
from tokentape.metrics import Metrics

_MAX_RETRY_AFTER_S = 60  # the SDKs wait no longer than that, whatever they are told
_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How much goes on at a time; beyond it there is a 429.

    `max_running` requests are being answered, the choices of one together, and `max_waiting` wait for their
    place. `turn_timeout_s` is all the time that a turn has until it is sampled, None without a limit.
    `max_request_bytes` bounds the bodies of all requests together.
    """

    max_running: int = 1024
    max_waiting: int = 8192
    turn_timeout_s: float | None = None
    max_request_bytes: int = 2 * 2**30


class Deadline:
    """When a turn must have been sampled: its own limit, or its session's end if that comes before."""

    def __init__(self, session: Session, timeout_s: float | None) -> None:
        self._session_id = session.session_id
        self._timeout_s = timeout_s
        left_s = session.seconds_left()
        self._is_sessions = left_s is not None and (timeout_s is None or left_s <= timeout_s)
        limit_s = left_s if self._is_sessions else timeout_s
        self._at = None if limit_s is None else asyncio.get_running_loop().time() + limit_s

    @contextlib.asynccontextmanager
    async def within(self) -> AsyncGenerator[None]:
        """End what runs inside when the time is over.

        Raises:
            LimitReached: the session's is.
            TurnTimeout: the turn's is.
        """
        limit = asyncio.timeout_at(self._at)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():  # the engine's own
                raise
            raise self._error() from None

    def _error(self) -> TokentapeError:
        if self._is_sessions:
            return LimitReached(f"session {self._session_id!r} has reached its deadline: finish it")
        return TurnTimeout(f"the turn was not sampled within {self._timeout_s:g} s (--turn-timeout)")


class Admission:
    """Places for the requests that are being answered, and a queue that is fair between sessions.

    A place that becomes free goes to the sessions in turn, however much one of them asks. Where the queue is
    full, the session with most in it makes room: its newest request is turned away.
    """

    def __init__(self, limits: AdmissionLimits, metrics: Metrics) -> None:
        self.limits = limits
        self._num_running = 0
        self._num_waiting = 0
        self._queue: dict[str, deque[asyncio.Future[None]]] = {}  # by session; the first is the next in turn
        self._gap_s = 0.0  # between two places that became free while somebody waited: a running mean
        self._freed_at: float | None = None
        self._num_bytes = 0
        metrics.waiting_turns.set_function(lambda: self._num_waiting)

    @property
    def load(self) -> int:
        """Requests that are being answered, and those that wait."""
        return self._num_running + self._num_waiting

    async def enter(self, session_id: str, deadline: Deadline) -> None:
        """Take a place, at once or when it is one's turn; `leave` gives it back.

        Raises:
            Overloaded: so many wait that there is no point.
            TurnTimeout, LimitReached: the deadline came first.
        """
        if self._num_running < self.limits.max_running:  # then nobody waits
            self._num_running += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._line_up(session_id, place)
        try:
            async with deadline.within():
                await place
        except BaseException:
            if place.done() and not place.cancelled() and place.exception() is None:  # it came too late
                self.leave()
            else:
                self._step_out(session_id, place)
            raise

    def leave(self) -> None:
        """Give a place back: to the next in turn."""
        now = asyncio.get_running_loop().time()
        while self._queue:
            if self._freed_at is not None:
                self._gap_s += _SMOOTHING * (now - self._freed_at - self._gap_s)
            self._freed_at = now
            session_id, places = next(iter(self._queue.items()))
            place = places[0]
            self._step_out(session_id, place)
            if places:  # it comes again when all the others have come
                self._queue[session_id] = self._queue.pop(session_id)
            if not place.done():
                place.set_result(None)
                return
        self._num_running -= 1
        self._freed_at = None

    @contextlib.contextmanager
    def reading(self, num_bytes: int) -> Generator[None]:
        """Count a request's body while the context is open: bytes that are here, or on their way.

        Raises:
            Overloaded: all bodies together would be too large.
        """
        if self._num_bytes + num_bytes > self.limits.max_request_bytes and self._num_bytes:
            raise Overloaded(
                f"the requests under way have {self._num_bytes} bytes, {num_bytes} more are too much "
                "(--max-requests-mb): try again later",
                retry_after_s=self._retry_after_s(),
            )
        self._num_bytes += num_bytes
        try:
            yield
        finally:
            self._num_bytes -= num_bytes

    def _line_up(self, session_id: str, place: "asyncio.Future[None]") -> None:
        if self._num_waiting >= self.limits.max_waiting:
            mine = len(self._queue.get(session_id, ()))
            most = max(self._queue, key=lambda one: len(self._queue[one]), default=session_id)
            refusal = Overloaded(
                f"{self._num_running} requests are being answered, {self._num_waiting} wait: try again later",
                retry_after_s=self._retry_after_s(),
            )
            if len(self._queue.get(most, ())) <= mine + 1:
                raise refusal
            newest = self._queue[most][-1]
            self._step_out(most, newest)
            if not newest.done():
                newest.set_exception(refusal)
        self._queue.setdefault(session_id, deque()).append(place)
        self._num_waiting += 1

    def _step_out(self, session_id: str, place: "asyncio.Future[None]") -> None:
        """Wait no longer, if it still does."""
        places = self._queue.get(session_id)
        if places is None or place not in places:
            return
        places.remove(place)
        self._num_waiting -= 1
        if not places:
            del self._queue[session_id]

    def _retry_after_s(self) -> int:
        """Until as many places became free as wait now, as far as that can be told."""
        return min(max(math.ceil(self._gap_s * self._num_waiting), 1), _MAX_RETRY_AFTER_S)
