"""Which turns a prefill can judge, and at which temperature."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec

from tokentape.export.row import Row
from tokentape.types import GREEDY_BELOW, Sampling

TurnSpan: TypeAlias = Mapping[str, Any]
"""An entry of a sample's `turns`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A sample's trained turns: by the temperature to score them at; tokens of the others by why not."""

    to_score: dict[float, list[TurnSpan]] = field(default_factory=dict[float, list[TurnSpan]])
    not_compared: Counter[str] = field(default_factory=Counter[str])


def read_sampling(row: Row) -> list[Sampling] | str:
    """How each turn was sampled; or what is wrong with the column, in words."""
    try:
        sampling = msgspec.json.decode(row["sampling"], type=list[Sampling])
    except msgspec.MsgspecError as error:
        return f"sampling is not what turns are sampled with: {error}"
    if len(sampling) != len(row["turns"]):
        return f"sampling is of {len(sampling)} turns, there are {len(row['turns'])}"
    return sampling


def plan(row: Row, sampling: list[Sampling]) -> Plan:
    """What to do with each of a sample's trained turns."""
    to_score: dict[float, list[TurnSpan]] = defaultdict(list)
    not_compared: Counter[str] = Counter()
    for turn, sampled in zip(row["turns"], sampling, strict=True):
        num_tokens = turn["end"] - turn["start"]
        if not turn["trained"] or not num_tokens:
            continue
        if (why := _why_not(sampled)) is not None:
            not_compared[why] += num_tokens
        else:
            to_score[_temperature(sampled)].append(turn)
    return Plan(dict(to_score), not_compared)


def _why_not(sampling: Sampling) -> str | None:
    """Why no prefill can say what the turn's distribution was; None where one can."""
    if sampling.is_constrained:
        return "sampled under a constraint"
    if sampling.is_penalised:
        return "sampled with penalties"
    return "sampled with logit_bias" if sampling.logit_bias else None


def _temperature(sampling: Sampling) -> float:
    """Of the recorded log-probabilities: greedy ones are not scaled."""
    temperature = sampling.temperature
    return 1.0 if temperature is None or temperature < GREEDY_BELOW else float(temperature)
