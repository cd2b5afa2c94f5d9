"""Anthropic's messages → ours. One of theirs may be several of ours: a tool's result is a message of its own.

Text blocks that stand side by side are joined with an empty line. What the assistant said is joined as it
stands: its blocks are pieces of one text, and must give back that text.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import msgspec
from msgspec import Raw

from tokentape.conversation import Known
from tokentape.errors import RequestError
from tokentape.gateway.fields import Keys, Unheard, misread, read_field, read_messages
from tokentape.gateway.replays import Read
from tokentape.gateway.session import Session
from tokentape.types import Json, Message, Role, ToolCall

ERROR_PREFIX = "Error: "
"""What stands before the text of a tool result with `is_error`."""

_T = TypeVar("_T")
_BETWEEN = "\n\n"
_MARK = b'"cache_control"'


class _Text(msgspec.Struct):
    text: str


class _Thinking(msgspec.Struct):
    thinking: str
    signature: str = ""


class _ToolUse(msgspec.Struct):
    id: str
    name: str
    input: Json


class _ToolResult(msgspec.Struct):
    tool_use_id: str
    content: str | list[Raw] | None = None
    is_error: bool | None = None


class _WireMessage(msgspec.Struct):
    role: str
    content: str | list[Raw]


class _Head(msgspec.Struct):
    type: str


class _Place(NamedTuple):
    """Where something stands in a request, and who takes note of its keys without effect."""

    name: str
    unheard: Unheard

    def inside(self, name: str) -> "_Place":
        return _Place(self.name + name, self.unheard)


_Block: TypeAlias = _Text | _Thinking | _ToolUse | _ToolResult
_ROLES: Mapping[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}
_TEXT: Mapping[str, type[_Block]] = {"text": _Text}
_BLOCKS: Mapping[Role, Mapping[str, type[_Block]]] = {
    "user": {"text": _Text, "tool_result": _ToolResult},
    "assistant": {"text": _Text, "thinking": _Thinking, "tool_use": _ToolUse},
    "system": _TEXT,
}
_MESSAGE: Keys = dict.fromkeys(_WireMessage.__struct_fields__)
_KEYS: Mapping[type[_Block], Keys] = {
    block: dict.fromkeys(("type", "cache_control", *block.__struct_fields__))
    for block in (_Text, _Thinking, _ToolUse, _ToolResult)
}


def read_system(raw: Raw | None, session: Session, unheard: Unheard) -> tuple[Known, ...]:
    """The system prompt as a message; () where there is none.

    Raises:
        RequestError: it is not text; `param` says where.
    """
    if raw is None:
        return ()

    def decode() -> list[Message]:
        content = cast("str | list[Raw] | None", read_field("system", raw, str | list[Raw]))
        text = _text(content, _Place("system", unheard))
        return [Message(role="system", content=text)] if text else []

    return session.known("messages/system", raw, decode)


def read_conversation(raw: Raw | None, session: Session, system: Sequence[Known], unheard: Unheard) -> Read:
    """The conversation with the system's text; what this session has seen before is not decoded again.

    Raises:
        RequestError: it cannot be served; `param` says where.
    """

    def decode(raw: Raw, where: str) -> Sequence[Known]:
        return session.known("messages", raw, lambda: [*_decode(raw, _Place(where, unheard), session)])

    read = read_messages(raw, session, ("messages", system), decode, answers="content")
    if read.conversation.known(len(read.conversation) - 1)[0].message.role == "assistant":
        raise RequestError(
            "`messages` ends with an assistant message: prefill is not supported here, end with a user's",
            param="messages",
        )
    return read


def read_cache_control(fields: Mapping[str, Raw]) -> Json:
    """What a request wants cached: where → the mark. Only what has a mark is looked into."""
    found: Json = {}
    if "cache_control" in fields:
        found["cache_control"] = read_field("cache_control", fields["cache_control"], Any)
    for name in ("system", "tools", "messages"):
        raw = bytes(fields.get(name, b""))
        if _MARK in raw and raw.startswith(b"["):
            for index, item in enumerate(msgspec.json.decode(raw, type=list[Raw])):
                if _MARK in bytes(item):
                    where = f"{name}[{index}]"
                    found.update(_marks(read_field(where, item, Any), where))
    return {where: mark for where, mark in found.items() if mark is not None}


def _marks(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        block = cast("Json", value)
        yield where, block.get("cache_control")
        for index, inner in enumerate(block["content"] if isinstance(block.get("content"), list) else ()):
            yield from _marks(inner, f"{where}.content[{index}]")


def _decode(raw: Raw, place: _Place, session: Session) -> Iterator[Message]:
    where = place.name
    wire = _read(raw, _WireMessage, where)
    place.unheard.look(raw, _MESSAGE, where)
    role = _ROLES.get(wire.role)
    if role is None:
        raise RequestError(
            f"{where}.role is {wire.role!r}: it must be one of {', '.join(_ROLES)}", param=f"{where}.role"
        )
    if role == "assistant":
        yield _said(wire.content, place, session)
    elif isinstance(wire.content, str):
        yield Message(role=role, content=wire.content)
    elif not wire.content:
        raise RequestError(f"{where}.content is empty", param=f"{where}.content")
    else:
        yield from _told(role, wire.content, place)


def _told(role: Role, raws: Sequence[Raw], place: _Place) -> Iterator[Message]:
    """What was said to the model: its texts and results in their order."""
    texts: list[str] = []
    for at, block in _blocks(raws, _BLOCKS[role], place.inside(".content")):
        if isinstance(block, _Text):
            texts.append(block.text)
            continue
        if texts:
            yield Message(role=role, content=_BETWEEN.join(texts))
            texts = []
        if isinstance(block, _ToolResult):
            text = _text(block.content, at.inside(".content"))
            yield Message(
                role="tool",
                content=f"{ERROR_PREFIX}{text}" if block.is_error else text,
                tool_call_id=block.tool_use_id,
            )
    if texts:
        yield Message(role=role, content=_BETWEEN.join(texts))


def _said(content: str | Sequence[Raw], place: _Place, session: Session) -> Message:
    """What the model said."""
    if isinstance(content, str):
        return Message(role="assistant", content=content)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for _, block in _blocks(content, _BLOCKS["assistant"], place.inside(".content")):
        match block:
            case _Text(text):
                texts.append(text)
            case _Thinking():
                thoughts.append(_thought(block, session))
            case _ToolUse(id_, name, input_):
                calls.append(ToolCall(id_, name, msgspec.json.encode(input_).decode()))
            case _ToolResult():
                pass  # not among the assistant's blocks
    return Message(
        role="assistant",
        content="".join(texts) if texts else None,
        reasoning="".join(thoughts) or None,
        tool_calls=tuple(calls),
    )


def _thought(block: _Thinking, session: Session) -> str:
    """A thought; one that was left out of the reply is found by its signature, the turn's id."""
    turn = None if block.thinking else session.tree.turn(block.signature)
    return block.thinking if turn is None else turn.reply.reasoning or ""


def _text(content: str | Sequence[Raw] | None, place: _Place) -> str:
    """Text, or text blocks whose list is at `place`."""
    if content is None or isinstance(content, str):
        return content or ""
    blocks = _blocks(content, _TEXT, place)
    return _BETWEEN.join(block.text for _, block in blocks if isinstance(block, _Text))


def _blocks(
    raws: Sequence[Raw], types: Mapping[str, type[_Block]], place: _Place
) -> Iterator[tuple[_Place, _Block]]:
    """The blocks of the list at `place`, each with where it stands.

    Raises:
        RequestError: one is of a type that this place does not take.
    """
    for index, raw in enumerate(raws):
        inner = place.inside(f"[{index}]")
        at = inner.name
        name = _read(raw, _Head, at).type
        if name not in types:
            raise RequestError(
                f"{at}: blocks of type {name!r} are not supported here, only {', '.join(types)}",
                param=f"{at}.type",
            )
        block = _read(raw, types[name], at)
        place.unheard.look(raw, _KEYS[types[name]], at)
        yield inner, block


def _read(raw: Raw, type_: type[_T], where: str) -> _T:
    try:
        return msgspec.json.decode(raw, type=type_)
    except (msgspec.DecodeError, RecursionError) as error:
        raise misread(error, where) from None
