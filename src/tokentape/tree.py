"""A session's turns as a tree: find the recorded turn that a request continues, commit what it sampled.

Requests are matched on meaning. Messages are the edges of a trie, keyed by digests that leave out what agents
change without meaning it: the order of JSON keys, None for "", the numbering of tool calls, spaces around
what the assistant said, reasoning that is not replayed, volatile text. Tools and template arguments are part
of the prompt: the places of the trie hold apart, by such pairs, the turns that end there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, TypeAlias, cast

import msgspec

from tokentape.errors import InternalError
from tokentape.labels import Labels, told
from tokentape.outline import Outline
from tokentape.tape import BranchReason, Label, Tape, Turn, lay_out
from tokentape.types import Json, Message
from tokentape.volatile import NOTHING, Volatile, without

Digest: TypeAlias = bytes
_Edge: TypeAlias = tuple[Digest, int]


@dataclass(frozen=True, slots=True)
class MessageKey:
    """One message's identity in its place.

    `base` is its meaning without reasoning, `reasoning` a digest of that, None without. `ordinal` is the call
    that a tool result answers: its index among the calls of the assistant message before, -1 for none. Of
    calls that share an id (as where ids are dropped) it is the first without an answer. `message` and
    `turn_id`, the turn that the request names as its origin, are no part of the identity.
    """

    base: Digest
    ordinal: int
    reasoning: Digest | None
    message: Message = field(compare=False)
    turn_id: str | None = field(default=None, compare=False)

    @property
    def by_assistant(self) -> bool:
        """Whether the assistant said it."""
        return self.message.role == "assistant"


@dataclass(frozen=True, slots=True)
class Known:
    """A message with the digests that do not depend on its neighbours; made once per distinct message.

    `volatile`: it has text that does not count. `turn_id` is the turn that said it, where that is known.
    """

    message: Message
    base: Digest
    reasoning: Digest | None
    volatile: bool = False
    turn_id: str | None = None


@dataclass(eq=False, slots=True)
class _Place:
    """A point in the trie: the messages so far. `edges` lead on by base and ordinal, then by reasoning.

    By the number of a frame: `turns` whose reply is the last of these messages, and one of the turns that
    `answered` all of them. `earliest`: the two lowest numbers in `turns`.
    """

    edges: "dict[_Edge, dict[Digest | None, _Place]]" = field(
        default_factory=dict["_Edge", "dict[Digest | None, _Place]"]
    )
    turns: dict[int, list[Turn]] = field(default_factory=dict[int, list[Turn]])
    answered: dict[int, Turn] = field(default_factory=dict[int, Turn])
    earliest: tuple[int, ...] = ()


@dataclass(eq=False, slots=True)
class _Node:
    """The session's turn number `index`, in frame number `frame`.

    Its reply ends at `place`; `before` stands for what precedes it.
    """

    turn: Turn
    index: int
    frame: int
    place: _Place
    before: Outline
    num_children: int = 0


@dataclass(frozen=True, slots=True)
class Attachment:
    """Where a request joins the tree.

    `path` are the turns from the root to the one that it continues; empty where there is none. The request's
    first `num_matched` messages are recorded. `before` stands for the messages before the last turn's reply.
    """

    path: tuple[Turn, ...]
    num_matched: int
    before: Outline


def know(message: Message, volatile: Volatile = NOTHING) -> Known:
    """The digests of one message."""
    content: str | list[str | int] = message.content or ""
    pieces = volatile.pieces(message)
    if pieces:
        content = without(message.content or "", pieces)
    elif message.role == "assistant":
        content = (message.content or "").strip()
    calls = [(call.name, _canonical(call.arguments)) for call in message.tool_calls]
    reasoning = (message.reasoning or "").strip() if message.role == "assistant" else ""
    base = _digest((message.role, content, calls, message.name))
    return Known(message, base, _digest(reasoning) if reasoning else None, bool(pieces))


def keys_of(known: Sequence[Known], *, after: Message | None = None) -> list[MessageKey]:
    """The keys of consecutive messages; `after` is the assistant message before them, if there is one."""
    keys: list[MessageKey] = []
    waiting = _ids(after) if after is not None else []
    for item in known:
        message, ordinal = item.message, -1
        if message.role == "assistant":
            waiting = _ids(message)
        elif message.role == "tool" and (message.tool_call_id or "") in waiting:
            ordinal = waiting.index(message.tool_call_id or "")
            waiting[ordinal] = None
        keys.append(MessageKey(item.base, ordinal, item.reasoning, message, item.turn_id))
    return keys


def frame_key(tools: Sequence[Json], arguments: Mapping[str, Any]) -> tuple[Digest, Digest]:
    """The identity of what is rendered around the messages: tools, template arguments."""
    return _digest(_sorted(list(tools))), _digest(_sorted(dict(arguments)))


class Tree:
    """The turns of one session. Append-only.

    `content_tests` are what the chat template looks for in messages (see `Outline`).
    """

    def __init__(self, content_tests: tuple[str, ...], volatile: Volatile = NOTHING) -> None:
        self._content_tests = content_tests
        self._volatile = volatile
        self._start = _Place()
        self._roots: dict[tuple[Digest, Digest], int] = {}  # frames, numbered as their first roots came
        self._frames: list[tuple[Digest, Digest]] = []
        self._openers: set[str] = set()  # the roles that speak first
        self._nodes: dict[str, _Node] = {}
        self._labels = Labels()

    def __contains__(self, turn_id: str) -> bool:
        """Whether a turn of this id is committed."""
        return turn_id in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def turns(self) -> Iterator[Turn]:
        """All turns in the order of their commits."""
        return (node.turn for node in self._nodes.values())

    def attach(self, frame: tuple[Digest, Digest], keys: Sequence[MessageKey]) -> Attachment:
        """The longest recorded prefix of a request that ends in a sampled turn."""
        turn, num_matched = self._longest(frame, keys)
        if turn is None:
            return Attachment((), 0, Outline())
        return Attachment(self.path(turn.turn_id), num_matched, self._nodes[turn.turn_id].before)

    def branch_reason(
        self, parent_id: str | None, frame: tuple[Digest, Digest], keys: Sequence[MessageKey]
    ) -> str | None:
        """Why a turn would start a branch if committed now; None where it simply continues its parent.

        `keys` are its new messages: all of the request's where it has no parent.
        """
        if parent_id is not None:
            parent = self._nodes[parent_id]
            if not parent.num_children:
                return None
            if any(key.by_assistant for key in keys):
                return BranchReason.EDITED_HISTORY
            again = _was_answered(parent.place, parent.frame, keys)
            return BranchReason.RESAMPLED if again else BranchReason.FORKED
        if not self._nodes:
            return BranchReason.ROOT
        number = self._roots.get(frame)
        if number is not None and _was_answered(self._start, number, keys):
            return BranchReason.RESAMPLED
        nearest = self._nearest(number, keys)
        if nearest is not None:
            return BranchReason.TOOLS_CHANGED if nearest[0] != frame[0] else BranchReason.ARGUMENTS_CHANGED
        if number is not None and self._is_compacted([key.message for key in keys]):
            return BranchReason.COMPACTED
        if any(key.by_assistant for key in keys):
            return BranchReason.EDITED_HISTORY
        return BranchReason.NEW_CONVERSATION

    def commit(self, turn: Turn) -> None:
        """Append a turn.

        Raises:
            InternalError: the turn breaks an invariant, is known already, or its parent is not.
        """
        turn.verify()
        if turn.turn_id in self._nodes:
            raise InternalError(f"turn {turn.turn_id} is committed already")
        if turn.parent_id is None:
            frame = frame_key(turn.tools, turn.arguments)
            number, place = self._roots.get(frame, len(self._frames)), self._start
            before, after = Outline(), None
        else:
            parent = self._nodes.get(turn.parent_id)
            if parent is None:
                raise InternalError(
                    f"turn {turn.turn_id}: its parent {turn.parent_id} is not in this session"
                )
            if (turn.tools, turn.arguments) != (parent.turn.tools, parent.turn.arguments):
                raise InternalError(f"turn {turn.turn_id}: its tools or arguments are not its parent's")
            number, place, after = parent.frame, parent.place, parent.turn.reply
            frame = self._frames[number]
            before = parent.before.followed_by([after], self._content_tests)
        before = before.followed_by(turn.messages, self._content_tests)
        said = [self.know(message) for message in (*turn.messages, turn.reply)]
        *asked, replied = keys_of(said, after=after)
        for key in asked:  # nothing raises from here on
            place = _step(place, key)
        place.answered[number] = turn
        place = _step(place, replied)
        place.turns.setdefault(number, []).append(turn)
        place.earliest = tuple(sorted({*place.earliest, number})[:2])
        if turn.parent_id is not None:
            self._nodes[turn.parent_id].num_children += 1
        else:
            self._openers.update(message.role for message in turn.messages[:1])
            if number == len(self._frames):
                self._roots[frame] = number
                self._frames.append(frame)
        self._nodes[turn.turn_id] = _Node(turn, len(self._nodes), number, place, before)
        self._labels.add(turn)

    def know(self, message: Message) -> Known:
        """The digests of one message, as this tree matches it."""
        return know(message, self._volatile)

    def turn(self, turn_id: str) -> Turn | None:
        """The turn of this id, None where there is none."""
        node = self._nodes.get(turn_id)
        return node.turn if node is not None else None

    def path(self, turn_id: str) -> tuple[Turn, ...]:
        """The turns from the root to this one."""
        path: list[Turn] = []
        at: str | None = turn_id
        while at is not None:
            path.append(self._nodes[at].turn)
            at = path[-1].parent_id
        return tuple(reversed(path))

    def labels(self) -> dict[str, Label]:
        """The label of every turn, by its id."""
        return self._labels.of_turns()

    def ends(self, labels: Mapping[str, Label]) -> list[str]:
        """The last turns of all branches, in the order of their commits; `labels` are those of this tree.

        A branch ends where none of the turns behind it has its label: at every leaf, and where only others go
        on, as when the history is summarised in its own line. So each turn is on a path of its own label.
        """
        below: dict[str, set[str]] = {}
        ends: list[str] = []
        for turn_id in reversed(self._nodes):  # children before their parents
            parent_id, name = self._nodes[turn_id].turn.parent_id, labels[turn_id].name
            behind = below.pop(turn_id, set[str]())
            if name not in behind:
                ends.append(turn_id)
                behind.add(name)
            if parent_id is not None:
                fewer, more = sorted((behind, below.get(parent_id, set())), key=len)
                more |= fewer  # this way round a long line of many labels costs no more than it has
                below[parent_id] = more
        return ends[::-1]

    def branches(self) -> list[tuple[Turn, ...]]:
        """Paths from a root to the `ends`."""
        return [self.path(turn_id) for turn_id in self.ends(self.labels())]

    def tapes(self) -> list[Tape]:
        """All branches laid out. A turn is trained once: in the longest of those that end with its label."""
        labels = self.labels()
        branches = [self.path(turn_id) for turn_id in self.ends(labels)]
        trained: list[set[str]] = [set() for _ in branches]
        owned: set[str] = set()
        for index in sorted(range(len(branches)), key=lambda i: -len(branches[i])):
            name = labels[branches[index][-1].turn_id].name
            mine = {t.turn_id for t in branches[index] if labels[t.turn_id].name == name} - owned
            trained[index] = mine
            owned |= mine
        return [lay_out(path, mine, labels) for path, mine in zip(branches, trained, strict=True)]

    def _is_compacted(self, messages: Sequence[Message]) -> bool:
        """Whether system or user quote a reply that nothing follows; the first to speak is so elsewhere."""
        if not messages or messages[0].role not in self._openers:
            return False
        return any(summary.num_ends for summary in self._labels.summaries.in_text(told(messages)))

    def _nearest(self, number: int | None, keys: Sequence[MessageKey]) -> tuple[Digest, Digest] | None:
        """The other frame with the longest recorded prefix that ends in a turn; the earliest of equals."""
        places, nearest = [self._start], None
        for key in keys:
            places = _follow(places, key)
            if not places:
                break
            here = [each for place in places for each in place.earliest if each != number]
            nearest = min(here) if here else nearest
        return self._frames[nearest] if nearest is not None else None

    def _longest(self, frame: tuple[Digest, Digest], keys: Sequence[MessageKey]) -> tuple[Turn | None, int]:
        number = self._roots.get(frame)
        found, num_matched = None, 0
        if number is None:
            return found, num_matched
        places = [self._start]
        for num_keys, key in enumerate(keys, 1):
            places = _follow(places, key)
            if not places:
                break
            ended = [turn for place in places for turn in place.turns.get(number, ())]
            if ended:
                found, num_matched = max(ended, key=lambda turn: self._preference(turn, key)), num_keys
        return found, num_matched

    def _preference(self, turn: Turn, key: MessageKey) -> tuple[bool, bool, int]:
        """Of turns that say the same in one place: the named one, the one of these call ids, the latest."""
        ids = _ids(turn.reply)
        same_ids = bool(ids) and ids == _ids(key.message)
        return turn.turn_id == key.turn_id, same_ids, self._nodes[turn.turn_id].index


def _follow(places: Sequence[_Place], key: MessageKey) -> list[_Place]:
    """Where a message leads. Without reasoning it may be any that was recorded, whatever that thought."""
    variants = [place.edges.get((key.base, key.ordinal), {}) for place in places]
    if key.reasoning is None:
        return [target for targets in variants for target in targets.values()]
    return [targets[key.reasoning] for targets in variants if key.reasoning in targets]


def _step(place: _Place, key: MessageKey) -> _Place:
    """Where a recorded message leads, the way made if it is new."""
    return place.edges.setdefault((key.base, key.ordinal), {}).setdefault(key.reasoning, _Place())


def _was_answered(place: _Place, number: int, keys: Sequence[MessageKey]) -> bool:
    """Whether exactly these messages have been answered before by a sampled turn of this frame."""
    places = [place]
    for key in keys:
        places = _follow(places, key)
    return any(number in at.answered for at in places)


def _ids(message: Message) -> list[str | None]:
    """The ids of the calls of an assistant message, to be crossed out as they are answered."""
    return [call.id for call in message.tool_calls]


def _digest(value: object) -> Digest:
    return blake2b(msgspec.json.encode(value), digest_size=16).digest()


def _canonical(arguments: str) -> str:
    """JSON text in one form: keys sorted, 1.0 as 1 (as JavaScript writes it); other text as it is."""
    try:
        return json.dumps(_sorted(json.loads(arguments, parse_float=_number)), ensure_ascii=True)
    except (ValueError, RecursionError):
        return arguments


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value


def _sorted(value: Any) -> Any:
    """Plain JSON data with the keys of every object in order."""
    if isinstance(value, dict):
        object_ = cast("dict[str, Any]", value)
        return {key: _sorted(object_[key]) for key in sorted(object_)}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in cast("Sequence[Any]", value)]
    return value
