"""What was asked of a reply → the constraint that the engine samples under. No I/O.

    JsonOutput   the format has no reasoning tags: a plain JSON schema
                 else: the thought, free, then the JSON (or calls, where they are offered too)
    CallOutput   the thought, free, then calls as the format writes them, one line each

All but the first are structural tags as SGLang 0.5.23 takes them (xgrammar 0.2.7, observed): a plain schema
would forbid the thought. A thought that the prompt has opened must be closed; any other is optional.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

from tokentape.errors import RequestError
from tokentape.formats import Format
from tokentape.parse import Harmony, ThinkTags
from tokentape.types import CallOutput, Demand, Json, Sampling

Rule: TypeAlias = dict[str, Any]

MAX_DEPTH = 64
"""Schemas may nest this deep: one of 256 levels is compiled in 1.4 s, one of 900 in 33 s (observed)."""

MAX_SPACES = 16
"""Blanks in a row that JSON inside a structural tag may have: weak models write them for ever."""

# xgrammar ignores these, and inside a structural tag SGLang does not refuse them either (source).
_IGNORED = frozenset(
    {
        *("contains", "minContains", "maxContains", "uniqueItems", "multipleOf"),
        *("dependentRequired", "dependentSchemas", "if", "then", "else", "not"),
    }
)
_FORMATS = (
    *("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "json-pointer"),
    *("relative-json-pointer", "time", "uri", "uri-reference", "uri-template", "uuid"),
)
# Where a schema holds schemas; everything else in it is data.
_SCHEMA = (
    *("additionalItems", "additionalProperties", "contentSchema", "items", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED_SCHEMAS = ("$defs", "definitions", "patternProperties", "properties")

_BREAK: Rule = {
    "type": "regex",
    "pattern": "\\n{0,2}",
}  # templates put up to two line breaks behind a thought


def constrain(demand: Demand, format: Format, tools: Sequence[Json], *, reasoning_open: bool) -> Sampling:  # noqa: A002
    """The constraint for a reply: a `Sampling` with `json_schema` or `structural_tag` set, and nothing else.

    `tools` are OpenAI's dicts, `reasoning_open` says that the prompt ends inside a thought. A call's
    arguments follow the tool's own parameters as far as the engine's grammar can say them; what it cannot say
    (`multipleOf`, `not`, …) is left to the tool. Of a reply's JSON everything is kept, or the schema refused.

    Raises:
        RequestError: the schema is too deep, or asks for what would not be kept (`response_format`); the
            format has no grammar for calls, or a tool is not on offer or takes no object (`tool_choice`).
    """
    if format.syntax.channels is not None:
        # Their marks are tokens that the engine's grammars do not see as text.
        param = "tool_choice" if isinstance(demand, CallOutput) else "response_format"
        what = f"a model that writes in channels (format {format.name})"
        raise RequestError(f"neither a tool call nor JSON can be demanded of {what}", param=param)
    thought = _thought(format.reasoning, reasoning_open)
    if isinstance(demand, CallOutput):
        return _tagged([*thought, _calls(demand.names, format, tools)])
    _check_depth(demand.schema, "response_format")
    calls = demand.or_calls if format.calls else ()
    if not thought and not calls:
        return Sampling(json_schema=json.dumps(demand.schema))
    _check_kept(demand.schema)
    reply = _json(demand.schema)
    if calls:
        reply = {"type": "or", "elements": [reply, _calls(calls, format, tools)]}
    return _tagged([*thought, reply])


def _tagged(rules: list[Rule]) -> Sampling:
    tag = {"type": "structural_tag", "format": {"type": "sequence", "elements": rules}}
    return Sampling(structural_tag=json.dumps(tag))


def _json(schema: Json) -> Rule:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_SPACES}


def _thought(tags: ThinkTags | Harmony | None, is_open: bool) -> list[Rule]:
    """What may stand before the reply itself. A thought has any text but its closing tag."""
    if not isinstance(tags, ThinkTags):
        return []
    begin = "" if is_open else tags.open
    thought: Rule = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": tags.close}
    if is_open:
        return [thought, _BREAK]
    return [{"type": "optional", "content": {"type": "sequence", "elements": [thought, _BREAK]}}]


def _calls(names: Sequence[str], format: Format, tools: Sequence[Json]) -> Rule:  # noqa: A002
    if not names:
        raise RequestError("a tool call cannot be demanded: no tool is on offer", param="tool_choice")
    offered = {function.get("name"): function for function in (tool.get("function", tool) for tool in tools)}
    for name in names:
        if name not in offered:
            raise RequestError(f"tool_choice names {name!r}, which is not on offer", param="tool_choice")

    def schema_of(name: str) -> Json:
        return _json(_parameters(name, offered[name].get("parameters")))

    rules = (grammar.rule(names, schema_of) for grammar in format.calls)
    rule = next((rule for rule in rules if rule is not None), None)
    if rule is None:
        why = (
            "has no grammar for tool calls"
            if not format.calls
            else "writes calls in no way that can be enforced"
        )
        raise RequestError(
            f"a tool call cannot be demanded: this model (format {format.name}) {why}", param="tool_choice"
        )
    return rule


def _parameters(name: str, schema: object) -> Json:
    """The schema of a tool's arguments, which are an object, whatever else it leaves open."""
    if schema is None:  # OpenAI: no parameters at all
        return {"type": "object", "properties": {}}
    given = cast("Json", schema) if isinstance(schema, dict) else {"type": "not an object"}
    if "object" not in _types(given, "object"):
        raise RequestError(f"the parameters of tool {name!r} are not an object's", param="tool_choice")
    _check_depth(given, "tool_choice")
    if any(key in given for key in ("$ref", "allOf", "anyOf", "oneOf")):  # it says itself what it is
        return given
    return {**given, "type": "object"}


def _types(schema: Json, default: str) -> list[object]:
    types: object = schema.get("type", default)
    return cast("list[object]", types) if isinstance(types, list) else [types]


def _check_depth(schema: object, param: str) -> None:
    """Level by level: a deep schema must not exhaust the stack here either."""
    level: list[object] = [schema]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _children(value)]
        if not level:
            return
    raise RequestError(f"a schema may nest {MAX_DEPTH} levels deep at most", param=param)


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(cast("dict[str, object]", value).values())
    return cast("list[object]", value) if isinstance(value, list) else []


def _check_kept(schema: Json) -> None:
    """Refuse what SGLang refuses of a plain schema: a constraint that would silently not be kept."""
    for at, found in _subschemas(schema, "#"):
        for key in sorted(_IGNORED & found.keys()):
            _refuse(at, f"{key!r} cannot be kept")
        if "string" not in _types(found, "string"):
            continue
        if "format" in found and found["format"] not in _FORMATS:
            _refuse(at, f"the string format {found['format']!r} is not known")
        together = ["format" in found, "pattern" in found, "minLength" in found or "maxLength" in found]
        if sum(together) > 1:
            _refuse(at, "a string's format, pattern and length cannot be kept together")


def _refuse(at: str, why: str) -> None:
    raise RequestError(f"the schema at {at} asks for too much: {why}", param="response_format")


def _subschemas(schema: object, at: str) -> Iterator[tuple[str, Json]]:
    if not isinstance(schema, dict):
        return
    found = cast("Json", schema)
    yield at, found
    inner: list[tuple[str, object]] = [(key, found[key]) for key in _SCHEMA if key in found]
    for key in _SCHEMAS:
        values: object = found.get(key)
        if isinstance(values, list):
            inner += [(f"{key}/{n}", value) for n, value in enumerate(cast("list[object]", values))]
    for key in _NAMED_SCHEMAS:
        values = found.get(key)
        if isinstance(values, dict):
            inner += [(f"{key}/{name}", value) for name, value in cast("Json", values).items()]
    for where, value in inner:
        yield from _subschemas(value, f"{at}/{where}")
