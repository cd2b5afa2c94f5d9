"""What a template itself says of a turn and of what follows it: the judge of `Renderer.extend`.

Nothing here knows how `extend` works. The template renders the whole conversation; what it writes between the
prompt and the end of the turn is the canonical completion, and the ids of prompt, completion and bridge must
be the full render's. The tests judge likewise, with a table of stop tokens where this module finds them.
"""

import os.path
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokentape.audit.cases import CASES, Case
from tokentape.audit.report import CaseResult, Outcome, Thinking
from tokentape.errors import TemplateRefused
from tokentape.outline import Outline
from tokentape.parse import Harmony, ThinkTags
from tokentape.render import Ended, Frame, NotExtendable, Rendered, Renderer
from tokentape.types import Message

_BY_NAME = {case.name: case for case in CASES}
_TELLING = {  # cases that show how a turn ends, the most ordinary first
    False: ("text", "text after call", "thought+text"),
    True: ("call", "no system", "thought+call", "two calls"),
}


@dataclass(frozen=True, slots=True)
class Stops:
    """The token that ends a turn of text, and one of calls; None where the template writes none."""

    text: str | None
    calls: str | None


@dataclass(frozen=True, slots=True)
class _Judged:
    outcome: Outcome
    reason: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Judge:
    """Judges cases under one set of template arguments.

    `preserve`: the renderer keeps what the template would rewrite. `eos_ids` end a turn according to the
    model's files.
    """

    renderer: Renderer
    arguments: Mapping[str, Any]
    preserve: bool
    eos_ids: frozenset[int]
    thinking: Thinking
    stops: Stops

    @classmethod
    def of(
        cls,
        renderer: Renderer,
        arguments: Mapping[str, Any],
        reasoning: ThinkTags | Harmony | None,
        *,
        preserve: bool,
        eos_ids: frozenset[int],
    ) -> "Judge":
        """Find out how this template thinks and stops, then judge by it."""
        thinking = _thinking(renderer, arguments, reasoning)
        stops = Stops(*(_stop(renderer, arguments, eos_ids, _TELLING[calls]) for calls in (False, True)))
        return cls(renderer, arguments, preserve, eos_ids, thinking, stops)

    def results(self) -> tuple[CaseResult, ...]:
        """Every case's result."""
        return tuple(map(self.result, CASES))

    def result(self, case: Case) -> CaseResult:
        """One case's result."""
        judged, possible = self._judge(case), self._possible(case)
        counted = case.tool_use and possible
        return CaseResult(
            case.name, case.title, judged.outcome, judged.reason, judged.detail, possible, counted
        )

    def _possible(self, case: Case) -> bool:
        """Whether a model that is prompted this way can sample such a turn."""
        has_thought = case.reply.reasoning is not None
        if self.thinking is Thinking.OPENED:
            return has_thought
        return not has_thought or self.thinking is Thinking.FREE

    def _judge(self, case: Case) -> _Judged:
        renderer, frame = self.renderer, Frame(case.tools, self.arguments)
        try:
            prompt = text_of(renderer, frame, case.before)
            prompt_ids = list(renderer.render(frame, case.before).run.ids)
        except TemplateRefused as error:
            return _Judged(Outcome.REFUSED, None, str(error))
        written = None if case.cut else (self.stops.calls if case.reply.tool_calls else self.stops.text)
        stop_id = None if case.cut else self._stop_id(written)
        outline = renderer.outline(Outline(), case.before)
        answer = renderer.extend(frame, outline, Ended(case.reply, stop_id, case.in_thought), case.new)
        if isinstance(answer, NotExtendable):
            return _Judged(Outcome.BRANCH, answer.reason.value, answer.detail)
        messages = [*case.before, case.reply, *case.new]
        try:
            whole = text_of(renderer, frame, messages)
        except TemplateRefused as error:
            return _Judged(Outcome.KEPT, None, f"the template cannot write this turn: {error}")
        full_ids = list(renderer.render(frame, messages).run.ids)
        bridge_ids, decode = list(answer.run.ids), renderer.tokenizer.decode
        if not bridge_ids or not decode(full_ids).endswith(decode(bridge_ids)):
            return self._drift(answer, whole)
        if not case.cut and written is None:
            return _Judged(
                Outcome.KEPT, None, "the sampled end of turn stays; the template does not write it"
            )
        completion = self._completion(case, prompt, whole, written)
        if completion is None:
            if self.preserve:
                return _Judged(Outcome.KEPT, None, "the template would write the turn otherwise")
            return self._drift(answer, whole)
        # Behind the template's own stop token, ids are the full render's; elsewhere they may merge.
        if full_ids[-len(bridge_ids) :] != bridge_ids and not case.cut:
            return self._drift(answer, whole)
        return self._compare(case, prompt_ids, completion, bridge_ids, full_ids)

    def _compare(
        self, case: Case, prompt_ids: list[int], completion: str, bridge_ids: list[int], full_ids: list[int]
    ) -> _Judged:
        """Compare ids; `completion` is the template's text of the turn."""
        tokenizer = self.renderer.tokenizer
        own_ids, decode = list(tokenizer.encode(completion)), tokenizer.decode
        joined = [*prompt_ids, *own_ids, *bridge_ids]
        if joined == full_ids:
            return _Judged(Outcome.EXACT)
        # SentencePiece puts a blank before a text that stands alone: look at how the full render has it.
        middle = full_ids[len(prompt_ids) : len(full_ids) - len(bridge_ids)]
        is_completion = decode(middle).strip() == completion.strip() and middle[-1:] == own_ids[-1:]
        if is_completion and [*prompt_ids, *middle, *bridge_ids] == full_ids:
            return _Judged(Outcome.EXACT)
        whole, bridge = decode(full_ids), decode(bridge_ids)
        if decode(joined) == whole:
            return _Judged(Outcome.SEAM, None, "the full render has other ids at the turn's edges")
        seen = decode([*prompt_ids, *own_ids])
        if case.cut and whole.startswith(seen) and whole.endswith(bridge):
            left_out = whole[len(seen) : len(whole) - len(bridge)]
            return _Judged(Outcome.KEPT, None, f"a cut turn goes on without {left_out!r} behind its text")
        return _Judged(Outcome.DRIFT, None, f"{decode(joined)!r} is not {whole!r}")

    def _drift(self, answer: Rendered, whole: str) -> _Judged:
        bridge = self.renderer.tokenizer.decode(list(answer.run.ids))
        return _Judged(Outcome.DRIFT, None, f"the bridge {bridge!r} is not how {whole!r} ends")

    def _completion(self, case: Case, prompt: str, whole: str, stop: str | None) -> str | None:
        """What the template writes of the turn, its stop token included; None where not the whole turn."""
        if not whole.startswith(prompt):
            return None
        at, before = len(prompt), len(whole)
        found = [i for i in (whole.find(text, at) for text in case.anchors) if i >= 0]
        before = min(found, default=before)
        if stop is None:  # cut: the turn ends where its text does
            piece = (case.reply.reasoning if case.in_thought else case.reply.content) or ""
            end = whole.rfind(piece, at, before) + len(piece)
            stop = piece
        else:
            end = whole.rfind(stop, at, before) + len(stop)
        completion = whole[at:end]
        shown = Counter(case.pieces)
        if not completion.endswith(stop) or any(completion.count(text) < n for text, n in shown.items()):
            return None
        if case.reply.reasoning == "" and not self._opens_alike(case, prompt, completion):
            return None
        return completion

    def _opens_alike(self, case: Case, prompt: str, completion: str) -> bool:
        """An empty thought has no text to look for: up to its last piece the turn must be as the last one."""
        end = max((completion.rfind(mark) + len(mark) for mark in case.marks), default=0)
        messages = [*case.before, case.reply]
        last = text_of(self.renderer, Frame(case.tools, self.arguments), messages, go_on=False)
        return last.startswith(prompt + completion[:end])

    def _stop_id(self, written: str | None) -> int | None:
        if written is not None:
            return self.renderer.tokenizer.id_of(written)
        return min(self.eos_ids, default=None)


def text_of(renderer: Renderer, frame: Frame, messages: Sequence[Message], *, go_on: bool = True) -> str:
    """The template's text of a conversation, with the generation prompt unless `go_on` is False.

    Raises:
        TemplateRefused: the template raised.
    """
    template = renderer.template
    dicts = [template.to_json(message) for message in messages]
    return template.render(dicts, frame.tools, frame.arguments, add_generation_prompt=go_on)


def _thinking(
    renderer: Renderer, arguments: Mapping[str, Any], reasoning: ThinkTags | Harmony | None
) -> Thinking:
    if reasoning is None:
        return Thinking.NEVER
    if isinstance(reasoning, Harmony):
        return Thinking.FREE
    for name in ("call", "no system", "text"):
        case = _BY_NAME[name]
        frame = Frame(case.tools, arguments)
        try:
            prompt = text_of(renderer, frame, case.before)
            closed = text_of(renderer, frame, case.before, go_on=False)
        except TemplateRefused:
            continue
        if prompt.rstrip().endswith(reasoning.open):
            return Thinking.OPENED
        opening = prompt[len(os.path.commonprefix([prompt, closed])) :]  # noqa: RUF071  # of texts
        return Thinking.CLOSED if opening.rstrip().endswith(reasoning.close) else Thinking.FREE
    return Thinking.FREE


def _stop(
    renderer: Renderer, arguments: Mapping[str, Any], eos_ids: frozenset[int], names: Sequence[str]
) -> str | None:
    """The special token with which the template ends a last turn, or, where it writes none, goes on (GLM)."""
    eos = {renderer.tokenizer.token_text(i) for i in eos_ids}
    for case in (_BY_NAME[name] for name in names):
        frame = Frame(case.tools, arguments)
        try:
            last = text_of(renderer, frame, [*case.before, case.reply], go_on=False)
            followed = text_of(renderer, frame, [*case.before, case.reply, *case.new])
        except TemplateRefused:
            continue
        tails = [behind(text, case) for text in (last, followed)]
        if None in tails:
            continue
        ending, opening = (_special(renderer, tail or "") for tail in tails)
        if ending:
            return next((token for token in ending if token in eos), ending[-1])
        if opening:
            return opening[0]
    return None


def behind(text: str, case: Case) -> str | None:
    """What stands behind the turn's last piece and before the new messages; None where there is no turn."""
    ends = [text.rfind(piece) + len(piece) for piece in case.marks if piece in text]
    if not ends:
        return None
    at = min((i for i in (text.find(anchor) for anchor in case.anchors) if i >= 0), default=len(text))
    return text[max(ends) : at]


def _special(renderer: Renderer, text: str) -> list[str]:
    tokenizer = renderer.tokenizer
    return [m[0] for m in tokenizer.control_pattern.finditer(text) if m[0] in tokenizer.special_tokens]
