"""The agents' routes, with HTTP or without: which path is which wire's, and how a refusal looks there."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from tokentape.errors import (
    ClientGone,
    EngineError,
    InternalError,
    NotFound,
    Overloaded,
    SessionElsewhere,
    TokentapeError,
)
from tokentape.gateway import chat, messages, responses
from tokentape.gateway.parts import Gateway
from tokentape.gateway.passing import ELSEWHERE
from tokentape.gateway.session import Session
from tokentape.gateway.wire import Wire
from tokentape.metrics import Metrics
from tokentape.types import Json

log = logging.getLogger(__name__)

_MESSAGES = re.compile(r"/v1/messages(/|$)")
_RESPONSES = re.compile(r"/v1/responses(/|$)")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of an agent that samples nothing. `names` are the path's, `query` has one text a name."""

    gateway: Gateway
    session: Session
    body: bytes
    headers: Mapping[str, str]
    names: Mapping[str, str]
    query: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Route:
    """A route inside a session; `path` may have names, `{id}`. It is answered by turns, or by a question."""

    method: str
    path: str
    answer: Wire | Callable[[Asked], Json]


def _count(wire: Wire, **more: str) -> Callable[[Asked], Json]:
    def answer(asked: Asked) -> Json:
        api = asked.gateway.api
        decoded = api.decode(wire, asked.session, asked.body, asked.headers)
        return {**more, "input_tokens": api.count_tokens(asked.session, decoded)}

    return answer


def _stored(answer: responses.Answer) -> Callable[[Asked], Json]:
    def answered(asked: Asked) -> Json:
        gateway = asked.gateway
        return answer(asked.session, gateway.turns, gateway.api.config, asked.names["id"], asked.query)

    return answered


ROUTES: Sequence[Route] = (
    Route("POST", "/v1/chat/completions", chat.WIRE),
    Route("POST", "/v1/messages", messages.WIRE),
    Route("POST", "/v1/messages/count_tokens", _count(messages.COUNT)),
    Route("POST", "/v1/responses", responses.WIRE),
    Route("POST", "/v1/responses/input_tokens", _count(responses.WIRE, object="response.input_tokens")),
    Route("GET", "/v1/responses/{id}", _stored(responses.retrieve)),
    Route("GET", "/v1/responses/{id}/input_items", _stored(responses.input_items)),
    Route("DELETE", "/v1/responses/{id}", _stored(responses.delete)),
    Route("POST", "/v1/responses/{id}/cancel", _stored(responses.cancel)),
)


def list_models(gateway: Gateway) -> Json:
    """`GET /v1/models`: there is one."""
    name = gateway.config.model
    return {
        "object": "list",
        "data": [show_model(gateway, name)],
        "first_id": name,
        "last_id": name,
        "has_more": False,
    }


def show_model(gateway: Gateway, name: str) -> Json:
    """The model in OpenAI's and Anthropic's shape at once; nobody knows when it was made.

    Raises:
        NotFound: it has another name.
    """
    model = gateway.config.model
    if name != model:
        raise NotFound(f"model {name!r} does not exist: there is only {model!r}")
    return {
        "id": model,
        "object": "model",
        "created": 0,
        "owned_by": "tokentape",
        "type": "model",
        "display_name": model,
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
        "max_input_tokens": gateway.turns.planner.context_length,
    }


def spoken(path: str, headers: Mapping[str, str]) -> Wire:
    """Whose shape errors have for a caller, also where no route answers."""
    if "anthropic-version" in headers or _MESSAGES.search(path) is not None:
        return messages.WIRE
    return responses.WIRE if _RESPONSES.search(path) is not None else chat.WIRE


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is an error, as JSON."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def of(cls, wire: Wire, error: TokentapeError, *, status: int | None = None) -> "Refusal":
        """An error in a wire's shape; `status` is its own unless given."""
        # OpenAI's and Anthropic's SDKs retry 409 and 5xx on their own: the header says what is worth it.
        headers = {"x-should-retry": "true" if error.retryable else "false"}
        if isinstance(error, Overloaded):
            headers["Retry-After"] = str(error.retry_after_s)
        if isinstance(error, SessionElsewhere):
            headers[ELSEWHERE] = error.url or ""
        return cls(status or error.status, headers, msgspec.json.encode(wire.error_body(error)))


def to_typed(error: Exception, metrics: Metrics, what: str) -> TokentapeError:
    """What a boundary makes of an exception: refusals are counted, a bug is logged and named as ours."""
    if not isinstance(error, TokentapeError):
        log.error("%s", what, exc_info=error)
        return InternalError("an internal error of tokentape; its log has the details")
    if not isinstance(error, EngineError | ClientGone):  # these are counted as failed turns
        metrics.refusals.labels(error.kind).inc()
    return error
