"""Text that agents change from request to request without meaning it: billing headers, the time of day.

A rule names a piece of system or user text. Such pieces do not count when a request is matched against what
is recorded: the request continues the recorded turn, whose prompt keeps the text that it was sampled with. No
token is ever changed; what the request asked for instead is recorded with the turn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from tokentape.errors import ConfigError

RULES: Mapping[str, str] = {
    "billing-header": r"x-anthropic-billing-header:[^\n]*",
    "date": r"(?i)\b(?:today(?:'s date)?|current date(?: and time)?|date|time)(?: is)?: ?[^\n]*\d[^\n]*",
}
"""The rules that have a name: a regular expression each."""

_MARK = "\ufdd0"  # no character: what a rule leaves behind cannot be written by anybody


class Superseded(msgspec.Struct, frozen=True):
    """A request said `asked` where the recorded prompt says `recorded`; by `rule` that does not count."""

    rule: str
    recorded: str
    asked: str


@dataclass(frozen=True, slots=True)
class Volatile:
    """Rules: pairs of a name and a pattern."""

    rules: tuple[tuple[str, re.Pattern[str]], ...] = ()

    @classmethod
    def of(cls, rules: Sequence[str]) -> "Volatile":
        """Rules by name, or as regular expressions.

        Raises:
            ConfigError: one is neither, or matches the empty text.
        """
        compiled: list[tuple[str, re.Pattern[str]]] = []
        for rule in rules:
            try:
                pattern = re.compile(RULES.get(rule, rule))
            except re.error as error:
                raise ConfigError(
                    f"--volatile {rule!r} is neither a rule's name ({', '.join(RULES)}) nor a regular "
                    f"expression: {error}"
                ) from None
            if pattern.match("") is not None:
                raise ConfigError(f"--volatile {rule!r} matches the empty text")
            compiled.append((rule, pattern))
        return cls(tuple(compiled))

    def without(self, text: str) -> str:
        """The text as it is matched: every volatile piece replaced by one and the same mark."""
        for _, pattern in self.rules:
            text = pattern.sub(_MARK, text)
        return text

    def superseded(self, recorded: str, asked: str) -> list[Superseded]:
        """How two texts differ that are the same without their volatile pieces."""
        if recorded == asked:
            return []
        return [
            Superseded(rule, old, new)
            for rule, pattern in self.rules
            for old, new in zip(_pieces(pattern, recorded), _pieces(pattern, asked), strict=False)
            if old != new
        ]


NOTHING = Volatile()
"""No rule: every character counts."""


def _pieces(pattern: re.Pattern[str], text: str) -> list[str]:
    return [match[0] for match in pattern.finditer(text)]
