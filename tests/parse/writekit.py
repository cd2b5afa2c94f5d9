"""Writes calls each grammar's way, for round trips: what a model that is right would write."""

import json
from collections.abc import Sequence
from typing import Any

from tokentape.parse import Grammar, Harmony, JsonCalls, NamedCalls, PythonicCalls, XmlCalls

TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
Wanted = tuple[str, dict[str, Any]]


def tool_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The schema of a tool that takes such arguments."""
    return {
        "type": "object",
        "properties": {key: {"type": TYPES.get(type(value), "null")} for key, value in arguments.items()},
    }


def write(grammar: Grammar, calls: Sequence[Wanted]) -> str:
    """One block of calls; each call is a name and its arguments."""
    match grammar:
        case JsonCalls():
            return write_json(grammar, calls)
        case NamedCalls():
            return in_section(grammar, [write_named(grammar, i, *call) for i, call in enumerate(calls)])
        case XmlCalls():
            return in_section(grammar, [write_xml(grammar, *call) for call in calls])
        case PythonicCalls():
            return f"{grammar.open}[{', '.join(write_pythonic(*call) for call in calls)}]{grammar.close}"
        case Harmony():
            return "<|start|>assistant".join(write_harmony(*call) for call in calls)
        case _:
            raise TypeError(grammar)


def in_section(grammar: NamedCalls | XmlCalls, calls: Sequence[str]) -> str:
    section = grammar.section
    if section is None:
        return "".join(calls)
    if isinstance(grammar, NamedCalls):
        return f"{section.open}{''.join(calls)}{section.close}"
    return "\n".join((section.open, *calls, section.close))


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def write_json(grammar: JsonCalls, calls: Sequence[Wanted]) -> str:
    bodies = [dumped({"name": name, "arguments": arguments}) for name, arguments in calls]
    if grammar.separator:
        return grammar.open + f"{grammar.separator} ".join(bodies)
    if grammar.list_open:
        return f"{grammar.list_open}[{', '.join(bodies)}]{grammar.list_close}"
    return "\n".join(f"{grammar.open}\n{body}\n{grammar.close}" for body in bodies)


def write_named(grammar: NamedCalls, index: int, name: str, arguments: dict[str, Any]) -> str:
    if grammar.numbered:
        name = f"functions.{name}:{index}"
    if grammar.id_begin:
        name += f"{grammar.id_begin}call{index:05}"
    return f"{grammar.open}{name}{grammar.name_end}{dumped(arguments)}{grammar.close}"


def write_xml(grammar: XmlCalls, name: str, arguments: dict[str, Any]) -> str:
    edge = "\n" if grammar.newlines else ""
    parts = [f"{grammar.open}{name}{grammar.name_end}"]
    for key, value in arguments.items():
        kind = f"{str(isinstance(value, str)).lower()}{grammar.kind_end}" if grammar.kind_end else ""
        parts.append(
            f"{grammar.key_open}{key}{grammar.key_end}{grammar.value_open}{kind}"
            f"{edge}{text_of(value)}{edge}{grammar.value_end}"
        )
    return "\n".join((*parts, grammar.close))


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else dumped(value)


def write_pythonic(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def write_harmony(name: str, arguments: dict[str, Any]) -> str:
    message = dumped(arguments)
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{message}<|call|>"
