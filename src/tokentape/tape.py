"""One turn's tokens, and a branch of turns laid out flat: the tape.

Arrays are machine arrays, appended in C. A turn holds only what it added: its prompt run (the whole prompt
for a root, the bridge for every other turn) and its completion.
"""

import math
import re
from array import array
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from tokentape.errors import InternalError
from tokentape.types import (
    GREEDY_BELOW,
    Json,
    Message,
    RoutedExperts,
    Sampling,
    Support,
    TokenRun,
    VersionSpan,
)
from tokentape.volatile import Superseded


class BranchReason(StrEnum):
    """Why a turn starts a branch. Templates that rewrite history add reasons (`render.Rewrite`)."""

    ROOT = "root"  # the session's first turn
    NEW_CONVERSATION = "new_conversation"  # no recorded turn is a prefix, and none was meant to be
    COMPACTED = "compacted"  # it goes on from a recorded reply that was put in the place of the history
    EDITED_HISTORY = (
        "edited_history"  # the request replays assistant messages that differ from what was sampled
    )
    TOOLS_CHANGED = "tools_changed"
    ARGUMENTS_CHANGED = "template_arguments_changed"
    RESAMPLED = "resampled"  # the same request again
    CHOICE = "choice"  # another choice of the same request (n > 1)
    FORKED = "forked"  # the turn it continues has been continued otherwise
    LABEL_CHANGED = "label_changed"  # of samples only: the turn goes on from another's under another label


class LogprobBasis(StrEnum):
    """Which distribution a turn's log-probabilities are of.

    SGLang takes them after penalties, `logit_bias`, constraint and temperature, and before truncation. What a
    trainer recomputes must be treated alike: see docs/sampling.md.
    """

    SAMPLED = "sampled"  # of the very distribution that the tokens were drawn from
    UNTRUNCATED = "untruncated"  # before top-k, top-p and min-p cut it
    GREEDY = "greedy"  # at temperature 1; the likeliest token was taken

    @classmethod
    def of(cls, sampling: Sampling) -> "LogprobBasis":
        """The basis of a turn that was sampled so."""
        if sampling.top_k == 1 or (sampling.temperature is not None and sampling.temperature < GREEDY_BELOW):
            return cls.GREEDY
        top_p, top_k, min_p = sampling.top_p or 1.0, sampling.top_k or -1, sampling.min_p or 0.0
        return cls.UNTRUNCATED if top_p < 1 or top_k > 1 or min_p > 0 else cls.SAMPLED


ITEM_BYTES = {"uint8": 1, "uint16": 2}
"""Bytes of one entry of `RoutedExperts`, by its type."""


@dataclass(frozen=True, slots=True)
class Label:
    """Whose turn it is: "main", "subagent", "auxiliary", "compaction", or what the caller says.

    `by` is "caller", "rule:" and the rule's name, or "inferred".
    """

    name: str
    by: str


class Origin(msgspec.Struct, frozen=True, omit_defaults=True):
    """The request that a turn answers.

    `wire` is its protocol. `digest` identifies its bytes; turns of one `request_id` are choices of one
    request. `label` is the caller's, None where it gave none. `ignored` are the names of its fields that had
    no effect, `noted` what the wire keeps of it for later.
    """

    wire: str
    digest: str
    request_id: str
    label: str | None = None
    ignored: tuple[str, ...] = ()
    noted: Json = {}


@dataclass(frozen=True, slots=True)
class Turn:
    """One committed generation. P new prompt ids, then C sampled ids.

    `prompt` int[P] is the delta: the bridge after the parent's completion, or the whole prompt where
    `parent_id` is None. `completion` int[C], `logprobs` float32[C] nats, `versions` spans over 0:C.
    `branch_reason` is None where the turn simply continues its parent. `messages` are the new messages that
    the prompt run renders, `reply` is the completion as parsed; `in_reasoning`: it ended inside an unclosed
    thought. `stop_id` is the stop token at the completion's end, None where it has none. `tools` and
    `arguments` are the frame that the branch was rendered in. `attempts` are the tool-call attempts as data.
    `neutralised` are control tokens of untrusted content that were encoded as plain text. `superseded` are
    volatile texts of the request that the recorded ones stand for (see `volatile`). `support` is None where
    the engine was not asked. `routed_experts` are of the tokens from the parent's last sampled one (a root's:
    from the first) to the last but one sampled here, so that those of a path, one after the other, are of all
    its tokens but the last. `num_cached_tokens` of
    the prompt came from the engine's cache, None where it did not say. `created_at` is in seconds since the
    epoch.
    """

    turn_id: str
    parent_id: str | None
    branch_reason: str | None
    prompt: TokenRun
    completion: TokenRun
    logprobs: "array[float]"
    versions: tuple[VersionSpan, ...]
    logprob_basis: str
    support: Support | None
    routed_experts: RoutedExperts | None
    finish_reason: str
    stop_id: int | None
    messages: tuple[Message, ...]
    reply: Message
    in_reasoning: bool
    parse_status: str
    attempts: tuple[Json, ...]
    tools: tuple[Json, ...]
    arguments: Json
    sampling: Sampling
    neutralised: tuple[str, ...]
    superseded: tuple[Superseded, ...]
    origin: Origin
    num_cached_tokens: int | None
    created_at: float

    def verify(self) -> None:
        """Check what every tape relies on.

        Raises:
            InternalError: arrays disagree, a log-probability is not finite, versions leave a gap, or a root
                has no reason.
        """
        if self.parent_id is None and self.branch_reason is None:
            raise InternalError(f"turn {self.turn_id}: a root without a reason")
        size = len(self.completion)
        if len(self.logprobs) != size:
            raise InternalError(
                f"turn {self.turn_id}: {size} sampled ids, {len(self.logprobs)} log-probabilities"
            )
        if not all(map(math.isfinite, self.logprobs)):
            raise InternalError(f"turn {self.turn_id}: a log-probability is not finite")
        at = 0
        for span in self.versions:
            if span.start != at or span.end <= at:
                raise InternalError(f"turn {self.turn_id}: version spans leave a gap or overlap at {at}")
            at = span.end
        if at != size:
            raise InternalError(f"turn {self.turn_id}: version spans end at {at} of {size}")
        self._verify_captured(size)
        if self.stop_id is not None and (not size or self.completion.ids[-1] != self.stop_id):
            raise InternalError(f"turn {self.turn_id}: the stop token is not the last sampled id")

    def _verify_captured(self, size: int) -> None:
        """Support and routed experts have a place for every token."""
        if (support := self.support) is not None:
            lengths, ids = array("i", support.lengths), array("i", support.ids)
            if not len(lengths) == len(support.logprobs) // 4 == size or sum(lengths) != len(ids):
                raise InternalError(f"turn {self.turn_id}: the captured support is not of {size} tokens")
            end = 0
            for at, length in enumerate(lengths):
                if self.completion.ids[at] not in ids[end : end + length]:
                    raise InternalError(f"turn {self.turn_id}: token {at} is not in its support")
                end += length
            if not all(math.isfinite(value) for value in array("f", support.logprobs)):
                raise InternalError(f"turn {self.turn_id}: a log-probability in its support is not finite")
        if (routed := self.routed_experts) is not None:
            rows = len(self.prompt) + size - (self.parent_id is None)
            if len(routed.data) != rows * routed.width * ITEM_BYTES[routed.dtype]:
                raise InternalError(f"turn {self.turn_id}: routed experts are not of {rows} tokens")


@dataclass(frozen=True, slots=True)
class TurnSpan:
    """Tokens `start:end` of a tape are what one turn sampled; `trained`: this tape trains them."""

    turn: Turn
    start: int
    end: int
    trained: bool
    label: Label


@dataclass(frozen=True, slots=True)
class Tape:
    """A branch laid out flat, N tokens.

    `token_ids` int32[N], `loss_mask` int8[N], `logprobs` float32[N]: valid only where the mask is 1, 0.0
    elsewhere in the array and null everywhere it leaves the process. `versions` are spans over 0:N that cover
    the trained tokens.
    """

    token_ids: "array[int]"
    loss_mask: "array[int]"
    logprobs: "array[float]"
    versions: tuple[VersionSpan, ...]
    turns: tuple[TurnSpan, ...]

    @property
    def label(self) -> Label:
        """The last turn's, and that of every turn that this tape trains."""
        return self.turns[-1].label

    @property
    def branch_reason(self) -> str:
        """Why the tape's last stretch began: the last turn's that has a reason, or that its label changed."""
        reason = self.turns[0].turn.branch_reason or ""
        begun = False
        for span in self.turns:
            if span.turn.branch_reason is not None:
                reason = span.turn.branch_reason
            elif not begun and span.label.name == self.label.name:
                reason = BranchReason.LABEL_CHANGED.value
            begun = begun or span.label.name == self.label.name
        return reason

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the first turn's prompt."""
        return len(self.turns[0].turn.prompt)

    def __len__(self) -> int:
        return len(self.token_ids)


def numbered_versions(versions: Iterable[str]) -> dict[str, int] | None:
    """Each version's place, the oldest is 0: by the numbers in names that are alike but for these.

    None where they are not: `step-4` is older than `step-20`, but nobody knows of `b` and `a`.
    """
    parts = {version: re.split(r"(\d+)", version) for version in versions}
    if len({(*each[::2],) for each in parts.values()}) > 1:
        return None
    known = sorted(parts, key=lambda version: [int(number) for number in parts[version][1::2]])
    return {version: place for place, version in enumerate(known)}


def version_order(versions: Iterable[str]) -> dict[str, int]:
    """Each version's place, the oldest is 0: by their numbers, or else as they have come."""
    known = list(versions)
    return numbered_versions(known) or {v: place for place, v in enumerate(dict.fromkeys(known))}


def lay_out(path: Sequence[Turn], trained: Container[str], labels: Mapping[str, Label]) -> Tape:
    """The tape of a path from a root; turns whose id is in `trained` get mask 1 here."""
    ids, mask, logprobs = array("i"), array("b"), array("f")
    versions: list[VersionSpan] = []
    spans: list[TurnSpan] = []
    for turn in path:
        for run in (turn.prompt, turn.completion):
            ids += run.ids
        start, end = len(ids) - len(turn.completion), len(ids)
        mine = turn.turn_id in trained
        mask.frombytes(bytes(start - len(mask)) + (b"\1" if mine else b"\0") * (end - start))
        logprobs.frombytes(bytes(4 * (start - len(logprobs))))
        logprobs += turn.logprobs if mine else array("f", bytes(4 * (end - start)))
        if mine:
            versions += [VersionSpan(v.version, v.start + start, v.end + start) for v in turn.versions]
        spans.append(TurnSpan(turn, start, end, mine, labels[turn.turn_id]))
    return Tape(ids, mask, logprobs, tuple(versions), tuple(spans))
