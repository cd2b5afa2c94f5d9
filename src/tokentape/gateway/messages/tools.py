"""Anthropic's tools → OpenAI's, which chat templates know."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from tokentape.errors import RequestError
from tokentape.gateway.fields import read_field

# What a field's JSON begins with, and what that is. Values are passed on as they are written, not decoded.
_HONOURED: Mapping[str, tuple[bytes, str]] = {
    "type": (b'"', "a string"),
    "name": (b'"', "a string"),
    "description": (b'"', "a string"),
    "input_schema": (b"{", "an object"),
}
# Refused unless the value is the one that asks for nothing.
_REFUSED: Mapping[str, tuple[Any, str]] = {
    "defer_loading": (False, "every tool is shown to the model"),
    "allowed_callers": (["direct"], "only the model calls tools here"),
}
_NOTED = frozenset({"cache_control"})
_NOTHING: Sequence[Any] = (None, False, [])


def read_tools(tools: Sequence[Mapping[str, Raw]]) -> tuple[bytes, set[str]]:
    """The tools as JSON of OpenAI's dicts, and the names of the fields that have no effect.

    What moves between requests without meaning it is left out: the JSON is the same where the tools are.

    Raises:
        RequestError: one cannot be served; `param` says which.
    """
    functions: list[Any] = []
    ignored: set[str] = set()
    names: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        given = _given(tool, where)
        name = read_field(f"{where}.name", given["name"], str)
        if not name or name in names:
            raise RequestError(f"{where}.name: tools must have names, each its own", param=f"{where}.name")
        names.add(name)
        function: dict[str, Any] = {"name": name}
        if "description" in given:
            function["description"] = given["description"]
        function["parameters"] = given["input_schema"]
        functions.append({"type": "function", "function": function})
        ignored.update(_ignored(tool, where))
    return msgspec.json.encode(functions), ignored


def _given(tool: Mapping[str, Raw], where: str) -> dict[str, Raw]:
    """The honoured fields that are there.

    Raises:
        RequestError: one is missing or of another type, or the tool is not the caller's to run.
    """
    given = {name: tool[name] for name in _HONOURED if name in tool and bytes(tool[name]) != b"null"}
    for name, raw in given.items():
        begins, kind = _HONOURED[name]
        if not bytes(raw).startswith(begins):
            raise RequestError(f"{where}.{name} must be {kind}", param=f"{where}.{name}")
    if "type" in given and (kind := read_field(f"{where}.type", given["type"], str)) != "custom":
        raise RequestError(
            f"{where}: tools of type {kind!r} are not supported here: this gateway has no tools of its own, "
            "and only Anthropic's models know theirs; describe it as a custom tool",
            param=f"{where}.type",
        )
    for name in ("name", "input_schema"):
        if name not in given:
            raise RequestError(f"{where}.{name} is missing", param=f"{where}.{name}")
    for name in tool.keys() & _REFUSED.keys():
        harmless, hint = _REFUSED[name]
        if read_field(f"{where}.{name}", tool[name], Any) not in (None, harmless):
            raise RequestError(f"{where}.{name} is not supported here: {hint}", param=f"{where}.{name}")
    return given


def _ignored(tool: Mapping[str, Raw], where: str) -> Iterator[str]:
    for name in tool.keys() - _HONOURED.keys() - _REFUSED.keys() - _NOTED:
        if read_field(f"{where}.{name}", tool[name], Any) not in _NOTHING:
            yield f"tools[].{name}"
