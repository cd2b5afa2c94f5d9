"""Answers the page's questions about sessions; knows no HTTP."""

import asyncio
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass

import msgspec

from tokentape.errors import NotFound, RequestError
from tokentape.tokenizer import Tokenizer
from tokentape.types import Json
from tokentape.viewer.drift import drifts
from tokentape.viewer.episode import Branch, Episode
from tokentape.viewer.glyphs import Glyphs
from tokentape.viewer.scores import Scorer, recomputed
from tokentape.viewer.source import Source
from tokentape.viewer.strip import MAX_HITS, find_id, find_text, first_difference, lines, piece

WireOf = Callable[[str], Json | None]
MAX_PIECE = 8192
MAX_METADATA = 2000  # bytes of JSON in a row; a page asks for 500 rows again and again
_FINAL_S = 5.0  # a finished session can only be deleted: what was asked a moment ago is not asked again
_KEPT = 4  # episodes; a page asks for one at a time


@dataclass(slots=True)
class _Known:
    """An episode; its session was last seen to have this version at `asked_at`, in seconds."""

    version: str
    episode: Episode
    asked_at: float

    @property
    def still_holds(self) -> bool:
        """Whether nobody need be asked: to know a version, a whole session may have to be read."""
        is_final = self.episode.summary["state"] in ("finished", "exported")
        return is_final and time.monotonic() - self.asked_at < _FINAL_S


class Desk:
    """A source, and what helps to look at it.

    `tokenizer` gives tokens their text, `scorer` recomputes log-probabilities, `wire_of` finds the request
    and the reply of a turn; each may be None, and the page says so.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer | None = None,
        scorer: Scorer | None = None,
        wire_of: WireOf | None = None,
    ) -> None:
        self._source = source
        self._glyphs = Glyphs(tokenizer)
        self._tokenizer = tokenizer
        self._scorer = scorer
        self._wire_of = wire_of
        self._episodes: OrderedDict[str, _Known] = OrderedDict()
        self._lock = asyncio.Lock()

    def info(self) -> Json:
        """What there is to look at."""
        return {
            "kind": self._source.kind,
            "name": self._source.name,
            "has_texts": self._tokenizer is not None,
            "has_engine": self._scorer is not None,
            "has_wire": self._wire_of is not None,
        }

    async def sessions(self, after: str, limit: int) -> Json:
        """A page of the table; where there is much metadata it is cut, and `metadata_cut` says so."""
        page = await self._source.page(after=after, limit=limit)
        rows = await asyncio.to_thread(lambda: [_listed(row) for row in page.sessions])
        return {"sessions": rows, "has_more": page.has_more}

    async def version(self, session_id: str) -> str:
        """The session's version, which changes with it; what is known of another one is forgotten."""
        try:
            version = await self._source.version(session_id)
        except NotFound:
            self._episodes.pop(session_id, None)
            raise
        known = self._episodes.get(session_id)
        if known is not None and known.version == version:
            known.asked_at = time.monotonic()
        else:
            self._episodes.pop(session_id, None)
        return version

    async def summary(self, session_id: str) -> Json:
        """A row of the table."""
        return await self._source.summary(session_id)

    async def session(self, session_id: str) -> Json:
        """A session as a tree."""
        episode = await self._episode(session_id)
        return {
            "summary": episode.summary,
            "turns": [turn.row for turn in episode.turns.values()],
            "branches": [branch.row for branch in episode.branches.values()],
        }

    async def branch(self, session_id: str, turn_id: str) -> Json:
        """A branch without its tokens: turns with their messages, spans."""
        episode, branch = await self._branch(session_id, turn_id)
        return await asyncio.to_thread(self._head, episode, branch)

    async def lines(self, session_id: str, turn_id: str, columns: int) -> Json:
        """Where the lines of a branch begin."""
        _, branch = await self._branch(session_id, turn_id)
        starts = await asyncio.to_thread(lines, branch, self._glyphs, columns)
        return {"starts": starts.tolist(), "num_tokens": len(branch.token_ids)}

    async def tokens(self, session_id: str, turn_id: str, start: int, end: int) -> Json:
        """Some tokens of a branch."""
        if not 0 <= start <= end <= start + MAX_PIECE:
            raise RequestError(f"`start` and `end` must name at most {MAX_PIECE} tokens", param="end")
        _, branch = await self._branch(session_id, turn_id)
        return await asyncio.to_thread(piece, branch, self._glyphs, start, end)

    async def search(self, session_id: str, turn_id: str, text: str) -> Json:
        """Where a text stands in a branch, or a token: `#123` is an id."""
        _, branch = await self._branch(session_id, turn_id)
        by_id = text[1:].isdecimal() and text.startswith("#")
        if self._tokenizer is None and not by_id:
            raise RequestError("no tokenizer here: search for an id, as #123", param="q")
        found = await asyncio.to_thread(
            lambda: find_id(branch, int(text[1:])) if by_id else find_text(branch, self._glyphs, text)
        )
        return {"hits": found[:MAX_HITS], "num_hits": len(found)}

    async def drift(self, session_id: str, turn_id: str) -> Json:
        """Where re-encoding a branch would give other ids."""
        if self._tokenizer is None:
            raise RequestError("no tokenizer here: give --model")
        tokenizer, (_, branch) = self._tokenizer, await self._branch(session_id, turn_id)
        return {"drifts": await asyncio.to_thread(drifts, branch, tokenizer, self._glyphs)}

    async def scores(self, session_id: str, turn_id: str) -> Json:
        """A branch's log-probabilities as the engine computes them now."""
        if self._scorer is None:
            raise RequestError("no engine here: `tokentape view … --engine URL` recomputes log-probabilities")
        return await recomputed(self._scorer, *await self._branch(session_id, turn_id))

    async def difference(self, session_id: str, turn_id: str, other_id: str) -> Json:
        """The first token in which two branches differ, None where they do not."""
        episode = await self._episode(session_id)
        a, b = episode.branch(turn_id), episode.branch(other_id)
        at = await asyncio.to_thread(first_difference, a.token_ids, b.token_ids)
        return {"at": at, "a": a.branch_id, "b": b.branch_id}

    async def wire(self, session_id: str, turn_id: str) -> Json:
        """A turn's request and reply as they were on the wire; `kept` is False where nobody has them."""
        episode = await self._episode(session_id)
        if turn_id not in episode.turns:
            raise NotFound(f"turn {turn_id!r} is not in session {session_id!r}")
        found = self._wire_of(turn_id) if self._wire_of is not None else None
        return {"kept": found is not None, **(found or {})}

    async def _branch(self, session_id: str, turn_id: str) -> tuple[Episode, Branch]:
        episode = await self._episode(session_id)
        return episode, episode.branch(turn_id)

    async def _episode(self, session_id: str) -> Episode:
        known = self._episodes.get(session_id)
        if known is None or not known.still_holds:
            version = await self.version(session_id)
            async with self._lock:
                known = self._episodes.get(session_id)
                if known is None or known.version != version:
                    episode = await self._source.episode(session_id)
                    known = self._episodes[session_id] = _Known(version, episode, time.monotonic())
                    while len(self._episodes) > _KEPT:
                        self._episodes.popitem(last=False)
        if session_id in self._episodes:
            self._episodes.move_to_end(session_id)
        return known.episode

    def _head(self, episode: Episode, branch: Branch) -> Json:
        turns: list[Json] = []
        for one in branch.stretches:
            turn = episode.turns[one.turn_id]
            shown = {name: getattr(turn, name) for name in turn.__struct_fields__}
            ids = branch.token_ids[one.start : one.end]
            shown["attempts"] = None if turn.attempts is None else self._placed(turn.attempts, ids, one.start)
            turns.append({**shown, **asdict(one)})
        versions = [[span.version, span.start, span.end] for span in branch.versions]
        return {**branch.row, "turns": turns, "version_spans": versions}

    def _placed(self, attempts: list[Json], ids: "array[int]", start: int) -> list[Json]:
        """Attempts with the tokens that they touch; their own spans are characters."""
        if self._tokenizer is None or not attempts:
            return attempts
        ends, text = self._glyphs.ends(ids)
        spoken = self._tokenizer.decode([i for i in ids if self._glyphs.bytes_of(i)])
        lost = len(text) - len(spoken) if text.endswith(spoken) else 0  # some drop a text's first space
        return [
            {
                **attempt,
                "tokens": [
                    start + bisect_right(ends, attempt["start"] + lost),
                    start + min(bisect_left(ends, attempt["end"] + lost) + 1, len(ids)),
                ],
            }
            for attempt in attempts
        ]


def _listed(row: Json) -> Json:
    """A row of the table: its metadata whole, or no value of it longer than its share."""
    metadata: Json = row["metadata"]
    if len(msgspec.json.encode(metadata)) <= MAX_METADATA:
        return row
    left, share = MAX_METADATA, max(MAX_METADATA // len(metadata), 16)
    short: Json = {}
    for key, value in metadata.items():
        if left <= 0:
            break
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        short[key[:MAX_METADATA]] = value if len(text) <= share else f"{text[:share]}…"
        left -= len(key) + min(len(text), share)
    return {**row, "metadata": short, "metadata_cut": True}
