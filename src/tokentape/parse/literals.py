r"""Python's literals → JSON: what models write in pythonic calls, and templates where they print a dict.

Strings (with escapes, triple quotes, the prefixes r and u), numbers, True, False, None (and JSON's own true,
false, null), lists, tuples, dicts with string keys. Nothing is evaluated.
"""

import json
import re

from tokentape.parse.jsonscan import MAX_DEPTH

_SPACE = re.compile(r"\s*+")
_STRING = re.compile(
    r"""[rRuU]?(?:'''[^'\\]*+(?:(?:\\.|'(?!''))[^'\\]*+)*+'''
    |\"\"\"[^"\\]*+(?:(?:\\.|"(?!\"\"))[^"\\]*+)*+\"\"\"
    |'(?!'')[^'\\\n]*+(?:\\.[^'\\\n]*+)*+'|"(?!\"\")[^"\\\n]*+(?:\\.[^"\\\n]*+)*+")""",
    re.DOTALL | re.VERBOSE,
)
_NUMBER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)(?!\w)")
_WORD = re.compile(r"[A-Za-z]++")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|\n|.)", re.DOTALL)
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\n": ""} | {
    char: char for char in "\\'\""
}
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")


def to_json(text: str) -> str:
    """A literal as JSON text.

    Raises:
        ValueError: it is none.
    """
    found, at = _value(text, _space(text, 0), 0)
    if _space(text, at) != len(text):
        raise ValueError(f"something follows the value: {text[at : at + 20]!r}")
    return found


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _value(text: str, at: int, depth: int) -> tuple[str, int]:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if text.startswith(("[", "("), at):
        return _sequence(text, at + 1, "]" if text[at] == "[" else ")", depth)
    if text.startswith("{", at):
        return _mapping(text, at + 1, depth)
    parts: list[str] = []
    while found := _STRING.match(text, at):  # strings side by side are one
        parts.append(_string(found[0]))
        at = _space(text, found.end())
    if parts:
        return json.dumps("".join(parts), ensure_ascii=False), at
    if found := _NUMBER.match(text, at):
        return _number(found[0]), found.end()
    found = _WORD.match(text, at)
    if found is None or found[0] not in _WORDS:
        raise ValueError(f"no value: {text[at : at + 20]!r}")
    return _WORDS[found[0]], found.end()


def _sequence(text: str, at: int, close: str, depth: int) -> tuple[str, int]:
    items: list[str] = []
    num_commas = 0
    while not text.startswith(close, at := _space(text, at)):
        if len(items) > num_commas:
            raise ValueError("a comma is missing")
        item, at = _value(text, at, depth + 1)
        items.append(item)
        at = _space(text, at)
        if text.startswith(",", at):
            num_commas, at = num_commas + 1, at + 1
    if close == ")" and len(items) == 1 and not num_commas:  # only brackets
        return items[0], at + 1
    return f"[{', '.join(items)}]", at + 1


def _mapping(text: str, at: int, depth: int) -> tuple[str, int]:
    items: dict[str, str] = {}
    num_commas = 0
    while not text.startswith("}", at := _space(text, at)):
        if len(items) > num_commas:
            raise ValueError("a comma is missing")
        found = _STRING.match(text, at)
        if found is None:
            raise ValueError(f"a key is no string: {text[at : at + 20]!r}")
        at = _space(text, found.end())
        if not text.startswith(":", at):
            raise ValueError("a colon is missing")
        key = json.dumps(_string(found[0]), ensure_ascii=False)
        if key in items:
            raise ValueError(f"the key {key} stands twice")
        items[key], at = _value(text, _space(text, at + 1), depth + 1)
        at = _space(text, at)
        if text.startswith(",", at):
            num_commas, at = num_commas + 1, at + 1
    return "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}", at + 1


def _string(literal: str) -> str:
    raw = literal[0] in "rR"
    if literal[0] in "rRuU":
        literal = literal[1:]
    width = 3 if literal.startswith(("'''", '"""')) else 1
    body = literal[width:-width]
    if raw or "\\" not in body:
        return body
    text = _ESCAPE.sub(_unescape, body)
    text.encode()  # a surrogate is no character
    return text


def _unescape(found: re.Match[str]) -> str:
    escape = found[1]
    known = _ESCAPES.get(escape)
    if known is not None:
        return known
    if escape[0] in "xuU" and len(escape) > 1:
        return chr(int(escape[1:], 16))  # beyond U+10FFFF: ValueError, as for Python
    if escape[0] in "01234567":
        return chr(int(escape, 8))
    return found[0]


def _number(text: str) -> str:
    if _JSON_NUMBER.fullmatch(text):
        return text
    if "x" in text or "X" in text:
        return str(int(text, 16))
    if text.lstrip("+-").startswith("0") and text.lstrip("+-").strip("0").isdigit():
        raise ValueError(f"a number with leading zeros: {text[:20]}")
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"a number too large: {text[:20]}")
    return str(int(text)) if text.lstrip("+-").isdigit() else repr(value)
