"""Formats of one's own: rows of `formats.FORMATS` out of a TOML file."""

import itertools
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from tokentape.errors import ConfigError
from tokentape.formats import Format
from tokentape.parse import Grammar, Harmony, JsonCalls, NamedCalls, PythonicCalls, ThinkTags, XmlCalls
from tokentape.types import Json

T = TypeVar("T")

GRAMMARS: dict[str, type[Any]] = {
    "json": JsonCalls,
    "named": NamedCalls,
    "xml": XmlCalls,
    "pythonic": PythonicCalls,
    "harmony": Harmony,
}
"""The grammars by the names that a TOML file gives them."""

_APART = ("open", "key_open", "value_end", "close")  # marks of a grammar that may stand in the same place


def read_formats(path: Path) -> tuple[Format, ...]:
    """The rows of a TOML file, one `[[format]]` each; see docs/formats.md.

    Raises:
        ConfigError: it cannot be read, or a row is not right; it says what to change.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{path} has no [[format]] table: see docs/formats.md")
    return tuple(_row(table, f"{path}: format {n}") for n, table in enumerate(cast("list[Any]", tables), 1))


def _row(table: Any, where: str) -> Format:
    row = _made(_Row, table, where)
    calls = tuple(_grammar(each, f"{where}, calls {n}") for n, each in enumerate(row.calls, 1))
    reasoning = row.reasoning
    if isinstance(reasoning, str):
        if reasoning != "harmony":
            raise ConfigError(f'{where}: reasoning is a pair of tags (open, close), or "harmony"')
        return Format(row.name, calls, Harmony(), row.marks)
    tags = None if reasoning is None else _made(ThinkTags, reasoning, f"{where}, reasoning")
    return Format(row.name, calls, tags, row.marks)


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    calls: tuple[Json, ...] = ()
    reasoning: Json | str | None = None
    marks: tuple[str, ...] = ()


def _grammar(table: Json, where: str) -> Grammar:
    known = ", ".join(GRAMMARS)
    kind = GRAMMARS.get(str(table.get("grammar")))
    if kind is None:
        raise ConfigError(f"{where}: grammar is one of {known}")
    grammar = _made(kind, {key: value for key, value in table.items() if key != "grammar"}, where)
    marks = [mark for name in _APART if (mark := getattr(grammar, name, ""))]
    for one, other in itertools.permutations(marks, 2):
        if other.startswith(one):
            raise ConfigError(
                f"{where}: {other!r} begins with {one!r}: marks must be told apart at their beginning"
            )
    return grammar


def _made(kind: type[T], table: Any, where: str) -> T:
    """An object of a dataclass out of a table of its fields."""
    names = [field.name for field in fields(cast("Any", kind))]
    if isinstance(table, dict):
        unknown = sorted(cast("Json", table).keys() - set(names))
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(names)}")
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
