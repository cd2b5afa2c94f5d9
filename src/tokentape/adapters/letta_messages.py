"""What Letta says → Chat Completions dicts, and what Letta forgets of a reply, put back. No I/O, no Letta.

Letta keeps a copy of each reply, and the copy is not the reply: text beside tool calls is scrubbed, calls
beyond the first are dropped where parallel calls are off, arguments are loaded and dumped, thoughts and empty
replies vanish. The model saw none of that. `Replies` knows what was sampled and puts it back where Letta's
copy is what Letta makes of it; a copy that was edited otherwise stays as it is, and is another history.
"""

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, cast

from tokentape.errors import RequestError
from tokentape.types import Json

MAX_CALL_ID = 29
"""Letta cuts the ids of tool calls to so many characters (its `TOOL_CALL_ID_MAX_LEN`)."""

_ROLES = {"approval": "assistant", "summary": "user"}  # Letta's own roles
_POPPED = ("request_heartbeat", "thinking")  # arguments that Letta takes out before it runs a tool


def chat_messages(messages: Sequence[Any]) -> list[Json]:
    """Messages as Chat Completions dicts: from dicts or objects, content as text, parts or None.

    Calls and results without an id are paired by their order.

    Raises:
        RequestError: a part of a message is neither text nor a thought.
    """
    chat: list[Json] = []
    waiting: list[str] = []  # calls without a result
    for index, message in enumerate(messages):
        role = _plain(_field(message, "role"))
        out: Json = {"role": _ROLES.get(role, role)}
        content, thought = _content(_field(message, "content"), f"messages[{index}]")
        out["content"] = content
        if out["role"] == "assistant":
            thought = _field(message, "reasoning_content") or thought
            calls = [_call(call, index, n) for n, call in enumerate(_field(message, "tool_calls") or ())]
            if thought:
                out["reasoning_content"] = thought
            if calls:
                out["tool_calls"] = calls
                waiting = [call["id"] for call in calls]
        else:
            out["content"] = content or ""
        if out["role"] == "tool":
            call_id = _field(message, "tool_call_id") or next(iter(waiting), None)
            if call_id in waiting:
                waiting.remove(call_id)
            out["tool_call_id"] = call_id
        name = _field(message, "name")
        if name and out["role"] in ("tool", "user"):
            out["name"] = name
        chat.append(out)
    return chat


def chat_tools(tools: Sequence[Any]) -> list[Json]:
    """Tools as Chat Completions dicts: from those, bare function dicts, or objects of either kind."""
    chat: list[Json] = []
    for tool in tools:
        function = _field(tool, "function") or tool
        if not isinstance(function, Mapping):
            names = ("name", "description", "parameters", "strict")
            values = {name: _field(function, name) for name in names}
            function = {name: value for name, value in values.items() if value is not None}
        chat.append({"type": "function", "function": dict(cast("Mapping[str, Any]", function))})
    return chat


class Replies:
    """The replies of one session, as they were sampled, by the ids of their calls."""

    def __init__(self) -> None:
        self._by_call: dict[str, Json] = {}
        self._silent: list[tuple[list[Json], Json]] = []

    def add(self, sent: list[Json], reply: Json) -> None:
        """Remember what was answered to the messages `sent`."""
        for call in reply.get("tool_calls", ()):
            self._by_call[call["id"][:MAX_CALL_ID]] = reply
        if not reply.get("tool_calls") and not (reply.get("content") or "").strip():
            self._silent.append((sent, reply))  # Letta never sends back a reply without text and calls

    def put_back(self, messages: Sequence[Json]) -> list[Json]:
        """The messages with every reply as it was sampled where Letta's copy is nothing but that: a copy."""
        whole = [self._sampled(message) for message in messages]
        for sent, reply in self._silent:
            if (
                len(whole) > len(sent)
                and whole[: len(sent)] == sent
                and whole[len(sent)]["role"] != "assistant"
            ):
                whole.insert(len(sent), reply)
        return whole

    def _sampled(self, message: Json) -> Json:
        if message["role"] != "assistant" or not message.get("tool_calls"):
            return message
        reply = self._by_call.get(message["tool_calls"][0]["id"][:MAX_CALL_ID])
        return reply if reply is not None and _is_copy(message, reply) else message


def _is_copy(message: Json, reply: Json) -> bool:
    """Whether this is what Letta makes of the reply: some of its calls, its text or none."""
    text = _text(message.get("content")).strip()
    calls = {call["id"][:MAX_CALL_ID]: call["function"] for call in reply["tool_calls"]}
    return text in ("", _text(reply.get("content")).strip()) and all(
        _same_call(call["function"], calls.get(call["id"][:MAX_CALL_ID])) for call in message["tool_calls"]
    )


def _same_call(copy: Json, sampled: Json | None) -> bool:
    if sampled is None or copy["name"] != sampled["name"]:
        return False
    if copy["arguments"] == sampled["arguments"]:
        return True
    arguments = copy["arguments"]
    loaded = cast("Json", arguments) if isinstance(arguments, dict) else _loaded(arguments)
    original = _loaded(sampled["arguments"])
    as_run = (
        _loaded(sampled["arguments"].split("}{", 1)[0] + "}") if "}{" in sampled["arguments"] else original
    )
    without = {key: value for key, value in (as_run or {}).items() if key not in _POPPED}
    return loaded is not None and loaded in (original, without)


def _loaded(arguments: str) -> Json | None:
    """The object that a JSON text writes, None where it writes none."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return cast("Json", value) if isinstance(value, dict) else None


def _field(value: Any, name: str) -> Any:
    """A field of a dict or of an object of somebody else's; None where it has none."""
    if isinstance(value, Mapping):
        return cast("Mapping[str, Any]", value).get(name)
    return getattr(value, name, None)


def _plain(role: Any) -> str:
    return str(role.value if isinstance(role, Enum) else role)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else ""


def _content(content: Any, where: str) -> tuple[str | None, str | None]:
    """The text and the thought of a message's content."""
    if content is None or isinstance(content, str):
        return content, None
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind, text = _plain(_field(part, "type")), _field(part, "text")
        if isinstance(part, str):
            texts.append(part)
        elif text is not None:
            texts.append(text)
        elif kind == "tool_return":
            texts.append(_field(part, "content"))
        elif kind == "reasoning":
            thoughts.append(_field(part, "reasoning"))
        elif not kind.endswith("reasoning"):  # a redacted or omitted thought has nothing to show
            raise RequestError(f"{where}: content of type {kind!r} is not supported, only text", param=where)
    return "\n".join(texts) if texts else None, "\n".join(thoughts) or None


def _call(call: Any, index: int, number: int) -> Json:
    function: Any = _field(call, "function") or {}
    arguments = _field(function, "arguments")
    return {
        "id": _field(call, "id") or f"call_{index}_{number}",
        "type": "function",
        "function": {"name": _field(function, "name"), "arguments": "{}" if arguments is None else arguments},
    }
