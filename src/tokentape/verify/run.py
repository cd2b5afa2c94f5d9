"""Reads a file session by session, checks it, and has an engine score what was trained."""

import asyncio
from array import array
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec

from tokentape.engines.sglang_score import Scores
from tokentape.errors import ContextOverflow
from tokentape.export.row import Row, read_rows, sessions_in, versions_of
from tokentape.invariants import check_samples
from tokentape.tape import GREEDY_BELOW
from tokentape.tokenizer import Tokenizer
from tokentape.types import Json
from tokentape.verify.figures import Figures
from tokentape.verify.report import Drift, Offence, Report, Summary

MAX_VIOLATIONS = 100
"""So many broken rules are told in words; all are counted."""
NEIGHBOURS = 8
"""Tokens before and behind a first offence that are shown with it."""


class Scorer(Protocol):
    """What is asked of an engine: `engines.sglang.SGLangEngine` has it."""

    async def score(self, ids: Sequence[int], start: int, temperature: float = 1.0) -> Scores:
        """Log-probabilities (nats) of `ids[start:]`, at the temperature that the answer names."""
        ...


@dataclass(slots=True)
class _Found:
    """What was found so far."""

    tolerance: float
    judged: frozenset[str]
    whole: Figures = field(init=False)
    versions: dict[str, Figures] = field(default_factory=dict[str, Figures])
    not_compared: Counter[str] = field(default_factory=Counter[str])
    violations: list[str] = field(default_factory=list[str])
    num_violations: int = 0
    num_samples: int = 0
    num_trained: int = 0
    first: tuple[int, Offence] | None = None
    num_turns: int = 0
    num_drifted: int = 0
    num_in_drifted: int = 0

    def __post_init__(self) -> None:
        self.whole = Figures(self.tolerance)

    def violated(self, problems: Sequence[str]) -> None:
        self.num_violations += len(problems)
        self.violations += problems[: MAX_VIOLATIONS - len(self.violations)]


async def verify(
    path: Path,
    engine: Scorer,
    *,
    engine_version: str | None,
    vocab_size: int,
    tolerance: float,
    max_share: float,
    judged: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    concurrency: int = 8,
    on_sample: Callable[[], None] = lambda: None,
) -> Report:
    """Check a Parquet file of samples against an engine.

    An id is below `vocab_size`. Tokens of the versions `judged` (none given: of `engine_version`) must be
    within `tolerance` nats of what the engine recomputes, but for `max_share` of them; ten times the
    tolerance none may exceed. Those of other versions are compared all the same. `concurrency` samples are
    scored at a time; `on_sample` is called for each that is done.

    Raises:
        ConfigError: it is no file of samples.
        EngineError: the engine failed.
    """
    versions = frozenset(judged) or frozenset({engine_version or ""})
    found = _Found(tolerance, versions)
    check = _Check(engine, found, tokenizer, vocab_size, on_sample)
    async for rows in _by_session(path):
        await check.session(rows, concurrency)
    await check.rest()
    return Report(
        path=str(path),
        engine_version=engine_version,
        tolerance=tolerance,
        max_share=max_share,
        num_samples=found.num_samples,
        num_trained=found.num_trained,
        num_violations=found.num_violations,
        violations=tuple(found.violations),
        not_compared=dict(found.not_compared.most_common()),
        whole=Summary.of(found.whole, None, judged=False),
        versions=tuple(
            Summary.of(figures, version, judged=version in versions)
            for version, figures in found.versions.items()
        ),
        first_offence=None if found.first is None else found.first[1],
        drift=None
        if tokenizer is None
        else Drift(
            num_turns=found.num_turns,
            num_drifted=found.num_drifted,
            num_tokens_in_drifted=found.num_in_drifted,
        ),
    )


async def _by_session(path: Path) -> AsyncIterator[list[Row]]:
    """All rows of a session at a time, whatever their order; in memory are those of unfinished sessions."""
    sizes = await asyncio.to_thread(sessions_in, path)
    waiting: dict[str, list[Row]] = defaultdict(list)
    rows = read_rows(path)
    while (row := await asyncio.to_thread(next, rows, None)) is not None:
        session_id = str(row.get("session_id"))
        waiting[session_id].append(row)
        if len(waiting[session_id]) == sizes[session_id]:
            yield waiting.pop(session_id)


class _Check:
    """Scores samples side by side; `rest` waits for the last."""

    def __init__(
        self,
        engine: Scorer,
        found: _Found,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        on_sample: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._found = found
        self._tokenizer = tokenizer
        self._on_sample = on_sample
        self._running: set[asyncio.Task[None]] = set()

    async def session(self, rows: Sequence[Row], concurrency: int) -> None:
        """Check a session's rows, and begin to score those that can be scored."""
        problems = [*check_samples(rows), *self._unknown_ids(rows)]
        self._found.violated(problems)
        for number, row in enumerate(rows):
            index, self._found.num_samples = self._found.num_samples, self._found.num_samples + 1
            mine = f"sample {row.get('sample_id', f'#{number}')}: "
            if any(problem.startswith(mine) for problem in problems):  # what it says cannot be relied on
                self._found.not_compared["samples with a broken rule"] += _num_masked(row)
                self._on_sample()
                continue
            while len(self._running) >= concurrency:
                await self._one()
            self._running.add(asyncio.create_task(self._sample(index, row)))

    def _unknown_ids(self, rows: Sequence[Row]) -> Iterator[str]:
        """Ids that the model does not have: an engine that is sent one may die."""
        for row in rows:
            ids: object = row.get("token_ids")
            found = enumerate(cast("list[object]", ids)) if isinstance(ids, list) else ()
            wrong = next(((at, i) for at, i in found if isinstance(i, int) and i >= self._vocab_size), None)
            if wrong is not None:
                yield (
                    f"sample {row.get('sample_id')}: token {wrong[0]} is id {wrong[1]}, outside the model's "
                    f"vocabulary of {self._vocab_size} ids"
                )

    async def rest(self) -> None:
        """Wait until everything is scored."""
        while self._running:
            await self._one()

    async def _one(self) -> None:
        done, self._running = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        try:
            for task in done:
                task.result()
        except BaseException:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            raise

    async def _sample(self, index: int, row: Row) -> None:
        found = self._found
        found.num_trained += sum(row["loss_mask"])
        sampling: list[Json] = msgspec.json.decode(row["sampling"])
        at_temperature: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
        for turn, sampled in zip(row["turns"], sampling, strict=False):
            if not turn["trained"] or turn["start"] == turn["end"]:
                continue
            if self._tokenizer is not None:
                await asyncio.to_thread(self._drift, row, turn)
            if (why := _not_comparable(sampled)) is not None:
                found.not_compared[why] += turn["end"] - turn["start"]
            else:
                at_temperature[_temperature(sampled)].append(turn)
        for temperature, turns in at_temperature.items():
            await self._turns(index, row, temperature, turns)
        self._on_sample()

    async def _turns(
        self, index: int, row: Row, temperature: float, turns: Sequence[Mapping[str, Any]]
    ) -> None:
        start: int = turns[0]["start"]
        num_tokens = sum(turn["end"] - turn["start"] for turn in turns)
        try:
            scores = await self._engine.score(row["token_ids"], start, temperature)
        except ContextOverflow:
            self._found.not_compared["longer than the engine's context"] += num_tokens
            return
        if scores.temperature != temperature:
            self._found.not_compared[f"sampled at temperature {temperature:g}"] += num_tokens
            return
        version_at = versions_of(row)
        for turn in turns:
            for at in range(turn["start"], turn["end"]):
                self._token(index, row, turn, at, version_at[at] or "", scores.logprobs[at - start])

    def _token(
        self, index: int, row: Row, turn: Mapping[str, Any], at: int, version: str, score: float
    ) -> None:
        found, recorded = self._found, cast("float", row["logprobs"][at])
        found.whole.add(recorded, score)
        figures = found.versions.setdefault(version, Figures(found.tolerance))
        within = figures.add(recorded, score)
        if within or version not in found.judged or (found.first is not None and found.first[0] <= index):
            return
        offence = Offence(
            sample_id=row["sample_id"],
            turn_id=turn["turn_id"],
            token=at,
            token_id=row["token_ids"][at],
            version=version,
            recorded=recorded,
            recomputed=score,
            text=None if self._tokenizer is None else _in_context(self._tokenizer, row["token_ids"], at),
        )
        found.first = index, offence

    def _drift(self, row: Row, turn: Mapping[str, Any]) -> None:
        assert self._tokenizer is not None  # noqa: S101  # asked before
        ids = array("i", row["token_ids"][turn["start"] : turn["end"]])
        drifts = self._tokenizer.encode(self._tokenizer.decode(ids)) != ids
        self._found.num_turns += 1
        self._found.num_drifted += drifts
        self._found.num_in_drifted += len(ids) if drifts else 0


def _num_masked(row: Row) -> int:
    mask: object = row.get("loss_mask")
    return sum(m == 1 for m in cast("list[object]", mask)) if isinstance(mask, list) else 0


def _temperature(sampling: Json) -> float:
    """Of the recorded log-probabilities: greedy ones are not scaled."""
    temperature = sampling.get("temperature")
    return 1.0 if temperature is None or temperature < GREEDY_BELOW else float(temperature)


def _not_comparable(sampling: Json) -> str | None:
    """Why no prefill can say what the turn's distribution was; None where one can."""
    if sampling.get("json_schema") is not None or sampling.get("structural_tag") is not None:
        return "sampled under a constraint"
    if sampling.get("frequency_penalty") or sampling.get("presence_penalty"):
        return "sampled with penalties"
    if sampling.get("repetition_penalty") not in (None, 1, 1.0):
        return "sampled with penalties"
    return "sampled with logit_bias" if sampling.get("logit_bias") else None


def _in_context(tokenizer: Tokenizer, ids: Sequence[int], at: int) -> str:
    """A token's text between its neighbours'."""
    before = tokenizer.decode(array("i", ids[max(0, at - NEIGHBOURS) : at]))
    behind = tokenizer.decode(array("i", ids[at + 1 : at + 1 + NEIGHBOURS]))
    return f"{before}⟦{tokenizer.decode(array('i', [ids[at]]))}⟧{behind}"
