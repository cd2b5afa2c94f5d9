"""Tokens as text to look at: what is invisible, reorders its neighbours or is half is spelled out.

The page shows these texts as they are, in lines of a fixed width; so their width is known here, too.
"""

import unicodedata
from dataclasses import dataclass

from tokentape.tokenizer import Tokenizer

_HIDDEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})
_JOINING = frozenset({"Mn", "Me", "Mc"})


@dataclass(frozen=True, slots=True)
class Glyph:
    """One token as it is shown, over so many columns; `breaks`: the next one stands on a new line."""

    text: str
    columns: int
    breaks: bool
    hex: str


class Glyphs:
    """Every id's glyph, made once; without a tokenizer an id is shown as its number."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._made: dict[int, Glyph] = {}

    def of(self, token_id: int) -> Glyph:
        """The glyph of an id, whatever it is."""
        glyph = self._made.get(token_id)
        if glyph is None:
            glyph = self._made[token_id] = self._make(token_id)
        return glyph

    def bytes_of(self, token_id: int) -> bytes:
        """A token's bytes, b"" where it has none or there is no tokenizer."""
        if self.tokenizer is None or token_id < 0:
            return b""
        try:
            return self.tokenizer.token_bytes(token_id)
        except (IndexError, OverflowError):  # no such id in this vocabulary
            return b""

    def _make(self, token_id: int) -> Glyph:
        data = self.bytes_of(token_id)
        if not data:
            text = f" {token_id}" if self.tokenizer is None else f"⟨#{token_id}⟩"
            return Glyph(text, len(text), False, "")
        text = visible(data.decode("utf-8", errors="surrogateescape"))
        return Glyph(text, width(text), b"\n" in data, data.hex())


def visible(text: str) -> str:
    """A text in which everything can be seen: controls as pictures or numbers, half characters as bytes."""
    if text.isascii() and text.isprintable():
        return text
    shown = [_visible(character) for character in text]
    if unicodedata.category(text[0]) in _JOINING:  # it would sit on the token before
        shown.insert(0, "◌")
    return "".join(shown)


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎"
    if character == "\t":
        return "⇥"
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no character by itself
        return f"⟨{code - 0xDC00:02x}⟩"
    if unicodedata.category(character) in _HIDDEN:
        return f"⟨U+{code:04X}⟩"
    return character


def width(text: str) -> int:
    """Columns that a visible text takes in a font of fixed width."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.category(c) in _JOINING else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
