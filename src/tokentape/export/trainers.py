"""The table of trainers: what `tokentape export --format NAME` can write. Each has a file of its own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tokentape.export import areal, nemo_rl, skyrl, slime, verl
from tokentape.export.row import Row
from tokentape.types import Json


@dataclass(frozen=True, slots=True)
class Trainer:
    """One trainer's rows.

    `rows` turns samples into plain values (numbers, texts, lists, dicts) under the names that the trainer's
    own classes have. `convention` says in one line where masks, log-probabilities and rewards stand.
    """

    name: str
    rows: Callable[[Sequence[Row]], Iterator[Json]]
    convention: str


_ALL: tuple[Trainer, ...] = (
    Trainer("areal", areal.rows, areal.CONVENTION),
    Trainer("nemo-rl", nemo_rl.rows, nemo_rl.CONVENTION),
    Trainer("skyrl", skyrl.rows, skyrl.CONVENTION),
    Trainer("slime", slime.rows, slime.CONVENTION),
    Trainer("verl", verl.rows, verl.CONVENTION),
)

TRAINERS: dict[str, Trainer] = {trainer.name: trainer for trainer in _ALL}
"""By the name that `--format` takes."""
