"""Input items of a Responses request → messages.

A turn of the assistant leaves as several items (its reasoning, its text, its calls) and comes back as such:
consecutive ones are one message again. A new message starts at a reasoning item, at a text behind a text or a
call, and where the items' ids name another turn.
"""

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
from msgspec import Raw

from tokentape.conversation import Known
from tokentape.errors import NotFound, RequestError
from tokentape.gateway.fields import Keys, Unheard, check_arguments, misread
from tokentape.gateway.responses.tools import joined_name, offered
from tokentape.gateway.session import Session
from tokentape.tape import Turn
from tokentape.types import Json, Message, Role, ToolCall

_T = TypeVar("_T")
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_ITEM_ID = re.compile(r"(rs|msg|fc|ctc)_([0-9a-f]{24})_(\d{1,4})")
_RESPONSE_ID = re.compile(r"resp_([0-9a-f]{24})")
_SEALED = "tt1."
# What is heard of an item, or tells nothing that matters.
_PARTS: Keys = dict.fromkeys(("type", "text", "refusal"))
_ANY: Keys = dict.fromkeys(("type", "id", "status"))
_CALL: Keys = {**_ANY, **dict.fromkeys(("call_id", "name", "namespace"))}
_OUTPUT: Keys = {**_ANY, "call_id": None, "output": _PARTS}
_KEYS: dict[str, Keys] = {
    "message": {**_ANY, "role": None, "content": _PARTS},
    "reasoning": {**_ANY, "content": _PARTS, "summary": _PARTS, "encrypted_content": None},
    "function_call": {**_CALL, "arguments": None},
    "custom_tool_call": {**_CALL, "input": None},
    "function_call_output": _OUTPUT,
    "custom_tool_call_output": _OUTPUT,
    "item_reference": _ANY,
}
_KINDS = {"rs": "reasoning", "msg": "text", "fc": "call", "ctc": "call"}


class _Head(msgspec.Struct):
    """What tells which message an item belongs to."""

    type: str | None = None
    role: str | None = None
    id: str | None = None


class _Part(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class _Item(msgspec.Struct):
    type: str | None = None
    role: str | None = None
    id: str | None = None
    content: str | list[_Part] | None = None
    summary: list[_Part] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[_Part] | None = None


@dataclass(slots=True)
class _Group:
    """Consecutive items of one message: places in `input`, what the last of them is, the turn they name."""

    places: list[int]
    kind: str | None
    turn_id: str | None


# -- ids


def response_id(turn_id: str) -> str:
    """The name of a turn's response."""
    return f"resp_{turn_id.removeprefix('t-')}"


def item_id(prefix: str, turn_id: str, index: int) -> str:
    """The name of output item number `index` of a turn's response."""
    return f"{prefix}_{turn_id.removeprefix('t-')}_{index}"


def find_response(session: Session, id_: str, param: str | None = None) -> Turn:
    """The turn of a response.

    Raises:
        NotFound: this session has no such response, or it was not stored.
    """
    match = _RESPONSE_ID.fullmatch(id_)
    turn = session.tree.turn(f"t-{match[1]}") if match is not None else None
    if turn is None or turn.origin.wire != "responses":
        raise NotFound(f"Response with id {id_!r} not found in this session.", param=param)
    if not is_stored(turn):
        raise NotFound(f"Response {id_!r} was made with `store: false`: it cannot be asked for.", param=param)
    return turn


def is_stored(turn: Turn) -> bool:
    """Whether a response may be asked for by its id."""
    return turn.origin.noted.get("echo", {}).get("store") is not False


# -- reasoning that clients carry without reading it


def seal(reasoning: str) -> str:
    """A thought as `encrypted_content`: opaque to agents, complete wherever it is replayed."""
    return _SEALED + base64.urlsafe_b64encode(reasoning.encode()).decode()


def _unseal(text: str, where: str) -> str:
    sealed = text.removeprefix(_SEALED) if text.startswith(_SEALED) else "?"
    try:
        return base64.b64decode(sealed, altchars=b"-_", validate=True).decode()
    except ValueError:
        raise RequestError(
            f"`{where}.encrypted_content` was not made by tokentape: it cannot be read",
            param=f"{where}.encrypted_content",
        ) from None


# -- what was called


def custom_input(arguments: str) -> str:
    """The raw input of a custom tool's call; all of the arguments where the policy wrote other ones."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    match value:
        case {"input": str(text)} if len(value) == 1:
            return text
        case _:
            return arguments


def read_input(
    raw: Raw, items: str | Sequence[Raw], session: Session, unheard: Unheard
) -> Iterator[tuple[int, Known]]:
    """The messages of `input`, each with the place of its first item.

    Items that the session has seen before, byte for byte and grouped alike, are not decoded again.

    Raises:
        RequestError: an item cannot be served; `param` is its place.
    """
    if isinstance(items, str):
        yield from ((0, known) for known in session.known("responses", raw, lambda: [_said("user", items)]))
        return
    for group in _groups(_heads(raw)):
        places = group.places
        whole = items[places[0]] if len(places) == 1 else Raw(b"".join([items[at] for at in places]))
        for known in session.known("responses", whole, _decoder(items, places, session, unheard)):
            yield places[0], replace(known, turn_id=group.turn_id) if group.turn_id else known


def _decoder(
    items: Sequence[Raw], places: Sequence[int], session: Session, unheard: Unheard
) -> Callable[[], list[Message]]:
    return lambda: [_message([_item(items[at], f"input[{at}]", session, unheard) for at in places])]


def _said(role: Role, content: str) -> Message:
    return Message(role=role, content=content)


def _heads(raw: Raw) -> list[_Head]:
    try:
        return msgspec.json.decode(raw, type=list[_Head])
    except msgspec.DecodeError as error:
        raise misread(error, "input") from None


def _groups(heads: Sequence[_Head]) -> Iterator[_Group]:
    group = _Group([], None, None)
    for place, head in enumerate(heads):
        kind, turn_id = _kind(head), _turn_of(head)
        if group.places and not _continues(group, kind, turn_id):
            yield group
            group = _Group([], None, None)
        group.places.append(place)
        group.kind = kind
        group.turn_id = group.turn_id or turn_id
    if group.places:
        yield group


def _continues(group: _Group, kind: str | None, turn_id: str | None) -> bool:
    if kind in (None, "reasoning") or group.kind is None:
        return False
    if kind == "text" and group.kind != "reasoning":
        return False
    return None in (group.turn_id, turn_id) or group.turn_id == turn_id


def _kind(head: _Head) -> str | None:
    """What an item is of the assistant's message; None for other messages and tool results."""
    match head.type, head.role:
        case "reasoning", _:
            return "reasoning"
        case "function_call" | "custom_tool_call", _:
            return "call"
        case (("message" | None), "assistant"):
            return "text"
        case ("item_reference", _) | (None, None):
            match = _ITEM_ID.fullmatch(head.id or "")
            return _KINDS[match[1]] if match is not None else None
        case _:
            return None


def _turn_of(head: _Head) -> str | None:
    match = _ITEM_ID.fullmatch(head.id or "")
    return f"t-{match[2]}" if match is not None else None


# -- one item


def _item(raw: Raw, where: str, session: Session, unheard: Unheard) -> Message:
    """What one item says, as a message of its own."""
    try:
        item = msgspec.json.decode(raw, type=_Item)
    except (msgspec.DecodeError, RecursionError) as error:
        raise misread(error, where) from None
    kind = item.type or ("message" if item.role is not None else "item_reference")
    if kind in _KEYS:
        unheard.look(raw, _KEYS[kind], where)
    match kind:
        case "message":
            return _text_message(item, where)
        case "reasoning":
            return Message(role="assistant", reasoning=_reasoning(item, where))
        case "function_call":
            name = joined_name(_need(item.name, "name", where), item.namespace)
            arguments = check_arguments(_need(item.arguments, "arguments", where), where)
            return _called(ToolCall(_need(item.call_id, "call_id", where), name, arguments))
        case "custom_tool_call":
            return _called(_custom_call(item, where, session))
        case "function_call_output" | "custom_tool_call_output":
            return Message(
                role="tool",
                content=_text(_need(item.output, "output", where), f"{where}.output"),
                tool_call_id=_need(item.call_id, "call_id", where),
            )
        case "item_reference":
            return _referenced(item.id or "", where, session)
        case _:
            raise RequestError(
                f"`{where}` is of type {kind!r}, which is not supported here: only messages, reasoning, "
                "calls of functions and custom tools, and their outputs",
                param=f"{where}.type",
            )


def _message(pieces: Sequence[Message]) -> Message:
    """One message of its items."""
    if len(pieces) == 1:
        return pieces[0]
    texts = [piece.content for piece in pieces if piece.content is not None]
    return Message(
        role="assistant",
        content=texts[0] if texts else None,
        reasoning=pieces[0].reasoning,
        tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
    )


def _text_message(item: _Item, where: str) -> Message:
    role = _ROLES.get(item.role or "")
    if role is None:
        raise RequestError(
            f"`{where}.role` is {item.role!r}: it must be one of {', '.join(_ROLES)}", param=f"{where}.role"
        )
    return Message(role=role, content=_text(_need(item.content, "content", where), f"{where}.content"))


def _reasoning(item: _Item, where: str) -> str:
    """The thought itself where the item has it, else the sealed one, else its summary."""
    if item.content:
        return _text(item.content, f"{where}.content")
    if item.encrypted_content:
        return _unseal(item.encrypted_content, where)
    return _text(item.summary or [], f"{where}.summary")


def _called(call: ToolCall) -> Message:
    return Message(role="assistant", tool_calls=(call,))


def _custom_call(item: _Item, where: str, session: Session) -> ToolCall:
    name = joined_name(_need(item.name, "name", where), item.namespace)
    call_id, text = _need(item.call_id, "call_id", where), _need(item.input, "input", where)
    turn_id = _turn_of(_Head(id=item.id))
    turn = session.tree.turn(turn_id) if turn_id is not None else None
    for call in turn.reply.tool_calls if turn is not None else ():
        if (call.id, call.name) == (call_id, name) and custom_input(call.arguments) == text:
            return call  # with the arguments that the policy wrote: they may not have been an input
    return ToolCall(call_id, name, msgspec.json.encode({"input": text}).decode())


def _referenced(id_: str, where: str, session: Session) -> Message:
    """The recorded piece that an output item's id names."""
    match = _ITEM_ID.fullmatch(id_)
    turn = session.tree.turn(f"t-{match[2]}") if match is not None else None
    missing = NotFound(f"Item with id {id_!r} not found in this session.", param=f"{where}.id")
    if match is None or turn is None:
        raise missing
    if not is_stored(turn):
        raise NotFound(
            f"Item with id {id_!r} not found: items are not kept where `store` is false.", param=f"{where}.id"
        )
    own = pieces_of(turn.reply, turn.origin.noted)
    pieces = {item_id(prefix, turn.turn_id, at): piece for at, (prefix, piece) in enumerate(own)}
    if id_ not in pieces:
        raise missing
    return pieces[id_]


def pieces_of(reply: Message, noted: Json) -> list[tuple[str, Message]]:
    """The items of an assistant's message as messages of their own, each with the prefix of its id.

    A turn that says nothing is one empty text: replayed, it is still there.
    """
    special = offered(noted.get("tools", ()))
    custom = {name for name, tool in special.items() if tool.custom}
    pieces: list[tuple[str, Message]] = []
    if reply.reasoning:
        pieces.append(("rs", Message(role="assistant", reasoning=reply.reasoning)))
    if reply.content or not (reply.reasoning or reply.tool_calls):
        pieces.append(("msg", _said("assistant", reply.content or "")))
    pieces += [("ctc" if call.name in custom else "fc", _called(call)) for call in reply.tool_calls]
    return pieces


def _need(value: _T | None, name: str, where: str) -> _T:
    if value is None:
        raise RequestError(f"`{where}.{name}` is missing", param=f"{where}.{name}")
    return value


def _text(content: str | list[_Part], where: str) -> str:
    """Content as text: parts are joined as they stand."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type != "refusal" and part.type not in _TEXT_PARTS:
            raise RequestError(
                f"`{where}[{index}]` is of type {part.type!r}, which is not supported here: only text",
                param=f"{where}[{index}].type",
            )
        if text is None:
            raise RequestError(f"`{where}[{index}]` has no text", param=f"{where}[{index}]")
        texts.append(text)
    return "".join(texts)
