"""Reads a file session by session, checks it, and has an engine score what was trained."""

import asyncio
from array import array
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from tokentape.engines.sglang_score import Scores
from tokentape.errors import ConfigError, ContextOverflow
from tokentape.export.row import Row, read_rows, sessions_in, versions_of
from tokentape.tokenizer import Tokenizer
from tokentape.verify.figures import FAR, Figures
from tokentape.verify.report import Drift, Offence, Report, Summary
from tokentape.verify.rules import Broken, broken_rules
from tokentape.verify.turns import TurnSpan, plan, read_sampling

MAX_VIOLATIONS = 100
"""So many broken rules are told in words; all are counted."""
NEIGHBOURS = 8
"""Tokens before and behind one that is off that are shown with it."""


class Scorer(Protocol):
    """What is asked of an engine: `engines.sglang.SGLangEngine` has it."""

    async def score(self, ids: Sequence[int], start: int, temperature: float = 1.0) -> Scores:
        """Log-probabilities (nats) of `ids[start:]`, at the temperature that the answer names."""
        ...


@dataclass(slots=True)
class _Found:
    """What was found so far. `offences` are the first in the file of each kind, whatever comes first."""

    tolerance: float
    judged: frozenset[str]
    whole: Figures = field(init=False)
    unscaled: Figures = field(init=False)
    versions: dict[str, Figures] = field(default_factory=dict[str, Figures])
    not_compared: Counter[str] = field(default_factory=Counter[str])
    violations: list[str] = field(default_factory=list[str])
    violation_text: str | None = None
    num_violations: int = 0
    num_samples: int = 0
    num_trained: int = 0
    offences: dict[str, tuple[tuple[int, int], Offence]] = field(default_factory=dict)  # pyright: ignore[reportUnknownVariableType]
    num_turns: int = 0
    num_drifted: int = 0
    num_in_drifted: int = 0

    def __post_init__(self) -> None:
        self.whole, self.unscaled = Figures(self.tolerance), Figures(self.tolerance)

    def first_offence(self, max_share: float) -> Offence | None:
        """One that no tolerance excuses, where there is one; else the first."""
        kinds = ("far", "turn", "beyond") if max_share else ("beyond",)
        return next((self.offences[kind][1] for kind in kinds if kind in self.offences), None)


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
    sessions: Collection[str] | None = None,
    on_sample: Callable[[], None] = lambda: None,
) -> Report:
    """Check a Parquet file of samples against an engine.

    An id is below `vocab_size`. Tokens of the versions `judged` (none given: of `engine_version`) must be
    within `tolerance` nats of what the engine recomputes, but for `max_share` of them; ten times the
    tolerance none may exceed. Those of other versions are compared all the same. `concurrency` samples are
    scored at a time; `on_sample` is called for each that is done. With `sessions` only theirs are looked at.

    Raises:
        ConfigError: it is no file of samples, or the engine's weights changed meanwhile.
        EngineError: the engine failed.
    """
    versions = frozenset(judged) or frozenset({engine_version or ""})
    found = _Found(tolerance, versions)
    check = _Check(engine, engine_version, found, tokenizer, vocab_size, on_sample)
    async for rows in _by_session(path, sessions):
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
        violation_text=found.violation_text,
        not_compared=dict(found.not_compared.most_common()),
        whole=Summary.of(found.whole, None, judged=False),
        versions=tuple(
            Summary.of(figures, version, judged=version in versions)
            for version, figures in sorted(found.versions.items())
        ),
        unscaled=Summary.of(found.unscaled, None, judged=False) if found.unscaled.num_tokens else None,
        first_offence=found.first_offence(max_share),
        drift=None
        if tokenizer is None
        else Drift(
            num_turns=found.num_turns,
            num_drifted=found.num_drifted,
            num_tokens_in_drifted=found.num_in_drifted,
        ),
    )


async def _by_session(path: Path, only: Collection[str] | None) -> AsyncIterator[list[Row]]:
    """All rows of a session at a time, whatever their order; in memory are those of unfinished sessions."""
    sizes = await asyncio.to_thread(sessions_in, path)
    waiting: dict[str, list[Row]] = defaultdict(list)
    rows = read_rows(path)
    while (row := await asyncio.to_thread(next, rows, None)) is not None:
        session_id = str(row.get("session_id"))
        if only is not None and session_id not in only:
            continue
        waiting[session_id].append(row)
        if len(waiting[session_id]) == sizes[session_id]:
            yield waiting.pop(session_id)


class _Check:
    """Scores samples side by side; `rest` waits for the last."""

    def __init__(
        self,
        engine: Scorer,
        engine_version: str | None,
        found: _Found,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        on_sample: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._engine_version = engine_version
        self._vocab_size = vocab_size
        self._found = found
        self._tokenizer = tokenizer
        self._on_sample = on_sample
        self._running: set[asyncio.Task[None]] = set()

    async def session(self, rows: Sequence[Row], concurrency: int) -> None:
        """Check a session's rows, and begin to score those that can be scored."""
        broken = broken_rules(rows, self._vocab_size)
        self._tell(rows, broken)
        unsound = {one.index for one in broken}
        found = self._found
        for number, row in enumerate(rows):
            index, found.num_samples = found.num_samples, found.num_samples + 1
            found.num_trained += _num_masked(row)
            if number in unsound:  # what it says cannot be relied on
                found.not_compared["samples with a broken rule"] += _num_masked(row)
                self._on_sample()
                continue
            while len(self._running) >= concurrency:
                await self._one()
            self._running.add(asyncio.create_task(self._sample(index, row)))

    def _tell(self, rows: Sequence[Row], broken: Sequence[Broken]) -> None:
        found = self._found
        if not found.num_violations and broken:
            first = broken[0]
            if first.index is not None and first.at is not None:
                found.violation_text = self._in_context(rows[first.index], first.at)
        found.num_violations += len(broken)
        found.violations += [one.words for one in broken[: MAX_VIOLATIONS - len(found.violations)]]

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
            # Those of `done` as well: what fails beside the first would be told as never retrieved.
            await asyncio.gather(*done, *self._running, return_exceptions=True)
            raise

    async def _sample(self, index: int, row: Row) -> None:
        sampling = read_sampling(row)
        assert not isinstance(sampling, str)  # noqa: S101  # rules have looked at it
        todo = plan(row, sampling)
        self._found.not_compared.update(todo.not_compared)
        if self._tokenizer is not None:
            await asyncio.to_thread(self._drift, self._tokenizer, row)
        for temperature, turns in todo.to_score.items():
            await self._turns(index, row, temperature, turns)
        self._on_sample()

    async def _turns(self, index: int, row: Row, temperature: float, turns: Sequence[TurnSpan]) -> None:
        start, end = turns[0]["start"], turns[-1]["end"]
        scores = await self._score(row["token_ids"], start, end, temperature)
        end = start if scores is None else start + len(scores.logprobs)
        if missing := sum(turn["end"] - max(min(end, turn["end"]), turn["start"]) for turn in turns):
            self._found.not_compared["beyond the engine's context"] += missing
        if scores is None:
            return
        if self._engine_version is not None and scores.weight_version not in (None, self._engine_version):
            raise ConfigError(
                f"the engine's weights changed from {self._engine_version!r} to {scores.weight_version!r} "
                "while it scored: verify while nothing updates them"
            )
        if scores.temperature != temperature:
            num_tokens = sum(min(end, turn["end"]) - min(end, turn["start"]) for turn in turns)
            self._found.not_compared[f"sampled at temperature {temperature:g}"] += num_tokens
            self._unscaled(row, turns, scores.logprobs, start, temperature)
            return
        for turn in turns:
            self._turn(index, row, turn, start, scores.logprobs)

    async def _score(self, ids: Sequence[int], start: int, end: int, temperature: float) -> Scores | None:
        """Scores of `ids[start:end]`, or of as many as the engine takes; None where it takes none of them.

        A tape that fills the context was sampled by an engine that cannot be sent the whole of it: SGLang
        wants room for one token more.
        """
        try:
            return await self._engine.score(ids[:end], start, temperature)
        except ContextOverflow as error:
            most = (error.context_length or 0) - 1
            if not start < most < end:
                return None
            return await self._engine.score(ids[:most], start, temperature)

    def _turn(self, index: int, row: Row, turn: TurnSpan, start: int, logprobs: Sequence[float]) -> None:
        """Compare a turn's tokens; `logprobs` are of the tokens from `start` on."""
        found, version_at = self._found, versions_of(row)
        differences: dict[str, dict[int, float]] = defaultdict(dict)
        for at in range(turn["start"], min(turn["end"], start + len(logprobs))):
            recorded, recomputed = cast("float", row["logprobs"][at]), logprobs[at - start]
            version = version_at[at] or ""
            found.whole.add(recorded, recomputed)
            figures = found.versions.setdefault(version, Figures(found.tolerance))
            difference = differences[version][at] = figures.add(recorded, recomputed)
            if difference > found.tolerance:
                self._offends("beyond", index, row, turn, at, version, recomputed)
            if difference > FAR * found.tolerance:
                self._offends("far", index, row, turn, at, version, recomputed)
        for version, by_token in differences.items():
            if found.versions[version].add_turn([*by_token.values()]):
                at = max(by_token, key=by_token.__getitem__)
                self._offends("turn", index, row, turn, at, version, logprobs[at - start])

    def _offends(
        self, kind: str, index: int, row: Row, turn: TurnSpan, at: int, version: str, recomputed: float
    ) -> None:
        found = self._found
        if version not in found.judged:
            return
        if kind in found.offences and found.offences[kind][0] <= (index, at):
            return
        offence = Offence(
            sample_id=row["sample_id"],
            turn_id=turn["turn_id"],
            token=at,
            token_id=row["token_ids"][at],
            version=version,
            recorded=row["logprobs"][at],
            recomputed=recomputed,
            text=self._in_context(row, at),
        )
        found.offences[kind] = (index, at), offence

    def _unscaled(
        self, row: Row, turns: Sequence[TurnSpan], logprobs: Sequence[float], start: int, temperature: float
    ) -> None:
        """Note tokens whose recorded value must differ clearly from one at temperature 1.

        Likely tokens have log-probabilities near 0 at any temperature, and near 1 temperatures are alike.
        """
        if 0.8 < temperature < 1.25:
            return
        version_at = versions_of(row)
        for turn in turns:
            for at in range(turn["start"], min(turn["end"], start + len(logprobs))):
                if version_at[at] in self._found.judged and logprobs[at - start] < -0.5:
                    self._found.unscaled.add(row["logprobs"][at], logprobs[at - start])

    def _drift(self, tokenizer: Tokenizer, row: Row) -> None:
        """Whether a sample's trained turns would survive decoding and encoding."""
        for turn in row["turns"]:
            if not turn["trained"] or turn["start"] == turn["end"]:
                continue
            ids = array("i", row["token_ids"][turn["start"] : turn["end"]])
            drifts = tokenizer.encode(tokenizer.decode(ids)) != ids
            self._found.num_turns += 1
            self._found.num_drifted += drifts
            self._found.num_in_drifted += len(ids) if drifts else 0

    def _in_context(self, row: Row, at: int) -> str | None:
        """A token's text between its neighbours'; None where there is no tokenizer or no such text."""
        ids = row["token_ids"]
        if self._tokenizer is None or not 0 <= at < len(ids):
            return None
        parts = ids[max(0, at - NEIGHBOURS) : at], ids[at : at + 1], ids[at + 1 : at + 1 + NEIGHBOURS]
        known = [[i for i in part if 0 <= i < self._vocab_size] for part in parts]
        before, itself, behind = (self._tokenizer.decode(array("i", part)) for part in known)
        return f"{before}⟦{itself}⟧{behind}"


def _num_masked(row: Row) -> int:
    mask: object = row.get("loss_mask")
    return sum(m == 1 for m in cast("list[object]", mask)) if isinstance(mask, list) else 0
