"""A request's fields, as every wire reads them.

Every field of a request is in one of three lists of its wire: honoured, refused with a 400 that names it, or
ignored and recorded with the turn (refused too under `--strict`). So is every key inside the fields and the
messages. Nothing is dropped in silence.
"""

import json
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, cast

import msgspec
from msgspec import Meta, Raw

from tokentape.conversation import Conversation, Known
from tokentape.errors import RequestError
from tokentape.gateway.replays import Read
from tokentape.gateway.session import Session
from tokentape.render import Frame
from tokentape.template import RESERVED
from tokentape.types import CallOutput, Demand, Json, JsonOutput, Message, Sampling

MAX_INT = 2**31 - 1  # what every engine can take
Positive = Annotated[int, Meta(ge=1, le=MAX_INT)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]

# The fields of `Sampling` under the names that a caller may give them: field → the type of its JSON.
SAMPLING: Mapping[str, Any] = {
    "temperature": Annotated[float, Meta(ge=0)],
    "top_p": Fraction,
    "top_k": Annotated[int, Meta(ge=-1, le=MAX_INT)],
    "min_p": Annotated[float, Meta(ge=0, le=1)],
    "max_tokens": Positive,
    "stop": str | list[str],
    "stop_token_ids": list[Annotated[int, Meta(ge=0, le=MAX_INT)]],
    "frequency_penalty": _Penalty,
    "presence_penalty": _Penalty,
    "repetition_penalty": Annotated[float, Meta(gt=0, le=2)],
    "seed": Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)],
    "logit_bias": dict[str, Annotated[float, Meta(ge=-100, le=100)]],
}

Keys: TypeAlias = Mapping[str, Any]
"""The keys that are heard of an object, or of each object in a list: key → the `Keys` inside it, or None."""

_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_PLACE = re.compile(r"\[\d+\]")
_NOTHING: Sequence[Any] = (None, False, "", [], {})  # and 0, which is False


@dataclass(frozen=True, slots=True)
class Fields:
    """A request's fields. `values` are the honoured ones that were given, `raw` all of them as they came."""

    values: Mapping[str, Any]
    raw: Mapping[str, Raw]
    ignored: tuple[str, ...]

    def parts(self, without: Container[str]) -> Iterator[bytes]:
        """The bytes of all fields but these, in one order: what a request asks for."""
        return (
            b"%s\0%s" % (name.encode(), self.raw[name]) for name in sorted(self.raw) if name not in without
        )


@dataclass(slots=True)
class Unheard:
    """The keys inside a request's fields that have no effect, as `messages[].prefix`; `strict` refuses them.

    What a session has seen before is not looked into again: a message's keys are in the request that brings
    it first.
    """

    strict: bool
    names: set[str] = field(default_factory=set[str])

    def look_inside(self, fields: Fields, keys: Mapping[str, Keys]) -> None:
        """Look into the fields that were given; `keys` has those of each field.

        Raises:
            RequestError: as `look`.
        """
        for name, own in keys.items():
            if name in fields.values:
                self.look(fields.raw[name], own, name)

    def look(self, raw: Raw, keys: Keys, where: str) -> None:
        """Look for other keys than these in the value at `where`. What asks for nothing does not count.

        Raises:
            RequestError: there is one, and nothing may be ignored.
        """
        for name in _others(read_field(where, raw, Any), keys, _PLACE.sub("[]", where)):
            self.add(name)

    def add(self, name: str) -> None:
        """Add a key.

        Raises:
            RequestError: nothing may be ignored.
        """
        check_ignored((name,), strict=self.strict)
        self.names.add(name)


def _others(value: Any, keys: Keys, where: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in cast("list[Any]", value):
            yield from _others(item, keys, f"{where}[]")
    elif isinstance(value, dict):
        for name, inner in cast("Json", value).items():
            if name not in keys:
                if inner not in _NOTHING:
                    yield f"{where}.{name}"
            elif keys[name] is not None:
                yield from _others(inner, keys[name], f"{where}.{name}")


def read_fields(
    body: bytes,
    honoured: Mapping[str, Any],
    refused: Mapping[str, tuple[Any, str]],
    *,
    strict: bool,
) -> Fields:
    """Read a body; null means "not given" for every field.

    `honoured`: field → the type that its JSON must have; `Raw` is left as it is. `refused`: field → the value
    that asks for nothing, and what to say where it has another.

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
        raise RequestError(
            f"`{ignored[0]}` has no effect here, and --strict refuses it: leave it out", param=ignored[0]
        )


def read_field(name: str, raw: Raw, type_: Any) -> Any:
    """One value, None for null.

    Raises:
        RequestError: it is not of this type; `param` is `name`.
    """
    if type_ is Raw:
        return None if bytes(memoryview(raw)[:4]) == b"null" else raw
    try:
        return msgspec.json.decode(raw, type=type_ | None if type_ is not Any else Any)
    except msgspec.DecodeError as error:
        raise RequestError(f"`{name}`: {_said(error, name)}", param=name) from None
    except RecursionError:
        raise RequestError(f"`{name}` is nested too deep", param=name) from None


def misread(error: msgspec.DecodeError | RecursionError, where: str) -> RequestError:
    """The error of what could not be decoded: it says where in the request that is."""
    said = str(error)
    inside = f" - at `{where}`" if "`$" not in said else ""
    return RequestError(_said(error, where) + inside, param=where)


def _said(error: Exception, where: str) -> str:
    return str(error).replace("`$", f"`{where}")


# -- the chat template


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


def template_arguments(
    given: Json, asked: Sequence[tuple[str, Json]], usual: Mapping[str, Any]
) -> tuple[Json, list[str]]:
    """The template's arguments, and the fields that asked for some without effect.

    `given` is `chat_template_kwargs`, which goes before the others; `asked` has each field that asks for
    arguments, and which. `usual` are the gateway's own, which go behind them.

    Raises:
        RequestError: an argument that only the gateway may set.
    """
    for name in given:
        if name in RESERVED:
            raise RequestError(
                f"`chat_template_kwargs.{name}` is the gateway's own, leave it out",
                param="chat_template_kwargs",
            )
    arguments = {**usual, **{name: value for _, wanted in asked for name, value in wanted.items()}, **given}
    return arguments, [
        name for name, wanted in asked if not wanted or not wanted.items() <= arguments.items()
    ]


def read_frame(session: Session, tools: bytes, arguments: Json) -> tuple[Frame, tuple[bytes, bytes]]:
    """Tools (JSON of OpenAI's shape) and template arguments, with their identity.

    Raises:
        RequestError: they cannot be read.
    """
    try:
        return session.frame(tools, msgspec.json.encode(arguments))
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"`tools` or `chat_template_kwargs`: {error}", param="tools") from None


# -- the reply


def read_demand(
    choice: Literal["auto", "none"] | Sequence[str], names: Sequence[str], schema: tuple[str, Json | None]
) -> tuple[bool, Demand | None, tuple[str, ...]]:
    """Whether tool calls are wanted, what the reply must be, and the fields that have no effect beside that.

    `choice` may be the tools of which one must be called, `names` are all that are offered. `schema` is the
    field for the reply's JSON schema, and what it asks for.

    Raises:
        RequestError: there is no such tool.
    """
    asks, wanted = schema
    if isinstance(choice, str):
        calls = bool(names) and choice == "auto"
        return calls, None if wanted is None else JsonOutput(wanted, tuple(names) if calls else ()), ()
    missing = next((name for name in choice if name not in names), None)
    if not choice or missing is not None:
        what = "there are no `tools`" if missing is None else f"{missing!r} is none of `tools`"
        raise RequestError(f"`tool_choice` asks for a call, and {what}", param="tool_choice")
    return True, CallOutput(tuple(choice)), () if wanted is None else (asks,)


def read_sampling(
    values: Mapping[str, Any], *, max_tokens: int | None, stop: str | Sequence[str] = ()
) -> Sampling:
    """How to sample; of `values` the fields of `SAMPLING` are read, but for these two.

    Raises:
        RequestError: a value cannot be used.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not text for text in stop):
        raise RequestError("`stop` must not contain an empty string", param="stop")
    if values.get("top_k") == 0:  # SGLang refuses it; elsewhere it means "all" as -1 does
        raise RequestError("`top_k` must be at least 1, or -1 for all tokens", param="top_k")
    return Sampling(
        temperature=values.get("temperature"),
        top_p=values.get("top_p"),
        top_k=values.get("top_k"),
        min_p=values.get("min_p"),
        max_tokens=max_tokens,
        stop=stop,
        stop_token_ids=tuple(values.get("stop_token_ids", ())),
        frequency_penalty=values.get("frequency_penalty"),
        presence_penalty=values.get("presence_penalty"),
        repetition_penalty=values.get("repetition_penalty"),
        seed=values.get("seed"),
        logit_bias=_logit_bias(values.get("logit_bias", {})),
    )


def session_sampling(fields: Mapping[str, Raw]) -> Sampling:
    """The sampling defaults of a session: fields of a request, under the same rules.

    Raises:
        RequestError: a field is none of `Sampling`'s, or its value cannot be used.
    """
    for name in fields:
        if name not in SAMPLING:
            raise RequestError(f"`sampling.{name}` is not a sampling parameter", param=f"sampling.{name}")
    read = {name: read_field(name, raw, SAMPLING[name]) for name, raw in fields.items()}
    values = {name: value for name, value in read.items() if value is not None}
    return read_sampling(values, max_tokens=values.get("max_tokens"), stop=values.get("stop", ()))


def _logit_bias(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for token_id in biases:
        if not _TOKEN_ID.fullmatch(token_id):
            raise RequestError("`logit_bias`: its keys must be token ids", param="logit_bias")
    return tuple(sorted((int(token_id), bias) for token_id, bias in biases.items()))


# -- the conversation


def read_messages(
    raw: Raw | None,
    session: Session,
    head: tuple[str, Sequence[Known]],
    decode: Callable[[Raw, str], Sequence[Known]],
    *,
    answers: str,
) -> Read:
    """The conversation in the field `messages`; what this session has seen before is not decoded again.

    `head` names the wire, and has the messages before these. `decode` is asked for each item that is new,
    with its place as `messages[3]`. `answers` is the key in which a result says which call it answers.

    Raises:
        RequestError: it cannot be served; `param` says where.
    """

    def read(items: Sequence[Raw], first: int, before: Conversation) -> list[Known]:
        known: list[Known] = []
        call_ids: set[str] = set()
        for index, item in enumerate(items, first):
            where = f"messages[{index}]"
            for one in decode(item, where):
                check_calls(one.message, call_ids, before, where, answers)
                known.append(one)
        return known

    if raw is None:
        raise RequestError("`messages` must have at least one message", param="messages")
    try:
        found = session.replays.read(raw, head, read)
    except msgspec.DecodeError as error:
        raise RequestError(f"`messages`: {error}", param="messages") from None
    if not found.num_items:
        raise RequestError("`messages` must have at least one message", param="messages")
    return found


def check_calls(message: Message, call_ids: set[str], before: Conversation, where: str, answers: str) -> None:
    """Add a message's calls to those seen; a tool's result must answer one of these, or one `before`.

    `answers` is the key at `where` that has the call's id.

    Raises:
        RequestError: it answers none.
    """
    call_ids.update(call.id for call in message.tool_calls)
    call_id = message.tool_call_id
    if message.role == "tool" and call_id not in call_ids and not before.has_call(call_id):
        raise RequestError(
            f"{where}: no tool call before it has the id {call_id!r}", param=f"{where}.{answers}"
        )


def check_arguments(arguments: str, where: str) -> str:
    """The arguments of a call, as they came.

    Raises:
        RequestError: they are JSON with half a surrogate pair, which is no text that a prompt could have.
    """
    if "\\ud" in arguments.lower():
        try:
            json.dumps(json.loads(arguments), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RequestError(f"{where}: the arguments have half a surrogate pair", param=where) from None
        except RecursionError:
            raise RequestError(f"{where}: the arguments are nested too deep", param=where) from None
        except ValueError:
            pass  # not JSON: whether that can be shown is the chat template's to say
    return arguments
