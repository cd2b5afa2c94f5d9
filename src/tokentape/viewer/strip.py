"""A branch's tokens as a page asks for them: lines, pieces, search, the first difference."""

import math
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence

from tokentape.types import Json
from tokentape.viewer.episode import Branch
from tokentape.viewer.glyphs import Glyphs

MAX_HITS = 2000


def lines(branch: Branch, glyphs: Glyphs, columns: int) -> "array[int]":
    """Where each line of at most so many columns begins: int32[L].

    A line ends behind a line feed, and where a turn is given tokens or begins to sample. A token that is
    wider than a line has one of its own.
    """
    edges = {at for one in branch.stretches for at in (one.begin, one.start)}
    starts, used, of = array("i"), columns, glyphs.of
    for at, token_id in enumerate(branch.token_ids):
        glyph = of(token_id)
        if at in edges or used + glyph.columns > columns:
            starts.append(at)
            used = 0
        used += glyph.columns
        if glyph.breaks:
            used = columns
    return starts


def piece(branch: Branch, glyphs: Glyphs, start: int, end: int) -> Json:
    """Tokens `start:end`, as lists of one length."""
    ids = branch.token_ids[start:end]
    shown = [glyphs.of(token_id) for token_id in ids]
    return {
        "start": start,
        "ids": ids.tolist(),
        "texts": [glyph.text for glyph in shown],
        "hex": [glyph.hex for glyph in shown],
        "logprobs": [
            None if math.isnan(value) else round(value, 6) for value in branch.logprobs[start:end].tolist()
        ],
    }


def find_id(branch: Branch, token_id: int) -> list[tuple[int, int]]:
    """Where a token stands: spans of one token, all of them."""
    return [(at, at + 1) for at, one in enumerate(branch.token_ids) if one == token_id]


def find_text(branch: Branch, glyphs: Glyphs, text: str) -> list[tuple[int, int]]:
    """Where a text stands, as spans of the tokens that it touches; ASCII letters match in either case."""
    wanted = text.encode(errors="replace")
    if not wanted:
        return []
    pieces = [glyphs.bytes_of(token_id) for token_id in branch.token_ids]
    ends, total = array("q"), 0
    for one in pieces:
        total += len(one)
        ends.append(total)
    found = re.finditer(re.escape(wanted), b"".join(pieces), re.IGNORECASE)
    return [(bisect_right(ends, hit.start()), bisect_right(ends, hit.end() - 1) + 1) for hit in found]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two branches first have other tokens, or one has ended; None where they are the same."""
    short = min(len(a), len(b))
    low, high = 0, short
    while low < high:  # the longest common prefix, compared as arrays
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return None if low == len(a) == len(b) else low
