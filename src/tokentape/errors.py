"""Every error that tokentape raises, one tree.

    TokentapeError                     status  retryable
    ├── ConfigError                       -       no      a wrong option, model directory or store
    ├── RequestError                     400      no      the caller's fault; `param` names the field
    │   ├── ContextOverflow              400      no      prompt, or prompt + max tokens, is too long
    │   ├── TemplateRefused              400      no      the chat template raised on this conversation
    │   ├── Unauthorized                 401      no      an API key is required
    │   ├── NotFound                     404      no      no such session, turn or route
    │   ├── SessionClosed                409      no      the session is finished or sealed
    │   ├── SessionExists                409      no      a session of that id is there already
    │   ├── NotPaused                    409      no      weights cannot be named while they sample
    │   ├── WeightsDiffer                409      no      not all servers sample with the same weights
    │   ├── WorkerNeeded                 409      no      the last worker cannot be taken away
    │   ├── LimitReached                 400      no      the session has used up its turns or tokens
    │   └── TooLarge                     413      no      the body exceeds the limit
    ├── EngineError                      502      no      the engine did not do what was asked
    │   ├── EngineRejected               502      no      it answered 4xx to a request we believed valid
    │   ├── EngineProtocolError          502      no      its answer contradicts itself
    │   ├── EngineAborted                503     yes      the generation was aborted on the engine
    │   ├── EngineFailed                 502     yes      it answered 5xx, or an error event inside a stream
    │   ├── EngineUnavailable            503     yes      no connection, or lost before the first token
    │   ├── EngineDisconnected           502     yes      lost after the first token
    │   └── EngineTimeout                504     yes      no answer, or no further token, in time
    ├── ClientGone                       499      no      the caller left before the turn was committed
    ├── Overloaded                       429     yes      too many turns are waiting, or too many bytes
    ├── TurnTimeout                      504     yes      the turn's own time was over before it was sampled
    ├── StoreError                       503     yes      the turn could not be made durable
    │   ├── StoreFull                    507     yes      there is no room left for it
    │   └── LeaseLost                    503     yes      another replica writes the session now
    ├── SessionSealed                    503     yes      what the store has of the session must be read again
    ├── SessionElsewhere                 503     yes      another replica has the session
    ├── EpisodeFailed                     -      yes      an episode raised, or its command failed
    │   ├── EpisodeTimeout                -      yes      it was not over at its deadline
    │   ├── EpisodeResultWrong            -      yes      what it returned is not a reward
    │   └── EpisodeEmpty                  -      yes      it took no turn
    ├── GroupFailed                       -       no      all attempts of one of its episodes failed
    ├── GatewayError                      -       no      a driver of rollouts cannot go on
    │   ├── GatewayUnavailable            -      yes      the gateway did not answer for too long
    │   └── GatewayRefused                -       no      it answered what no repetition changes
    └── InternalError                    500      no      a broken invariant: our bug, never the user's

`status` is the HTTP status that every wire dialect answers; `retryable` says whether the same request may
succeed later without a change. Each dialect (`gateway/chat.py`, …) maps this tree to its provider's shape at
one point.
"""

from collections.abc import Sequence
from typing import Any, ClassVar


class TokentapeError(Exception):
    """The root. `status` is an HTTP status, `retryable` whether the same request may succeed later."""

    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        """The class's own name in snake_case, as counted in failures and metrics."""
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__).lstrip("_")


class ConfigError(TokentapeError):
    """A wrong option, model directory or store: said once, at start."""


class RequestError(TokentapeError):
    """The caller must change the request. `param` names the offending field, where one is to blame."""

    status = 400

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextOverflow(RequestError):
    """The prompt, or prompt plus `max_tokens`, does not fit into the model's context.

    Lengths are in tokens; `None` where only the engine knows them.
    """

    def __init__(
        self, message: str, *, num_prompt_tokens: int | None = None, context_length: int | None = None
    ) -> None:
        super().__init__(message, param="messages")
        self.num_prompt_tokens = num_prompt_tokens
        self.context_length = context_length


class TemplateRefused(RequestError):
    """The model's chat template raised on this conversation."""


class Unauthorized(RequestError):
    """No API key, or a wrong one."""

    status = 401


class NotFound(RequestError):
    """No such session, turn or route."""

    status = 404


class SessionClosed(RequestError):
    """The session is finished or sealed: it takes no more turns."""

    status = 409


class SessionExists(RequestError):
    """A session of that id is there already."""

    status = 409


class NotPaused(RequestError):
    """Weights cannot be given a name while they sample: nobody would know which token is whose."""

    status = 409


class WeightsDiffer(RequestError):
    """Several servers sample with weights of different names: no one name holds for all."""

    status = 409


class WorkerNeeded(RequestError):
    """The last worker cannot be taken away: nobody would be left to sample."""

    status = 409


class LimitReached(RequestError):
    """The session has used up its turns or its sampled tokens."""


class TooLarge(RequestError):
    """The request's body exceeds the configured limit."""

    status = 413


class EngineError(TokentapeError):
    """The engine did not do what was asked of it. `num_tokens` were received before it failed."""

    status = 502

    def __init__(self, message: str, *, num_tokens: int = 0) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens


class EngineRejected(EngineError):
    """The engine answered 4xx to a request that we believed valid."""


class EngineProtocolError(EngineError):
    """The engine's answer contradicts itself: ids, log-probabilities or counts disagree, or are missing."""


class EngineAborted(EngineError):
    """The generation was aborted on the engine: its partial tokens are not a turn."""

    status = 503
    retryable = True


class EngineFailed(EngineError):
    """The engine answered 5xx, or an error event inside a stream."""

    retryable = True


class EngineUnavailable(EngineError):
    """No connection to the engine, or the connection was lost before the first token."""

    status = 503
    retryable = True


class EngineDisconnected(EngineError):
    """The connection was lost after the first token."""

    retryable = True


class EngineTimeout(EngineError):
    """The engine gave no answer, or no further token, in time."""

    status = 504
    retryable = True


class ClientGone(TokentapeError):
    """The caller closed the connection before the turn was committed; the engine was told to stop."""

    status = 499


class Overloaded(TokentapeError):
    """The gateway has as much to do as it may have; try again after `retry_after_s` seconds."""

    status = 429
    retryable = True

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TurnTimeout(TokentapeError):
    """The turn was not sampled within the time that the gateway gives it, waiting for its place included."""

    status = 504
    retryable = True


class StoreError(TokentapeError):
    """The turn could not be made durable; nothing was committed.

    Unless it is `uncertain`: the commit itself failed, and what it wrote may be found after a crash.
    """

    status = 503
    retryable = True

    def __init__(self, message: str, *, uncertain: bool = False) -> None:
        super().__init__(message)
        self.uncertain = uncertain


class StoreFull(StoreError):
    """There is no room left in the store: its disk is full, or its quota is used up."""

    status = 507


class LeaseLost(StoreError):
    """Another replica writes the session now: nothing was committed, this copy of it is out of date."""


class SessionSealed(TokentapeError):
    """A commit failed half-way: this copy of the session takes no more turns, the store is asked again."""

    status = 503
    retryable = True


class SessionElsewhere(TokentapeError):
    """Another replica has the session: ask it at `url`; None where it is leaving, or has not come yet."""

    status = 503
    retryable = True

    def __init__(self, message: str, *, url: str | None) -> None:
        super().__init__(message)
        self.url = url


class EpisodeFailed(TokentapeError):
    """An attempt at an episode came to nothing: its function raised, or its command did not end with 0."""

    retryable = True


class EpisodeTimeout(EpisodeFailed):
    """An attempt was not over at its deadline."""


class EpisodeResultWrong(EpisodeFailed):
    """What an attempt returned is not a reward that can be recorded."""


class EpisodeEmpty(EpisodeFailed):
    """An attempt was over without a turn: there is nothing to train."""


class GroupFailed(TokentapeError):
    """All attempts of one of a group's episodes failed; `failures` has what each of them said."""

    def __init__(self, message: str, *, failures: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)


class GatewayError(TokentapeError):
    """A driver of rollouts cannot go on: what it asked of the gateway was not done, or nobody knows."""


class GatewayUnavailable(GatewayError):
    """The gateway did not answer for too long; whether it has done the last call is not known."""

    retryable = True


class GatewayRefused(GatewayError):
    """The gateway answered what no repetition changes; `code` is its HTTP status."""

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class InternalError(TokentapeError):
    """An invariant of tokentape is broken: our bug, never the user's."""


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
