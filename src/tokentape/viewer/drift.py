"""Where decoding a turn's completion and encoding its text again would give other ids."""

from array import array
from collections.abc import Iterator, Sequence

from tokentape.tokenizer import Tokenizer
from tokentape.types import Json
from tokentape.viewer.episode import Branch
from tokentape.viewer.glyphs import Glyphs


def drifts(branch: Branch, tokenizer: Tokenizer, glyphs: Glyphs) -> list[Json]:
    """The places of a branch where re-encoding would split the same text otherwise.

    Tokens `start:end` of the branch would become `ids`; `texts` are theirs. Each turn is taken by itself, as
    `tokentape verify` counts it.
    """
    out: list[Json] = []
    for one in branch.stretches:
        ids = branch.token_ids[one.start : one.end]
        again = tokenizer.encode(tokenizer.decode([i for i in ids if glyphs.bytes_of(i)]))
        if again == ids:
            continue
        for start, end, first, last in _segments(ids, again, glyphs):
            other = again[first:last].tolist()
            out.append(
                {
                    "turn_id": one.turn_id,
                    "start": one.start + start,
                    "end": one.start + end,
                    "ids": other,
                    "texts": [glyphs.of(token_id).text for token_id in other],
                }
            )
    return out


def _segments(ids: "array[int]", again: "array[int]", glyphs: Glyphs) -> Iterator[tuple[int, int, int, int]]:
    """Runs `start:end` of `ids` that stand for the same bytes as `first:last` of `again`, and differ."""
    ends, others = _ends(ids, glyphs), _ends(again, glyphs)
    if (ends[-1] if ends else 0) != (
        others[-1] if others else 0
    ):  # half characters: no common bytes to go by
        head = next((n for n, (a, b) in enumerate(zip(ids, again, strict=False)) if a != b), 0)
        yield head, len(ids), head, len(again)
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


def _ends(ids: Sequence[int], glyphs: Glyphs) -> list[int]:
    """Where each token's bytes end."""
    out: list[int] = []
    total = 0
    for token_id in ids:
        total += len(glyphs.bytes_of(token_id))
        out.append(total)
    return out
