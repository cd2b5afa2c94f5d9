"""Tokens as text to look at: what is invisible, reorders its neighbours or is half is spelled out.

The page shows these texts as they are, in lines of a fixed width; so their width is known here, too.
"""

import codecs
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from tokentape.tokenizer import Tokenizer

_HIDDEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})
# Unicode's Default_Ignorable_Code_Point, of which `unicodedata` knows nothing, but U+FE0F: emoji end with it.
_IGNORED = (
    *(range(0xAD, 0xAE), range(0x34F, 0x350), range(0x61C, 0x61D), range(0x115F, 0x1161)),
    *(range(0x17B4, 0x17B6), range(0x180B, 0x1810), range(0x200B, 0x2010), range(0x202A, 0x202F)),
    *(range(0x2060, 0x2070), range(0x3164, 0x3165), range(0xFE00, 0xFE0F), range(0xFEFF, 0xFF00)),
    *(range(0xFFA0, 0xFFA1), range(0xFFF0, 0xFFF9), range(0x1BCA0, 0x1BCA4), range(0x1D173, 0x1D17B)),
    range(0xE0000, 0xE1000),
)
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
        self._bytes: dict[int, bytes] = {}
        self._single = {} if tokenizer is None else _single_bytes(tokenizer)
        self._before = None if tokenizer is None else _plain_token(tokenizer)

    def of(self, token_id: int) -> Glyph:
        """The glyph of an id, whatever it is."""
        glyph = self._made.get(token_id)
        if glyph is None:
            glyph = self._made[token_id] = self._make(token_id)
        return glyph

    def bytes_of(self, token_id: int) -> bytes:
        """A token's bytes where others stand before it, b"" where it has none or there is no tokenizer."""
        if self.tokenizer is None or token_id < 0:
            return b""
        data = self._bytes.get(token_id)
        if data is None:
            try:
                data = self._bytes[token_id] = self._read(self.tokenizer, token_id)
            except (IndexError, OverflowError):  # no such id in this vocabulary
                return b""
        return data

    def ends(self, ids: Sequence[int]) -> tuple[list[int], str]:
        """How many characters are whole behind each token, and the text of all."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces, ends, total = list[str](), list[int](), 0
        for token_id in ids:
            pieces.append(decoder.decode(self.bytes_of(token_id)))
            total += len(pieces[-1])
            ends.append(total)
        return ends, "".join(pieces) + decoder.decode(b"", final=True)

    def _read(self, tokenizer: Tokenizer, token_id: int) -> bytes:
        """What an id adds to a text: decoded alone, a byte is U+FFFD, and a word may lose its space."""
        if token_id in self._single:
            return self._single[token_id]
        data = tokenizer.token_bytes(token_id)
        if self._before is None or not _is_text(data):  # half a character: all tokens are bytes here
            return data
        before, text = self._before
        whole = tokenizer.decode([before, token_id])
        return whole[len(text) :].encode() if whole.startswith(text) else data

    def _make(self, token_id: int) -> Glyph:
        data = self.bytes_of(token_id)
        if not data:
            text = f" {token_id}" if self.tokenizer is None else f"⟨#{token_id}⟩"
            return Glyph(text, len(text), False, "")
        text = visible(data.decode("utf-8", errors="surrogateescape"))
        return Glyph(text, width(text), b"\n" in data, data.hex())


def _single_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The tokens `<0x00>` to `<0xFF>`, where each stands for a byte, as in Gemma, and not for itself."""
    ids = {byte: tokenizer.id_of(f"<0x{byte:02X}>") for byte in range(256)}
    letter = ids[ord("A")]
    if letter is None or tokenizer.token_text(letter) != "A":
        return {}
    return {token_id: bytes([byte]) for byte, token_id in ids.items() if token_id is not None}


def _plain_token(tokenizer: Tokenizer) -> tuple[int, str] | None:
    """A token that others can stand behind, and its text."""
    for letter in "aeinostAEINOST":
        token_id = tokenizer.id_of(letter)
        if token_id is not None and tokenizer.token_text(token_id) == letter:
            return token_id, letter
    return None


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def visible(text: str) -> str:
    """A text in which everything can be seen: controls as pictures or numbers, half characters as bytes."""
    if text.isascii() and text.isprintable():
        return text
    shown = [_visible(character) for character in text]
    if unicodedata.category(shown[0][0]) in _JOINING:  # it would sit on the token before
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
    if unicodedata.category(character) in _HIDDEN or any(code in codes for codes in _IGNORED):
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
