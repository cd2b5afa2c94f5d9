"""What the wires share: reading a request's fields, the request's origin, tokentape's extension of a reply.

Every field of a request is in one of three lists of its wire: honoured, refused with a 400 that names it, or
ignored and recorded with the turn (refused too under `--strict`). Nothing is dropped in silence.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta, Raw

from tokentape.errors import RequestError, TokentapeError
from tokentape.gateway.exchange import Done, Progress, Started, TurnRequest
from tokentape.gateway.sessions import Session
from tokentape.tape import Origin
from tokentape.template import RESERVED
from tokentape.tokenizer import Tokenizer
from tokentape.types import Json

MAX_INT = 2**31 - 1  # what every engine can take
Positive = Annotated[int, Meta(ge=1, le=MAX_INT)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}")


@dataclass(frozen=True, slots=True)
class WireConfig:
    """What every wire needs to know of the gateway.

    `model` is the name it answers to. `template_variables` are the variables that the chat template reads.
    """

    model: str
    tokenizer: Tokenizer
    template_variables: frozenset[str] = frozenset()
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


@dataclass(frozen=True, slots=True)
class Fields:
    """A request's fields. `values` are the honoured ones that were given, `raw` all of them as they came."""

    values: Mapping[str, Any]
    raw: Mapping[str, Raw]
    ignored: tuple[str, ...]


def read_fields(
    body: bytes,
    honoured: Mapping[str, Any],
    refused: Mapping[str, tuple[Any, str]],
    *,
    strict: bool,
) -> Fields:
    """Read a body; null means "not given" for every field.

    `honoured`: field → the type that its JSON must have. `refused`: field → the value that asks for nothing,
    and what to say where it has another.

    Raises:
        RequestError: the body is not a JSON object, or a field cannot be served.
    """
    try:
        body.decode()  # msgspec does not look into what it leaves as `Raw`
        raw = msgspec.json.decode(body, type=dict[str, Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not a JSON object: {error}") from None
    given = {name: read_field(name, raw[name], honoured[name]) for name in honoured if name in raw}
    for name in raw.keys() & refused.keys():
        harmless, hint = refused[name]
        if (value := read_field(name, raw[name], Any)) is not None and value != harmless:
            raise RequestError(f"`{name}` is not supported here: {hint}", param=name)
    ignored = tuple(sorted(raw.keys() - honoured.keys() - refused.keys()))
    check_ignored(ignored, strict=strict)
    return Fields({name: value for name, value in given.items() if value is not None}, raw, ignored)


def check_ignored(ignored: Sequence[str], *, strict: bool) -> None:
    """Refuse what would be ignored, where `strict` says so."""
    if ignored and strict:
        raise RequestError(f"`{ignored[0]}` has no effect here, and --strict refuses it", param=ignored[0])


def read_field(name: str, raw: Raw, type_: Any) -> Any:
    """One value, None for null.

    Raises:
        RequestError: it is not of this type; `param` is `name`.
    """
    try:
        return msgspec.json.decode(raw, type=type_ | None if type_ is not Any else Any)
    except msgspec.DecodeError as error:
        where = str(error).replace("`$", f"`{name}")
        raise RequestError(f"`{name}`: {where}", param=name) from None
    except RecursionError:
        raise RequestError(f"`{name}` is nested too deep", param=name) from None


def read_origin(
    wire: str, request: AgentRequest, ignored: tuple[str, ...], noted: Json | None = None
) -> Origin:
    """Who asks, and what. Two requests of one digest ask for the same.

    Raises:
        RequestError: the label cannot be used.
    """
    label = request.headers.get("X-Tokentape-Label")
    if label is not None and not LABEL.fullmatch(label):
        raise RequestError(
            "X-Tokentape-Label must be 1 to 64 letters, digits or _.:/- and start with a letter or digit",
            param="X-Tokentape-Label",
        )
    key = request.headers.get("Idempotency-Key", "")
    digest = blake2b(f"{wire}\0{key}\0".encode(errors="surrogateescape"), digest_size=16)
    digest.update(request.body)
    return Origin(wire, digest.hexdigest(), "", label, ignored, noted or {})


def thinking_arguments(
    variables: frozenset[str], *, effort: str | None = None, enabled: bool | None = None
) -> Json:
    """How a chat template is told how much to think; {} where it cannot be told.

    `effort` is the providers' word for how much, "none" for not at all; `enabled` is whether, None where the
    request does not say.
    """
    if effort is not None and "reasoning_effort" in variables:
        return {"reasoning_effort": effort}
    if enabled is None and effort is not None:
        enabled = effort != "none"
    if enabled is None:
        return {}
    return {name: enabled for name in ("enable_thinking", "thinking") if name in variables}


def check_template_arguments(arguments: Mapping[str, Any], param: str) -> None:
    """Refuse template arguments that only the gateway may set."""
    for name in arguments:
        if name in RESERVED:
            raise RequestError(f"`{param}.{name}` is the gateway's own", param=param)


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


def event(value: Json, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"
