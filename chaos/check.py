"""Whether an export holds what was sampled and acknowledged, and nothing else.

`check` compares the rows of `tokentape export` with what the workers sampled and the agents were told
(`truth.py`). It knows nothing of sessions, trees or stores.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truth import Account, Acknowledged, Episode, Generation

from tokentape.invariants import check_samples

Row = Mapping[str, Any]
Tokens = list[tuple[int, float, str]]  # sampled id, log-probability as float32, version


@dataclass(frozen=True, slots=True)
class Exported:
    """A turn as it was exported: its sampled tokens where it is trained, its prompt, its parent."""

    session_id: str
    turn_id: str
    parent_id: str | None
    prompt_ids: list[int]
    tokens: Tokens


def check(rows: Sequence[Row], generations: Sequence[Generation], account: Account) -> list[str]:
    """Every violation, in words; empty where all holds."""
    problems = check_samples(rows)
    if problems:  # what is malformed cannot be compared
        return problems
    exported = list(_exported(rows))
    problems += _engines(exported, generations)
    problems += _agents(exported, account)
    problems += _sessions(rows, account)
    problems += _kills(account)
    return problems


def _exported(rows: Sequence[Row]) -> Iterator[Exported]:
    """The turns, each from the row in which it is trained: `check_samples` has seen that there is one."""
    for row in rows:
        versions = [""] * len(row["token_ids"])
        for span in row["weight_versions"]:
            versions[span["start"] : span["end"]] = [span["version"]] * (span["end"] - span["start"])
        tokens = list(zip(row["token_ids"], row["logprobs"], versions, strict=True))
        parent_id = None
        for turn in row["turns"]:
            start, end = turn["start"], turn["end"]
            if turn["trained"]:
                yield Exported(
                    row["session_id"], turn["turn_id"], parent_id, row["token_ids"][:start], tokens[start:end]
                )
            parent_id = turn["turn_id"]


# -- what the workers sampled


def _engines(exported: Sequence[Exported], generations: Sequence[Generation]) -> Iterator[str]:
    """Each turn is a generation, or parts of several, each begun behind what was kept of those before."""
    by_turn: dict[str, list[Generation]] = defaultdict(list)
    for generation in generations:
        by_turn[generation.turn_id].append(generation)
    for turn in exported:
        parts = by_turn[turn.turn_id]
        if not any(part.prompt_ids == turn.prompt_ids for part in parts):
            yield f"turn {turn.turn_id}: no worker was ever sent its prompt"
        elif not _is_sampled(turn.tokens, turn.prompt_ids, parts):
            what = f"its tokens are not what the workers sampled: {_differences(turn, parts)}"
            yield f"turn {turn.turn_id}: {what}"


def _is_sampled(tokens: Tokens, prompt_ids: list[int], parts: Sequence[Generation]) -> bool:
    """Whether one part begins at this prompt and goes to the end, or others go on behind what it has."""
    for part in parts:
        if part.prompt_ids != prompt_ids:
            continue
        sampled = _tokens(part)[: part.num_sound]
        if sampled == tokens and part.num_sound == len(part.ids):
            return True
        rest = [other for other in parts if other is not part]
        for end in range(_num_common(sampled, tokens), 0, -1):
            behind = [*prompt_ids, *part.ids[:end]]
            if end < len(tokens) and _is_sampled(tokens[end:], behind, rest):
                return True
    return False


def _tokens(part: Generation) -> Tokens:
    logprobs = array("f", part.logprobs)
    return [(i, logprob, part.version) for i, logprob in zip(part.ids, logprobs, strict=True)]


def _num_common(one: Tokens, other: Tokens) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _differences(turn: Exported, parts: Sequence[Generation]) -> str:
    """How far each part agrees, for whoever looks for the cause."""
    found = [
        f"{part.rid} ({part.mode}, {part.num_sound} of {len(part.ids)} sound) agrees in "
        f"{_num_common(_tokens(part), turn.tokens)} of {len(turn.tokens)}"
        for part in parts
        if part.prompt_ids == turn.prompt_ids
    ]
    return "; ".join(found)


# -- what the agents were told


def _agents(exported: Sequence[Exported], account: Account) -> Iterator[str]:
    """Each acknowledged turn is there as it was told; a turn that nobody was told is no linear agent's."""
    by_id = {turn.turn_id: turn for turn in exported}
    told = {one.turn_id: one for one in account.acknowledged}
    for one in account.acknowledged:
        turn = by_id.get(one.turn_id)
        if turn is None:
            yield f"turn {one.turn_id} was acknowledged and is not exported"
            continue
        yield from _as_told(turn, one)
    yield from _repeated(account)
    linear = {episode.session_id for episode in account.episodes if episode.is_linear}
    for turn in exported:
        if turn.turn_id not in told and turn.session_id in linear:
            yield f"turn {turn.turn_id} is trained, and its agent was never told of it"


def _as_told(turn: Exported, one: Acknowledged) -> Iterator[str]:
    sampled = [(i, logprob) for i, logprob, _ in turn.tokens]
    if sampled != list(zip(one.completion_ids, array("f", one.logprobs), strict=True)):
        yield f"turn {one.turn_id}: other tokens are exported than were acknowledged"
    if turn.prompt_ids != one.prompt_ids:
        yield f"turn {one.turn_id}: another prompt is exported than was acknowledged"
    if (turn.session_id, turn.parent_id) != (one.session_id, one.parent_turn_id):
        yield f"turn {one.turn_id}: it has another session or parent than was acknowledged"


def _repeated(account: Account) -> Iterator[str]:
    """An agent that never asks the same twice never gets the same turn for two requests."""
    linear = {episode.session_id for episode in account.episodes if episode.is_linear}
    num_told = Counter(one.turn_id for one in account.acknowledged if one.session_id in linear)
    for turn_id, num in num_told.items():
        if num > 1:
            yield f"turn {turn_id} answered {num} requests"


def _sessions(rows: Sequence[Row], account: Account) -> Iterator[str]:
    """Every session was finished, and nothing is exported of others."""
    yield from (f"stuck: {problem}" for problem in account.stuck)
    known = {episode.session_id for episode in account.episodes}
    for episode in account.episodes:
        if episode.summary is None or episode.summary["state"] != "finished":
            yield f"session {episode.session_id} was not finished"
    for session_id in {row["session_id"] for row in rows} - known:
        yield f"session {session_id} is exported, and nobody made it"
    yield from _rewards(rows, {episode.session_id: episode for episode in account.episodes})


def _rewards(rows: Sequence[Row], episodes: Mapping[str, Episode]) -> Iterator[str]:
    for row in rows:
        episode = episodes.get(row["session_id"])
        if episode is None or episode.summary is None:
            continue
        if row["reward"] != episode.summary["reward"]:
            what = f"{row['reward']} is exported, {episode.summary['reward']} was acknowledged"
            yield f"session {row['session_id']}: reward {what}"


def _kills(account: Account) -> Iterator[str]:
    """Between two ends of a gateway an agent loses the connection of one request, not of a second."""
    times = sorted(account.kills)
    lost: dict[tuple[str, int], set[int]] = defaultdict(set)
    for retry in account.retries:
        if retry.why == "connection":
            num_kills = sum(at <= retry.at for at in times)
            lost[retry.agent, num_kills].add(retry.request)
    for (agent, num_kills), requests in lost.items():
        if not num_kills:
            yield f"{agent}: a connection was lost before any gateway was killed"
        elif len(requests) > 1:
            yield f"{agent}: {len(requests)} requests were lost after gateway end {num_kills}"
