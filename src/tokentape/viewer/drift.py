"""Where decoding a turn's completion and encoding its text again would give other ids."""

import codecs
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from tokentape.tokenizer import Tokenizer
from tokentape.types import Json
from tokentape.viewer.episode import Branch
from tokentape.viewer.glyphs import Glyphs

MAX_SHOWN = 64
"""So many tokens of a place are named on either side."""
_ANCHOR = 4  # so many same ids are the same place again, where the texts themselves are not the same

_Segment: TypeAlias = tuple[int, int, int, int]


def drifts(branch: Branch, tokenizer: Tokenizer, glyphs: Glyphs) -> list[Json]:
    """The places of a branch where re-encoding would split the same text otherwise.

    Tokens `start:end` of the branch, whose texts are `recorded`, would become `num_ids` others: `ids`, with
    their `texts`. `cut`: a side has more than `MAX_SHOWN`, and only so many are named. Each turn is taken by
    itself, as `tokentape verify` counts it.
    """
    out: list[Json] = []
    for one in branch.stretches:
        ids = branch.token_ids[one.start : one.end]
        again = tokenizer.encode(tokenizer.decode([i for i in ids if glyphs.bytes_of(i)]))
        if again == ids:
            continue
        for segment in _segments(ids, again, glyphs):
            start, end, first, last = _trimmed(ids, again, segment)
            mine = ids[start : min(end, start + MAX_SHOWN)]
            other = again[first : min(last, first + MAX_SHOWN)]
            out.append(
                {
                    "turn_id": one.turn_id,
                    "start": one.start + start,
                    "end": one.start + end,
                    "recorded": [glyphs.of(token_id).text for token_id in mine],
                    "ids": other.tolist(),
                    "texts": [glyphs.of(token_id).text for token_id in other],
                    "num_ids": last - first,
                    "cut": max(end - start, last - first) > MAX_SHOWN,
                }
            )
    return out


def _segments(ids: "array[int]", again: "array[int]", glyphs: Glyphs) -> Iterator[_Segment]:
    """Runs `start:end` of `ids` in whose place `again` has others, `first:last`."""
    (ends, text), (others, other_text) = _ends(ids, glyphs), _ends(again, glyphs)
    if text != other_text:  # a normalizer has changed it
        yield from _anchored(ids, again)
        return
    at = other = start = first = 0
    while at < len(ids) and other < len(again):
        if ends[at] < others[other]:
            at += 1
        elif ends[at] > others[other]:
            other += 1
        else:
            at, other = at + 1, other + 1
            if ids[start:at] != again[first:other]:
                yield start, at, first, other
            start, first = at, other
    if start < len(ids) or first < len(again):  # ids without a text are behind all others
        yield start, len(ids), first, len(again)


def _anchored(ids: "array[int]", again: "array[int]") -> Iterator[_Segment]:
    """The same by the ids alone: on from a difference to the nearest run of `_ANCHOR` that both have."""
    places: defaultdict[bytes, list[int]] = defaultdict(list)
    for place in range(len(again) - _ANCHOR + 1):
        places[again[place : place + _ANCHOR].tobytes()].append(place)
    at = other = 0
    while at < len(ids) and other < len(again):
        if ids[at] == again[other]:
            at, other = at + 1, other + 1
            continue
        end, last, skipped = len(ids), len(again), len(ids) - at + len(again) - other
        for begin in range(at, len(ids) - _ANCHOR + 1):
            if begin - at >= skipped:
                break
            same = places.get(ids[begin : begin + _ANCHOR].tobytes(), [])
            nearest = bisect_left(same, other)
            if nearest < len(same) and begin - at + same[nearest] - other < skipped:
                end, last = begin, same[nearest]
                skipped = end - at + last - other
        yield at, end, other, last
        at, other = end, last
    if at < len(ids) or other < len(again):
        yield at, len(ids), other, len(again)


def _trimmed(ids: Sequence[int], again: Sequence[int], segment: _Segment) -> _Segment:
    """A segment without the ids that both sides begin or end with."""
    start, end, first, last = segment
    while start < end and first < last and ids[start] == again[first]:
        start, first = start + 1, first + 1
    while start < end and first < last and ids[end - 1] == again[last - 1]:
        end, last = end - 1, last - 1
    return start, end, first, last


def _ends(ids: Sequence[int], glyphs: Glyphs) -> tuple[list[int], bytes]:
    """Where each token ends in the text of all, and that text; bytes that are no character are U+FFFD there.

    A token may end within a character: so many of its bytes count. None ends within such a U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = bytearray()
    ends: list[int] = []
    open_ends: list[bytes] = []  # what the last tokens have of a character that has only begun
    for at, token_id in enumerate(ids, 1):
        piece = decoder.decode(glyphs.bytes_of(token_id), final=at == len(ids)).encode()
        if piece and open_ends:
            if not piece.startswith(open_ends[-1]):  # it has become none
                within = [len(text)] * (len(open_ends) - 1)
                ends[-len(open_ends) :] = [*within, len(text) + len("\ufffd".encode())]
            open_ends.clear()
        text += piece
        if begun := decoder.getstate()[0]:
            open_ends.append(begun)
        ends.append(len(text) + len(begun))
    return ends, bytes(text)
