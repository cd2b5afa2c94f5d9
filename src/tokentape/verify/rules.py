"""What must hold of a session's samples, and which token a broken rule is about."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tokentape.export.row import Row
from tokentape.invariants import check_samples
from tokentape.verify.turns import read_sampling

_TOKEN = re.compile(r"token (\d+)\b")
_TURN = re.compile(r"turn ([^:\s]+)")


@dataclass(frozen=True, slots=True)
class Broken:
    """A broken rule in words; `index` is that of its row in the session, `at` a token that shows it."""

    words: str
    index: int | None = None
    at: int | None = None


def broken_rules(rows: Sequence[Row], vocab_size: int) -> list[Broken]:
    """All that is wrong with the rows of one session, of a model with `vocab_size` ids.

    A row that is named must not be scored: what it says cannot be relied on, and an engine may die of an id
    that it does not know.
    """
    found: list[Broken] = []
    for words in check_samples(rows):
        names = (f"sample {row.get('sample_id', f'#{n}')}: " for n, row in enumerate(rows))
        index = next((n for n, name in enumerate(names) if words.startswith(name)), None)
        found.append(Broken(words, index, None if index is None else _token(rows[index], words)))
    for index, row in enumerate(rows):
        name = f"sample {row.get('sample_id', f'#{index}')}"
        if (at := _unknown_id(row, vocab_size)) is not None:
            what = f"id {row['token_ids'][at]}, outside the model's vocabulary of {vocab_size} ids"
            found.append(Broken(f"{name}: token {at} is {what}", index, at))
        if not any(one.index == index for one in found):
            found += [Broken(f"{name}: {words}", index) for words in _own(row)]
    return found


def _own(row: Row) -> Iterator[str]:
    """What a prefill relies on, of a row that is well-formed."""
    if isinstance(sampling := read_sampling(row), str):
        yield sampling
    if any(turn["trained"] and turn["start"] == 0 < turn["end"] for turn in row["turns"]):
        yield "its first token is trained, and no model predicts a first token"


def _unknown_id(row: Row, vocab_size: int) -> int | None:
    ids: object = row.get("token_ids")
    found = enumerate(cast("list[object]", ids)) if isinstance(ids, list) else ()
    return next((at for at, i in found if isinstance(i, int) and i >= vocab_size), None)


def _token(row: Row, words: str) -> int | None:
    """The token that a broken rule names, or the first of its turn that has the wrong mask."""
    if (named := _TOKEN.search(words)) is not None:
        return int(named[1])
    if (named := _TURN.search(words)) is None:
        return None
    turns: list[dict[str, Any]] = row["turns"]
    turn = next((turn for turn in turns if turn["turn_id"] == named[1]), None)
    if turn is None or not 0 <= turn["start"] < turn["end"] <= len(row["loss_mask"]):
        return None
    span = range(turn["start"], turn["end"])
    return next((at for at in span if row["loss_mask"][at] != turn["trained"]), turn["start"])
