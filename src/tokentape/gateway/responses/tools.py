"""Tools of a Responses request ↔ the functions that the policy is shown.

    function   the same function
    custom     a function with one string parameter, `input`; its calls leave as raw text
    namespace  its tools, each as `<namespace>__<name>`; their calls leave with the namespace apart

Tools of every other type are run by OpenAI, or mean what only its models know; they are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from msgspec import Raw

from tokentape.errors import RequestError
from tokentape.gateway.fields import Keys, Unheard, misread
from tokentape.types import Json

_HINTS: Mapping[str, str] = {
    "web_search": ' (Codex: web_search = "disabled" in config.toml)',
    "tool_search": " (Codex: multi_agent = false under [features] in config.toml)",
}


class _Format(msgspec.Struct):
    type: Literal["text", "grammar"]
    syntax: str | None = None
    definition: str | None = None


class _Tool(msgspec.Struct):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: Raw = Raw(b"null")
    strict: bool | None = None
    defer_loading: bool | None = None
    format: _Format | None = None
    tools: list[Raw] | None = None


_KEYS: Keys = {
    **dict.fromkeys(_Tool.__struct_fields__),
    "format": dict.fromkeys(_Format.__struct_fields__),
}


class _Named(msgspec.Struct, omit_defaults=True):
    type: str
    name: str | None = None


class Choice(msgspec.Struct, omit_defaults=True):
    """A `tool_choice` that is an object."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[_Named] | None = None


class Offered(msgspec.Struct, frozen=True):
    """What a function of the policy is for the client, where it is not simply the same function."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(slots=True)
class Tools:
    """The tools of a request.

    `functions` are what the policy is shown, in Chat Completions' shape, JSON each, `names` theirs. `special`
    are the tools that are something else for the client: custom ones as they came, namespaces with their
    functions as names. `strict` are the names of functions that were declared so.
    """

    functions: list[bytes] = field(default_factory=list[bytes])
    names: list[str] = field(default_factory=list[str])
    special: list[Json] = field(default_factory=list[Json])
    strict: list[str] = field(default_factory=list[str])

    def to_json(self) -> bytes:
        """The functions as a JSON list."""
        return b"[" + b",".join(self.functions) + b"]"

    def add(self, tool: _Tool, where: str, namespace: str | None = None) -> None:
        """Add a function or custom tool."""
        name = joined_name(tool.name or "", namespace)
        if not tool.name:
            raise RequestError(f"`{where}.name` is missing", param=f"{where}.name")
        if name in self.names:
            raise RequestError(f"`{where}`: there are two tools {name!r}", param=f"{where}.name")
        if tool.defer_loading:
            raise RequestError(
                f"`{where}.defer_loading`: there is no tool search here, leave it out",
                param=f"{where}.defer_loading",
            )
        self.names.append(name)
        function: Json = {"name": name}
        if tool.type == "custom":
            function |= {"description": _free_form(tool), "parameters": _INPUT}
        else:
            if tool.description is not None:
                function["description"] = tool.description
            if tool.parameters != b"null":
                function["parameters"] = tool.parameters
            if tool.strict:
                self.strict.append(name)
        self.functions.append(msgspec.json.encode({"type": "function", "function": function}))


_INPUT: Json = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "the tool's whole input, as free text"}},
    "required": ["input"],
}


def joined_name(name: str, namespace: str | None) -> str:
    """The name under which the policy knows a tool."""
    return name if namespace is None else f"{namespace}__{name}"


def read_tools(raws: Sequence[Raw], unheard: Unheard) -> Tools:
    """Read the tools of a request.

    Raises:
        RequestError: one cannot be served; `param` is its place.
    """
    tools = Tools()
    for index, raw in enumerate(raws):
        where = f"tools[{index}]"
        tool = _read(raw, where, unheard)
        if tool.type == "namespace":
            if not tool.name:
                raise RequestError(f"`{where}.name` is missing", param=f"{where}.name")
            inner: list[Any] = []
            for at, inner_raw in enumerate(tool.tools or ()):
                place = f"{where}.tools[{at}]"
                one = _read(inner_raw, place, unheard)
                _check_type(one, place)
                tools.add(one, place, tool.name)
                inner.append(_plain(inner_raw, place) if one.type == "custom" else one.name)
            tools.special.append(
                {"type": "namespace", "name": tool.name, "description": tool.description, "tools": inner}
            )
            continue
        _check_type(tool, where)
        tools.add(tool, where)
        if tool.type == "custom":
            tools.special.append(_plain(raw, where))
    return tools


def offered(special: Sequence[Json]) -> dict[str, Offered]:
    """By the policy's names, the tools that are something else for the client."""
    out: dict[str, Offered] = {}
    for tool in special:
        if tool["type"] == "custom":
            out[tool["name"]] = Offered(tool["name"], custom=True)
            continue
        namespace: str = tool["name"]
        for inner in tool["tools"]:
            name: str = inner if isinstance(inner, str) else inner["name"]
            out[joined_name(name, namespace)] = Offered(name, namespace, not isinstance(inner, str))
    return out


def wire_tools(functions: Sequence[Json], special: Sequence[Json], strict: Sequence[str]) -> list[Json]:
    """The tools of a recorded turn as a reply repeats them."""
    whole = {_name(function): function["function"] for function in functions}
    wrapped = offered(special)
    out = [_function(name, one, strict) for name, one in whole.items() if name not in wrapped]
    for tool in special:
        if tool["type"] == "custom":
            out.append(tool)
            continue
        inner = [
            one
            if not isinstance(one, str)
            else _function(one, whole[joined_name(one, tool["name"])], strict, tool["name"])
            for one in tool["tools"]
        ]
        out.append({**tool, "tools": inner})
    return out


def read_choice(choice: str | Choice, tools: Tools) -> Literal["auto", "none"] | Sequence[str]:
    """`tool_choice`, or the names of the tools of which one must be called.

    Raises:
        RequestError: it asks for what cannot be kept.
    """
    match choice:
        case "auto" | "none":
            return choice
        case "required":
            return tools.names
        case Choice(type="function" | "custom"):
            return (choice.name or "",)
        case Choice(type="allowed_tools"):
            names = [tool.name or tool.type for tool in choice.tools or ()]
            if choice.mode == "required":
                return names
            if set(names) >= set(tools.names):
                return "auto"
            raise RequestError(
                "`tool_choice`: allowed tools can be kept to with mode 'required' only; send the allowed "
                "ones alone as `tools`",
                param="tool_choice",
            )
        case _:
            kind = choice.type if isinstance(choice, Choice) else choice
            raise RequestError(f"`tool_choice`: {kind!r} is not supported here", param="tool_choice")


def _read(raw: Raw, where: str, unheard: Unheard) -> _Tool:
    try:
        tool = msgspec.json.decode(raw, type=_Tool)
        unheard.look(raw, _KEYS, where)
    except (msgspec.DecodeError, RecursionError) as error:
        raise misread(error, where) from None
    return tool


def _plain(raw: Raw, where: str) -> Json:
    try:
        return msgspec.json.decode(raw)
    except RecursionError:
        raise RequestError(f"`{where}` is nested too deep", param=where) from None


def _check_type(tool: _Tool, where: str) -> None:
    if tool.type not in ("function", "custom"):
        raise RequestError(
            f"`{where}` is of type {tool.type!r}: a policy of your own has nobody to run it, only functions, "
            f"custom tools and namespaces of them can be served. Remove it{_HINTS.get(tool.type, '')}.",
            param=f"{where}.type",
        )


def _free_form(tool: _Tool) -> str:
    return "\n\n".join(_free_form_parts(tool))


def _free_form_parts(tool: _Tool) -> Iterator[str]:
    if tool.description:
        yield tool.description
    if tool.format is not None and tool.format.definition:
        syntax = f" ({tool.format.syntax})" if tool.format.syntax else ""
        yield f"The input is free text that follows this grammar{syntax}:\n{tool.format.definition}"
    else:
        yield "The input is free text."


def _name(function: Json) -> str:
    return function["function"]["name"]


def _function(name: str, function: Json, strict: Sequence[str], namespace: str | None = None) -> Json:
    return {
        "type": "function",
        "name": name,
        "description": function.get("description"),
        "parameters": function.get("parameters"),
        "strict": joined_name(name, namespace) in strict,
    }
