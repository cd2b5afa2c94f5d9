"""Responses that are asked for by their id: answered from the session's recorded turns."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from tokentape.errors import RequestError
from tokentape.gateway.responses.items import find_response, pieces_of, response_id
from tokentape.gateway.responses.output import (
    ResponseFields,
    asked_of,
    begun,
    ended,
    output_items,
    piece_item,
)
from tokentape.gateway.session import Session
from tokentape.gateway.turn import Turns
from tokentape.gateway.wire import WireConfig
from tokentape.tape import Turn
from tokentape.types import Json, Message

Answer: TypeAlias = Callable[[Session, Turns, WireConfig, str, Mapping[str, str]], Json]


def retrieve(session: Session, turns: Turns, config: WireConfig, id_: str, query: Mapping[str, str]) -> Json:
    """A response as it was given.

    Raises:
        NotFound: the session has no such response.
    """
    if query.get("stream", "false").lower() not in ("false", "0"):
        raise RequestError("`stream`: a response that is over is not streamed again", param="stream")
    turn = find_response(session, id_)
    asked = _asked(turn, session, config, query)
    [done] = turns.recorded(session, [turn.turn_id])
    return ended(begun(turn.turn_id, turn.created_at, asked), done, asked)


def input_items(
    session: Session, turns: Turns, config: WireConfig, id_: str, query: Mapping[str, str]
) -> Json:
    """What a response had before it, a page of it: newest first, unless `order` says otherwise.

    Raises:
        NotFound: the session has no such response, or no such item.
        RequestError: a number or word in `query` cannot be used.
    """
    del turns
    turn = find_response(session, id_)
    items = _items(turn, session, config, query)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError("`order` must be asc or desc", param="order")
    if order == "desc":
        items.reverse()
    try:
        limit = int(query.get("limit", "20"))
    except ValueError:
        limit = 0
    if not 1 <= limit <= 100:
        raise RequestError("`limit` must be a number from 1 to 100", param="limit")
    if (after := query.get("after")) is not None:
        at = next((at for at, item in enumerate(items) if item["id"] == after), None)
        if at is None:
            raise RequestError(f"`after`: {after!r} is no item of this response", param="after")
        items = items[at + 1 :]
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }


def delete(session: Session, turns: Turns, config: WireConfig, id_: str, query: Mapping[str, str]) -> Json:
    """Refuse: a response is part of the session's tape.

    Raises:
        RequestError: always.
    """
    del turns, config, query
    find_response(session, id_)
    raise RequestError(
        "a response is part of its session's tape and is not deleted alone; DELETE /sessions/{id} removes "
        "the session, and `store: false` keeps a response from being asked for"
    )


def cancel(session: Session, turns: Turns, config: WireConfig, id_: str, query: Mapping[str, str]) -> Json:
    """Refuse: nothing runs in the background.

    Raises:
        RequestError: always.
    """
    del turns, config, query
    find_response(session, id_)
    raise RequestError(
        "Cannot cancel a synchronous response: to stop one while it is made, close the connection."
    )


def _asked(turn: Turn, session: Session, config: WireConfig, query: Mapping[str, str]) -> ResponseFields:
    include = [value for name in ("include", "include[]") for value in query.get(name, "").split(",")]
    conversation = session.tree.path(turn.turn_id)[0].messages
    return asked_of(turn, conversation, session.session_id, config, include)


def _items(turn: Turn, session: Session, config: WireConfig, query: Mapping[str, str]) -> list[Json]:
    """The conversation before a turn, oldest first. What was sampled has the ids of its responses."""
    path = session.tree.path(turn.turn_id)
    items: list[Json] = []
    own = response_id(turn.turn_id).removeprefix("resp_")
    custom: set[str] = set()
    for one in path:
        asked = _asked(one, session, config, query)
        messages = one.messages
        if one is path[0] and turn.origin.noted.get("instructions"):
            messages = messages[1:]
        for message in messages:
            items += _said(message, f"{own}_in{len(items)}", asked, custom)
        if one is not turn:
            items += output_items(one, asked)
            custom.update(item["call_id"] for item in items if item["type"] == "custom_tool_call")
    return items


def _said(message: Message, number: str, asked: ResponseFields, custom: set[str]) -> Sequence[Json]:
    """A message that came with a request."""
    if message.role == "assistant":
        tools = asked.offered()
        return [
            piece_item(f"{prefix}_{number}_{at}", prefix, piece, "completed", asked, tools)
            for at, (prefix, piece) in enumerate(pieces_of(message, asked.noted))
        ]
    if message.role == "tool":
        kind = "custom_tool_call_output" if message.tool_call_id in custom else "function_call_output"
        return [
            {
                "id": f"{'ctco' if message.tool_call_id in custom else 'fco'}_{number}",
                "type": kind,
                "status": "completed",
                "call_id": message.tool_call_id,
                "output": message.content,
            }
        ]
    return [
        {
            "id": f"msg_{number}",
            "type": "message",
            "status": "completed",
            "role": message.role,
            "content": [{"type": "input_text", "text": message.content}],
        }
    ]
