"""The table of trainers: what `tokentape export --format NAME` can write. Each has a file of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokentape.export import areal, huggingface, nemo_rl, openrlhf, skyrl, slime, tinker, trl, verifiers, verl
from tokentape.types import Json


@dataclass(frozen=True, slots=True)
class Trainer:
    """One trainer's rows.

    `rows(samples)` turns samples, a sequence of rows, into plain values (numbers, texts, lists, dicts) under
    the names that the trainer's own classes have; it may go over them several times, in order, and keeps
    none. Where `takes_experts` it has a keyword `experts_per_token`. `convention` says in one line where
    masks, log-probabilities and rewards stand.
    """

    name: str
    rows: Callable[..., Iterator[Json]]
    convention: str
    takes_experts: bool = True


_ALL: tuple[Trainer, ...] = (
    Trainer("areal", areal.rows, areal.CONVENTION, takes_experts=False),
    Trainer("datasets", huggingface.rows, huggingface.CONVENTION),
    Trainer("nemo-rl", nemo_rl.rows, nemo_rl.CONVENTION),
    Trainer("openrlhf", openrlhf.rows, openrlhf.CONVENTION, takes_experts=False),
    Trainer("prime-rl", verifiers.rows, verifiers.CONVENTION),
    Trainer("skyrl", skyrl.rows, skyrl.CONVENTION),
    Trainer("slime", slime.rows, slime.CONVENTION),
    Trainer("tinker", tinker.rows, tinker.CONVENTION, takes_experts=False),
    Trainer("trl", trl.rows, trl.CONVENTION, takes_experts=False),
    Trainer("verl", verl.rows, verl.CONVENTION),
)

TRAINERS: dict[str, Trainer] = {trainer.name: trainer for trainer in _ALL}
"""By the name that `--format` takes."""
