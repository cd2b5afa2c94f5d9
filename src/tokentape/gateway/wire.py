"""What the wires share beside a request's fields (`gateway.fields`): its origin, parts of a reply."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

import msgspec
from msgspec import Raw

from tokentape.errors import ContextOverflow, Overloaded, RequestError, TokentapeError
from tokentape.gateway.exchange import Done, Progress, Started, TurnRequest
from tokentape.gateway.session import Session
from tokentape.tape import Origin
from tokentape.tokenizer import Tokenizer
from tokentape.types import Json

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}")


@dataclass(frozen=True, slots=True)
class WireConfig:
    """What every wire needs to know of the gateway.

    `model` is the name it answers to. `template_variables` are the variables that the chat template reads;
    `template_arguments` those that it has where a request does not say otherwise.
    """

    model: str
    tokenizer: Tokenizer
    template_variables: frozenset[str] = frozenset()
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    strict: bool = False


@dataclass(frozen=True, slots=True)
class AgentRequest:
    """A request as it came. `headers` are looked up without regard to case."""

    body: bytes
    headers: Mapping[str, str]
    session: Session
    config: WireConfig


class Writer(Protocol):
    """Writes the reply to one request, whole or as server-sent events."""

    def whole(self, dones: Sequence[Done]) -> bytes:
        """The reply of a request without `stream`; one turn a choice."""
        ...

    def start(self, started: Started) -> bytes:
        """What a stream begins with."""
        ...

    def progress(self, progress: Progress) -> bytes:
        """Events for new tokens; b"" where they mean nothing yet."""
        ...

    def end(self, dones: Sequence[Done]) -> bytes:
        """The end of a stream; only for committed turns."""
        ...

    def error(self, error: TokentapeError) -> bytes:
        """The end of a stream that failed: the SDK raises on it."""
        ...

    def ping(self) -> bytes:
        """What keeps an idle stream alive."""
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a request asks for, and who writes the reply."""

    request: TurnRequest
    writer: Writer


@dataclass(frozen=True, slots=True)
class Wire:
    """One protocol. `decode` raises `RequestError`; `error_body` is an error in the provider's shape."""

    name: str
    decode: Callable[[AgentRequest], Decoded]
    error_body: Callable[[TokentapeError], Json]


def read_origin(
    wire: str,
    headers: Mapping[str, str],
    body: Iterable[bytes],
    ignored: tuple[str, ...],
    noted: Json | None = None,
) -> Origin:
    """Who asks, and what: the parts of the `body`. Requests of one digest ask for the same.

    Raises:
        RequestError: the label cannot be used.
    """
    label = headers.get("X-Tokentape-Label")
    if label is not None and not LABEL.fullmatch(label):
        raise RequestError(
            "X-Tokentape-Label must be 1 to 64 letters, digits or _.:/- and start with a letter or digit",
            param="X-Tokentape-Label",
        )
    key = headers.get("Idempotency-Key", "")
    digest = blake2b(f"{wire}\0{key}\0{label or ''}\0".encode(errors="surrogateescape"), digest_size=16)
    digest.update(b"\0".join(body))
    return Origin(wire, digest.hexdigest(), "", label, ignored, noted or {})


def extension(done: Done, session_id: str, *, with_ids: bool) -> Json:
    """What tokentape adds to a reply."""
    turn = done.turn
    out: Json = {
        "session_id": session_id,
        "turn_id": turn.turn_id,
        "parent_turn_id": turn.parent_id,
        "branch_reason": turn.branch_reason,
        "prompt_tokens": done.usage.num_prompt,
        "completion_tokens": done.usage.num_completion,
        "weight_version": turn.versions[-1].version,
        "parse": {"status": turn.parse_status, "attempts": turn.attempts},
    }
    if turn.neutralised:
        out["neutralised"] = turn.neutralised
    if turn.superseded:
        out["superseded"] = turn.superseded
    if turn.origin.ignored:
        out["ignored_fields"] = turn.origin.ignored
    if with_ids:
        out["prompt_ids"] = Raw(done.prompt.to_json())
        out["completion_ids"] = Raw(b"[" + turn.completion.json + b"]")
        out["logprobs"] = turn.logprobs.tolist()
    return out


def openai_error(error: TokentapeError) -> Json:
    """An error in OpenAI's shape."""
    code = "context_length_exceeded" if isinstance(error, ContextOverflow) else error.kind
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if isinstance(error, Overloaded):
        kind, code = "requests", "rate_limit_exceeded"
    param = error.param if isinstance(error, RequestError) else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def event(value: Json, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"
