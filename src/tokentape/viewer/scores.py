"""What an engine says of a branch's tokens now, beside what was recorded when they were sampled."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import msgspec

from tokentape.engines.sglang_score import Scores
from tokentape.errors import ContextOverflow
from tokentape.types import Json, Sampling
from tokentape.verify.turns import plan
from tokentape.viewer.episode import Branch, Episode


class Scorer(Protocol):
    """What is asked of an engine: `engines.sglang.SGLangEngine` has it."""

    async def score(self, ids: Sequence[int], start: int, temperature: float = 1.0) -> Scores:
        """Log-probabilities (nats) of `ids[start:]`, at the temperature that the answer names."""
        ...


async def recomputed(scorer: Scorer, episode: Episode, branch: Branch) -> Json:
    """The log-probabilities of all sampled tokens that a prefill can judge.

    `spans` are `[start, [nats, …]]`; `not_compared` counts tokens by why not, as `tokentape verify` does.

    Raises:
        EngineError: the engine failed.
    """
    stretches = [one for one in branch.stretches if one.end > one.start > 0 and _is_known(branch, one.start)]
    sampling = [msgspec.convert(episode.turns[one.turn_id].sampling, Sampling) for one in stretches]
    row = {"turns": [{"start": one.start, "end": one.end, "trained": True} for one in stretches]}
    todo = plan(row, sampling)
    not_compared, spans, version = Counter(todo.not_compared), list[Json | list[object]](), None
    for temperature, turns in todo.to_score.items():
        start, end = turns[0]["start"], turns[-1]["end"]
        scores = await _score(scorer, branch.token_ids.tolist(), start, end, temperature)
        if scores is None:
            not_compared["beyond the engine's context"] += sum(turn["end"] - turn["start"] for turn in turns)
            continue
        version = scores.weight_version
        if scores.temperature != temperature:
            not_compared[f"sampled at temperature {temperature:g}"] += sum(
                t["end"] - t["start"] for t in turns
            )
            continue
        for turn in turns:
            spans.append([turn["start"], scores.logprobs[turn["start"] - start : turn["end"] - start]])
    return {"spans": spans, "not_compared": dict(not_compared), "weight_version": version}


def _is_known(branch: Branch, at: int) -> bool:
    return not math.isnan(branch.logprobs[at])


async def _score(
    scorer: Scorer, ids: Sequence[int], start: int, end: int, temperature: float
) -> Scores | None:
    """Scores of `ids[start:end]`, or of as many as the engine takes; None where it takes none."""
    try:
        return await scorer.score(ids[:end], start, temperature)
    except ContextOverflow as error:
        most = (error.context_length or 0) - 1
        return await scorer.score(ids[:most], start, temperature) if start < most < end else None
