"""A session as the viewer shows it: turns, branches, and each branch's tokens.

It is made of recorded turns, which know everything, or of samples, which know what a trainer needs: there a
turn has no attempts (None), and no version or log-probability where it is not trained.
"""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tokentape.errors import NotFound
from tokentape.export.row import Row, metadata_of, turns_of
from tokentape.export.samples import chat_message
from tokentape.store import SessionRecord
from tokentape.tape import BranchReason, Label, Tape, Turn, lay_out
from tokentape.tree import Tree
from tokentape.types import Json, Sampling, VersionSpan

NAN = float("nan")
_PREVIEW = 120  # characters
# Why a turn that has a parent may start a branch; every other reason is a turn's that has none.
_OF_A_FORK = frozenset(
    (
        BranchReason.EDITED_HISTORY.value,
        BranchReason.RESAMPLED.value,
        BranchReason.CHOICE.value,
        BranchReason.FORKED.value,
    )
)


class TurnView(msgspec.Struct, frozen=True, kw_only=True):
    """One turn. `given` are the new messages, `reply` what was sampled, both in OpenAI's shape.

    `attempts` are tool-call attempts with their status and span in characters of the completion's text, None
    where nobody kept them. `notes` are what happened to the request (see `docs/tapes.md`).
    """

    turn_id: str
    parent_id: str | None
    reason: str | None
    label: str
    label_by: str
    num_given: int
    num_sampled: int
    finish_reason: str
    parse_status: str
    versions: list[str]
    logprob_basis: str
    reward: float | None
    given: list[Json]
    reply: Json
    sampling: Json
    attempts: list[Json] | None = None
    notes: Json = {}
    wire: str | None = None
    created_at: float | None = None
    num_cached: int | None = None

    @property
    def row(self) -> Json:
        """The turn in the tree: all that is short, and how its reply begins."""
        long = ("given", "reply", "sampling", "attempts", "notes")
        short = {name: getattr(self, name) for name in self.__struct_fields__ if name not in long}
        return {**short, "preview": _preview(self.reply)}


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a turn added to a branch: `begin:start` it was given, `start:end` it sampled."""

    turn_id: str
    begin: int
    start: int
    end: int
    trained: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch of N tokens. `token_ids` int32[N]; `logprobs` float32[N] nats, NaN where none is known.

    `versions` are spans over the sampled tokens of which it is known.
    """

    branch_id: str
    reason: str
    label: str
    label_by: str
    reward: float | None
    truncated: bool
    token_ids: "array[int]"
    logprobs: "array[float]"
    versions: tuple[VersionSpan, ...]
    stretches: tuple[Stretch, ...]

    @property
    def num_trained(self) -> int:
        """Tokens that this branch trains."""
        return sum(one.end - one.start for one in self.stretches if one.trained)

    @property
    def row(self) -> Json:
        """The branch in the tree."""
        names = ("branch_id", "reason", "label", "label_by", "reward", "truncated")
        counts = {"num_tokens": len(self.token_ids), "num_trained": self.num_trained}
        return {**{name: getattr(self, name) for name in names}, **counts, "num_turns": len(self.stretches)}


@dataclass(frozen=True, slots=True)
class Episode:
    """A session: turns by id, in the order of their commits, and branches by the id of their last turn."""

    summary: Json
    turns: Mapping[str, TurnView]
    branches: Mapping[str, Branch]

    def branch(self, turn_id: str) -> Branch:
        """The branch that ends with a turn; else the longest that goes through it.

        Raises:
            NotFound: there is no such turn.
        """
        if turn_id in self.branches:
            return self.branches[turn_id]
        through = [
            branch
            for branch in self.branches.values()
            if any(one.turn_id == turn_id for one in branch.stretches)
        ]
        if not through:
            raise NotFound(f"turn {turn_id!r} is not in this session")
        return max(through, key=lambda branch: len(branch.token_ids))


def summary_of(record: SessionRecord, tree: Tree, failures: Mapping[str, int]) -> Json:
    """A session's row in the table."""
    labels = tree.labels()
    versions: Counter[str] = Counter()
    for turn in tree.turns():
        for span in turn.versions:
            versions[span.version] += span.end - span.start
    return {
        **row_of(record),
        "turns": len(tree),
        "branches": len(tree.ends(labels)),
        "reasons": dict(Counter(t.branch_reason for t in tree.turns() if t.branch_reason)),
        "labels": dict(Counter(label.name for label in labels.values())),
        "tokens": sum(len(t.prompt) + len(t.completion) for t in tree.turns()),
        "sampled": sum(len(t.completion) for t in tree.turns()),
        "versions": dict(versions),
        "failures": dict(failures),
    }


def row_of(record: SessionRecord) -> Json:
    """What is known of a session without its turns."""
    names = ("session_id", "state", "created_at", "reward", "group_id", "metadata")
    return {name: getattr(record, name) for name in names}


def of_tree(record: SessionRecord, tree: Tree, failures: Mapping[str, int]) -> Episode:
    """A recorded session."""
    labels = tree.labels()
    turns = {turn.turn_id: _turn(turn, labels[turn.turn_id], record) for turn in tree.turns()}
    branches = {tape.turns[-1].turn.turn_id: _branch(record, tape, labels) for tape in tree.tapes()}
    return Episode(summary_of(record, tree, failures), turns, branches)


def _turn(turn: Turn, label: Label, record: SessionRecord) -> TurnView:
    notes = {
        "superseded": msgspec.to_builtins(turn.superseded),
        "ignored": list(turn.origin.ignored),
        "neutralised": list(turn.neutralised),
    }
    return TurnView(
        turn_id=turn.turn_id,
        parent_id=turn.parent_id,
        reason=turn.branch_reason,
        label=label.name,
        label_by=label.by,
        num_given=len(turn.prompt),
        num_sampled=len(turn.completion),
        finish_reason=turn.finish_reason,
        parse_status=turn.parse_status,
        versions=list(dict.fromkeys(span.version for span in turn.versions)),
        logprob_basis=turn.logprob_basis,
        reward=record.turn_rewards.get(turn.turn_id),
        given=[chat_message(message) for message in turn.messages],
        reply=chat_message(turn.reply),
        sampling=msgspec.to_builtins(turn.sampling),
        attempts=list(turn.attempts),
        notes={name: note for name, note in notes.items() if note},
        wire=turn.origin.wire,
        created_at=turn.created_at,
        num_cached=turn.num_cached_tokens,
    )


def _branch(record: SessionRecord, tape: Tape, labels: Mapping[str, Label]) -> Branch:
    path = [span.turn for span in tape.turns]
    whole = lay_out(
        path, {turn.turn_id for turn in path}, labels
    )  # log-probabilities of all that was sampled
    logprobs = array("f", [NAN]) * len(tape)
    for span in tape.turns:
        logprobs[span.start : span.end] = whole.logprobs[span.start : span.end]
    starts = [(span.turn.turn_id, span.start, span.end, span.trained) for span in tape.turns]
    return Branch(
        branch_id=path[-1].turn_id,
        reason=tape.branch_reason,
        label=tape.label.name,
        label_by=tape.label.by,
        reward=record.branch_rewards.get(path[-1].turn_id, record.reward),
        truncated=path[-1].finish_reason == "length",
        token_ids=tape.token_ids,
        logprobs=logprobs,
        versions=whole.versions,
        stretches=_stretches(starts),
    )


def _stretches(spans: Sequence[tuple[str, int, int, bool]]) -> tuple[Stretch, ...]:
    out: list[Stretch] = []
    for turn_id, start, end, trained in spans:
        out.append(Stretch(turn_id, out[-1].end if out else 0, start, end, trained))
    return tuple(out)


# -- of samples


def summary_of_rows(rows: Sequence[Row]) -> Json:
    """The same of a session's samples, which need not have their tokens."""
    first = rows[0]
    turns = {turn["turn_id"]: turn for row in rows for turn in row["turns"]}
    parents = _parents(rows)
    given: dict[str, int] = {}
    for row in rows:
        end = 0
        for turn in row["turns"]:
            given[turn["turn_id"]], end = turn["start"] - end, turn["end"]
    sampled = sum(turn["end"] - turn["start"] for turn in turns.values())
    versions: Counter[str] = Counter()
    for row in rows:
        for span in row["weight_versions"]:
            versions[span["version"]] += span["end"] - span["start"]
    metadata = metadata_of(first)
    metadata.pop("tokentape", None)
    return {
        "session_id": first["session_id"],
        "state": "exported",
        "created_at": None,
        "reward": _common_reward(rows),
        "group_id": first.get("group_id"),
        "metadata": metadata,
        "turns": len(parents),
        "branches": len(rows),
        "reasons": dict(Counter(_reasons(rows, parents).values())),
        "labels": dict(Counter(turn["label"] for turn in turns.values() if turn["label"] is not None)),
        "tokens": sum(given.values()) + sampled,
        "sampled": sampled,
        "versions": dict(versions),
        "failures": {},
    }


def of_rows(rows: Sequence[Row]) -> Episode:
    """A session of which samples are known."""
    parents, turns = _parents(rows), dict[str, TurnView]()
    reasons = _reasons(rows, parents)
    for row in rows:
        said = turns_of(row)
        sampling: list[Json] = [msgspec.to_builtins(one) for one in _samplings(row)]
        notes = metadata_of(row).get("tokentape", {})
        end = 0
        for index, turn in enumerate(row["turns"]):
            turn_id, begin, end = turn["turn_id"], end, turn["end"]
            if turn_id in turns and not turn["trained"]:  # seen, and better known there
                continue
            turns[turn_id] = TurnView(
                turn_id=turn_id,
                parent_id=parents[turn_id],
                reason=reasons.get(turn_id),
                label=turn["label"] or "",  # an older file does not know
                label_by=row["label_by"] or "",
                num_given=turn["start"] - begin,
                num_sampled=turn["end"] - turn["start"],
                finish_reason=turn["finish_reason"],
                parse_status=turn["parse_status"],
                versions=_versions_in(row, turn["start"], turn["end"]),
                logprob_basis=turn["logprob_basis"] or "",
                reward=turn["reward"],
                given=said[index][0],
                reply=said[index][1],
                sampling=sampling[index] if index < len(sampling) else {},
                notes={name: note[turn_id] for name, note in notes.items() if turn_id in note},
            )
    branches = {row["sample_id"]: _row_branch(row) for row in rows}
    return Episode(summary_of_rows(rows), turns, branches)


def _row_branch(row: Row) -> Branch:
    spans = [(turn["turn_id"], turn["start"], turn["end"], turn["trained"]) for turn in row["turns"]]
    return Branch(
        branch_id=row["sample_id"],
        reason=row["branch_reason"],
        label=row["label"] or "",
        label_by=row["label_by"] or "",
        reward=row["reward"],
        truncated=row["truncated"],
        token_ids=array("i", row["token_ids"]),
        logprobs=array("f", [NAN if logprob is None else logprob for logprob in row["logprobs"]]),
        versions=tuple(VersionSpan(v["version"], v["start"], v["end"]) for v in row["weight_versions"]),
        stretches=_stretches(spans),
    )


def _parents(rows: Sequence[Row]) -> dict[str, str | None]:
    """Each turn's parent: what stands before it in a sample."""
    parents: dict[str, str | None] = {}
    for row in rows:
        before: str | None = None
        for turn in row["turns"]:
            parents.setdefault(turn["turn_id"], before)
            before = turn["turn_id"]
    return parents


def _reasons(rows: Sequence[Row], parents: Mapping[str, str | None]) -> dict[str, str]:
    """Why turns started branches, as far as samples tell: each says the reason of its last turn that has one.

    Only turns without a parent and forks have one, and of the turns that go on from one the first has none.
    Which that was is not in a file: where reasons do not tell, it is taken for the first that stands here.
    """
    following: dict[str, list[str]] = {}
    for turn_id, parent_id in parents.items():
        if parent_id is not None:
            following.setdefault(parent_id, []).append(turn_id)
    reasons: dict[str, str] = {}
    without = {turns[0] for turns in following.values() if len(turns) == 1}
    open_paths: list[tuple[str, list[str]]] = []
    for row in rows:
        path, reason = [turn["turn_id"] for turn in row["turns"]], row["branch_reason"]
        if reason == BranchReason.LABEL_CHANGED:
            labels = [turn["label"] for turn in row["turns"]]
            without.update(path[labels.index(row["label"]) :])  # else the last one's reason were the sample's
        elif reason in _OF_A_FORK:
            open_paths.append((reason, path))
        else:
            reasons[path[0]] = reason
            without.update(path[1:])
    forks: set[str] = set()
    for reason, path in open_paths:
        possible = [turn_id for turn_id in path[1:] if turn_id not in without]
        if len(possible) == 1 and (path[0] in reasons or reason == BranchReason.FORKED):
            forks.update(possible)
    for turns in following.values():
        if without.isdisjoint(turns):
            without.add(next((turn_id for turn_id in turns if turn_id not in forks), turns[0]))
    for reason, path in open_paths:
        reasons[next((turn_id for turn_id in reversed(path) if turn_id not in without), path[0])] = reason
    return reasons


def _common_reward(rows: Sequence[Row]) -> float | None:
    """The session's own reward, where its samples do not show that branches have others."""
    rewards = {row["reward"] for row in rows}
    return rewards.pop() if len(rewards) == 1 else None


def _samplings(row: Row) -> list[Sampling]:
    try:
        return msgspec.json.decode(row["sampling"], type=list[Sampling])
    except msgspec.MsgspecError:  # somebody else's file
        return []


def _versions_in(row: Row, start: int, end: int) -> list[str]:
    spans = row["weight_versions"]
    return list(
        dict.fromkeys(span["version"] for span in spans if span["start"] < end and span["end"] > start)
    )


def _preview(message: Mapping[str, Any]) -> str:
    """How a reply begins, on one line."""
    calls = [
        f"{call['function']['name']}({call['function']['arguments']})"
        for call in message.get("tool_calls", ())
    ]
    text = message.get("content") or " ".join(calls) or message.get("reasoning_content") or ""
    return " ".join(text[: 2 * _PREVIEW].split())[:_PREVIEW]
