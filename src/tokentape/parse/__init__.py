"""Reads a completion's text as it streams: reasoning, content and tool calls. No I/O.

What a `Parser` promises:

- The result does not depend on how the text was cut into `feed` calls.
- Nothing is lost. A call that cannot be delivered stays in the content, marks included, where the model wrote
  it, and every attempt is listed with its span and what was wrong with it. The pieces of the result, joined,
  are the text.
- The work is linear in the text, whatever the chunks.

All that is left out of content and reasoning, on purpose: the reasoning tags and the newlines at the
thought's edges, the space behind the closing tag, the text of delivered calls with the marks around them, and
the space that these leave at the content's edges. Space means space, tab, CR and LF: what JSON calls
whitespace.
"""

from tokentape.parse.events import (
    REASONING_UNCLOSED,
    ArgumentsDelta,
    CallAttempt,
    CallDelta,
    CallStatus,
    ParseEvent,
    ParseResult,
    Piece,
    PieceKind,
    ReasoningDelta,
    SaidEvent,
    TextDelta,
)
from tokentape.parse.grammar import Grammar, Section
from tokentape.parse.harmony import Harmony
from tokentape.parse.json_calls import JsonCalls, NamedCalls
from tokentape.parse.parser import Parser, Syntax, ThinkTags
from tokentape.parse.pythonic import PythonicCalls
from tokentape.parse.xml_calls import XmlCalls

__all__ = [
    "REASONING_UNCLOSED",
    "ArgumentsDelta",
    "CallAttempt",
    "CallDelta",
    "CallStatus",
    "Grammar",
    "Harmony",
    "JsonCalls",
    "NamedCalls",
    "ParseEvent",
    "ParseResult",
    "Parser",
    "Piece",
    "PieceKind",
    "PythonicCalls",
    "ReasoningDelta",
    "SaidEvent",
    "Section",
    "Syntax",
    "TextDelta",
    "ThinkTags",
    "XmlCalls",
]
