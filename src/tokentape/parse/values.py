"""The value of a parameter that a model writes as bare text, typed by the tool's schema.

Where the schema says string, the text is the value. Where it says something else, the text is read as JSON,
or as Python's literal (some templates print `True` and `{'a': 1}`); text that is neither stays a string,
which the tool then refuses: nothing is guessed, nothing is dropped. In what is left open, families differ.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from tokentape.parse import literals
from tokentape.parse.jsonscan import is_readable
from tokentape.types import Json

_MAX_REFS = 8
_MAX_LITERAL = 1 << 20
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True)
class Typing:
    """How a family's values are read where the schema leaves it open; as SGLang's parsers of them do.

    A value is JSON, where it can be, of a parameter without a type (`untyped_json`), of one that may be a
    string and something else (`union_json`), and where it has another type than the schema's (`misfit_json`);
    else it is text. `nulls` are texts (in lower case) that mean null, whatever the type.
    """

    untyped_json: bool = False
    union_json: bool = False
    misfit_json: bool = False
    nulls: tuple[str, ...] = ()

    def is_text(self, types: frozenset[str]) -> bool:
        """Whether a value of these types is its text for certain, so that it can be passed on as it comes."""
        return not self.nulls and not self._may_be_json(types)

    def to_json(self, text: str, types: frozenset[str]) -> str:
        """The JSON text of a parameter's value; `types` is empty where the schema does not say."""
        if text.strip().lower() in self.nulls:
            return "null"
        found = _read(text.strip(), types) if self._may_be_json(types) else None
        if found is None:
            return quote(text)
        if types and _type_of(found[1]) not in types and ("string" in types or not self.misfit_json):
            return quote(text)
        return found[0]

    def _may_be_json(self, types: frozenset[str]) -> bool:
        if not types:
            return self.untyped_json
        return types != frozenset({"string"}) and ("string" not in types or self.union_json)


TEXT = Typing()
"""Text, unless the schema has another type that the value fits."""
JSON = Typing(untyped_json=True, union_json=True, misfit_json=True)
"""JSON, unless the schema says string."""


def quote(text: str) -> str:
    """A string as JSON."""
    return json.dumps(text, ensure_ascii=False)


def types_of(root: Json, name: str) -> frozenset[str]:
    """The types that a tool's schema allows for one parameter; empty where it does not say."""
    properties = root.get("properties")
    if not isinstance(properties, dict):
        return frozenset()
    return frozenset(_types(cast("Json", properties).get(name), root, 0))


def _read(text: str, types: frozenset[str]) -> tuple[str, Any] | None:
    """The text as JSON, and its value; None where it is neither JSON nor Python's literal."""
    if not is_readable(text):
        return None
    try:
        return text, _decode(text.encode("utf-8", "surrogatepass"))
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass  # not JSON
    if not types or "string" in types or len(text) > _MAX_LITERAL:
        return None
    found = _as_literal(text, types) or _as_escaped(text, types)
    return (found, json.loads(found)) if found is not None and is_readable(found) else None


def _as_literal(text: str, types: frozenset[str]) -> str | None:
    for literal in (text, f"[{text}]") if "array" in types else (text,):  # `1, 2` is a tuple
        try:
            return literals.to_json(literal)
        except ValueError:
            continue
    return None


def _as_escaped(text: str, types: frozenset[str]) -> str | None:
    r"""GLM at times escapes a list as if it stood in a string: `[{\"a\": 1}]`."""
    if not types & {"array", "object"} or "\\" not in text:
        return None
    try:
        found = json.loads(f'"{text}"')
        return found if is_readable(found) and isinstance(json.loads(found), dict | list) else None
    except ValueError:
        return None


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _types(schema: Any, root: Json, depth: int) -> set[str]:
    if not isinstance(schema, dict) or depth > _MAX_REFS:
        return set()
    schema = cast("Json", schema)
    named = schema.get("type")
    if isinstance(named, str | list):
        types = {
            str(each).lower() for each in ([named] if isinstance(named, str) else cast("list[Any]", named))
        }
        return types | ({"integer"} if "number" in types else set())
    if isinstance(ref := schema.get("$ref"), str):
        return _types(_resolve(ref, root), root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(key), list):
            return {each for part in cast("list[Any]", parts) for each in _types(part, root, depth + 1)}
    if isinstance(values := schema.get("enum"), list):
        return {_type_of(value) for value in cast("list[Any]", values)}
    if "const" in schema:
        return {_type_of(schema["const"])}
    return {kind for key, kind in (("properties", "object"), ("items", "array")) if key in schema}


def _resolve(ref: str, root: Json) -> Any:
    at: Any = root
    if not ref.startswith("#/"):
        return None
    for key in ref[2:].split("/"):
        at = cast("Json", at).get(key.replace("~1", "/").replace("~0", "~")) if isinstance(at, dict) else None
    return at
