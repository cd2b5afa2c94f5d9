"""Text that agents change from request to request without meaning it: billing headers, today's date.

A rule finds such pieces in system and user text; what the assistant said and what tools returned counts to
the letter. Pieces do not count when a request is matched against what is recorded: the request continues the
recorded turn, whose prompt keeps the text that it was sampled with. No token is ever changed; what the
request asked for instead is recorded with the turn.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from tokentape.errors import ConfigError
from tokentape.types import Message

# Claude Code's first system block. `cch` may be a checksum of the request, the version's last part is a hash
# of the first user message. What says who speaks (`cc_is_subagent=true;`) comes after these and counts.
_BILLING = r"\Ax-anthropic-billing-header:((?: (?:cc_version|cc_entrypoint|cch|cc_workload)=[^;\s]*;)+)"
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_WEEKDAY = r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]{0,6},? )?"
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?: ?[ap]m)?(?: ?(?:z|utc|gmt|[+-]\d{2}:?\d{2}))?"
_DATE = (
    rf"(?:{_WEEKDAY}(?:\d{{4}}[-/]\d{{1,2}}[-/]\d{{1,2}}|\d{{1,2}}[-/.]\d{{1,2}}[-/.]\d{{4}}"
    rf"|{_MONTH} {_DAY},? \d{{4}}|{_DAY} {_MONTH},? \d{{4}})(?:(?:t|,? (?:at )?){_CLOCK})?\b|{_CLOCK}\b)"
)
_TODAY = r"\b(?:today|today's date|(?:current|local) (?:date|time|date and time|datetime))(?: is)?:? "

RULES: Mapping[str, str] = {
    "billing-header": _BILLING,
    "date": rf"(?i)(?:{_TODAY}|<current_(?:date|time)>)({_DATE})",
}
"""The rules that have a name. A pattern's group, where it has one, is the piece; else all that it matches."""

Piece: TypeAlias = tuple[int, int, int]
"""The rule's number, and where the piece starts and ends."""


class Superseded(msgspec.Struct, frozen=True):
    """A request said `asked` where the recorded prompt says `recorded`; by `rule` that does not count."""

    rule: str
    recorded: str
    asked: str


@dataclass(frozen=True, slots=True)
class Volatile:
    """Rules: pairs of a name and a pattern. Of pieces that overlap the first counts."""

    rules: tuple[tuple[str, re.Pattern[str]], ...] = ()

    @classmethod
    def of(cls, rules: Sequence[str]) -> "Volatile":
        """Rules by name, or as regular expressions.

        Raises:
            ConfigError: one is neither, matches the empty text, or has more than one group.
        """
        compiled: list[tuple[str, re.Pattern[str]]] = []
        for rule in rules:
            if rule not in RULES and re.fullmatch(r"[\w-]+", rule):  # a word never changes: a name misspelt
                raise ConfigError(f"--volatile {rule!r} is no rule's name: {', '.join(RULES)}")
            try:
                pattern = re.compile(RULES.get(rule, rule))
            except re.error as error:
                raise ConfigError(
                    f"--volatile {rule!r} is neither a rule's name ({', '.join(RULES)}) nor a regular "
                    f"expression: {error}"
                ) from None
            if pattern.search("") is not None:
                raise ConfigError(f"--volatile {rule!r} matches the empty text")
            if pattern.groups > 1:
                raise ConfigError(
                    f"--volatile {rule!r} has {pattern.groups} groups: at most one is the piece"
                )
            compiled.append((rule, pattern))
        return cls(tuple(compiled))

    def pieces(self, message: Message) -> list[Piece]:
        """The volatile pieces of a message in their order; none in what was sampled or a tool returned."""
        if message.role not in ("system", "user") or not message.content:
            return []
        found: list[Piece] = []
        end = 0
        for piece in sorted(self._found(message.content), key=lambda piece: (piece[1], piece[0])):
            if piece[1] >= end:
                found.append(piece)
                end = piece[2]
        return found

    def superseded(self, recorded: Message, asked: Message) -> list[Superseded]:
        """How two messages differ that are the same without their volatile pieces."""
        old, new = recorded.content or "", asked.content or ""
        if old == new:
            return []
        return [
            Superseded(self.rules[rule][0], old[a:b], new[c:d])
            for (rule, a, b), (_, c, d) in zip(self.pieces(recorded), self.pieces(asked), strict=True)
            if old[a:b] != new[c:d]
        ]

    def _found(self, text: str) -> Iterator[Piece]:
        for number, (_, pattern) in enumerate(self.rules):
            for match in pattern.finditer(text):
                start, end = match.span(pattern.groups)
                if start < end:  # a group that took no part, or nothing, is no piece
                    yield number, start, end


NOTHING = Volatile()
"""No rule: every character counts."""


def without(text: str, pieces: Sequence[Piece]) -> list[str | int]:
    """What counts of a text: what stands around its pieces, and for each piece only its rule's number."""
    out: list[str | int] = []
    at = 0
    for rule, start, end in pieces:
        out += [text[at:start], rule]
        at = end
    return [*out, text[at:]]
