r"""Messages → prompt ids: `render` a whole conversation, or `extend` a recorded turn by what is new.

`extend` finds the bridge from the template itself. It renders a short stand-in conversation in which the
sampled assistant turn carries sentinels, once as the last turn and once followed by the new messages:

    as last    …<|im_start|>assistant\nSENTINEL<|im_end|>\n
    followed   …<|im_start|>assistant\nSENTINEL<|im_end|>\n<|im_start|>user\nnew text<|im_end|>\n…

What both have after the sentinel is how the template closes a turn. The stop token that the model sampled is
found there (or right behind it, where it doubles as the next opener); the bridge is what follows. A
completion without a stop token is closed by the template's own end of turn, which is then part of the bridge:
never sampled, mask 0.
"""

import json
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

from tokentape.errors import ConfigError, TemplateRefused
from tokentape.outline import STAND_IN, Outline
from tokentape.probe import Probe, Prober, Stage
from tokentape.template import PROBE_TOOL, ChatTemplate, one_moment
from tokentape.tokenizer import Tokenizer
from tokentape.types import Json, Message, TokenRun, ToolCall
from tokentape.untrusted import Marking, mark_untrusted

log = logging.getLogger(__name__)

History = Literal["template", "preserve"]
_TAIL_CHARS = 64


class Rewrite(StrEnum):
    """Why a recorded turn cannot be extended: what the template would do to it."""

    HISTORY = "history_rewritten"  # text before the turn changes when messages follow
    GENERATION_PROMPT = "generation_prompt_rewritten"  # the turn no longer starts as the model saw it start
    REASONING = "reasoning_dropped"
    CONTENT = "content_dropped"
    TOOL_CALLS = "tool_calls_dropped"
    END_OF_TURN = "end_of_turn_rewritten"  # the sampled stop token becomes another one (gpt-oss)
    REFUSED = "template_refused"  # the template raises on the conversation


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template renders around the messages: tools (OpenAI dicts) and extra template arguments."""

    tools: tuple[Json, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Rendered:
    """Prompt ids for the engine: a whole prompt, or a bridge.

    `tail` is the end of the rendered text (a generation prompt may have opened a thought). `neutralised` are
    the control tokens that untrusted content held and that were encoded as plain text.
    """

    run: TokenRun
    tail: str
    neutralised: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NotExtendable:
    """Extending the recorded turn would not be what the template makes of this history."""

    reason: Rewrite
    detail: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a sampled turn ended.

    `message` is the turn as parsed. `stop_id` is the stop token that it sampled, None after a length cut or a
    stop string. `in_reasoning`: it ended inside an unclosed thought.
    """

    message: Message
    stop_id: int | None
    in_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class _Seam:
    """The bridge's text, and the text of the stop token right before it (None: there is none)."""

    bridge: str
    stop: str | None


class Renderer:
    """Renders and extends for one model. Nothing changes after load: safe to share between threads.

    With `history="template"` a turn that the template would rewrite is `NotExtendable`; with `"preserve"` the
    sampled ids stay as they are and only the bridge is the template's.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, *, history: History = "template"
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._preserve = history == "preserve"
        self._sentinel = f"tt{secrets.token_hex(6)}"  # untrusted text cannot forge what it cannot guess
        # One tool makes a template show all that it shows with tools; the real ones may be long.
        self._tool_name = f"{self._sentinel}t"
        function = {**PROBE_TOOL["function"], "name": self._tool_name}
        self._tools: tuple[Json, ...] = ({**PROBE_TOOL, "function": function},)
        self._prober = Prober(template, self._sentinel, preserve=self._preserve)
        self._counts, self._text_end = self._look_at_rounds()

    @classmethod
    def from_dir(
        cls, directory: Path, *, history: History = "template", num_ids: int | None = None
    ) -> "Renderer":
        """Load tokenizer and chat template from a directory; the model can sample `num_ids` ids.

        Raises:
            ConfigError: a file is missing or broken; it names the file.
        """
        if not directory.is_dir():
            raise ConfigError(f"{directory} is not a directory: --model takes a model directory or a hub id")
        template = ChatTemplate.from_dir(directory)
        tokenizer = Tokenizer(
            directory / "tokenizer.json", template_text=template.literal_text, num_ids=num_ids
        )
        log.info("tokenizer: %s, %d ids", tokenizer.backend_name, tokenizer.vocab_size)
        return cls(tokenizer, template, history=history)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The id of the tokenizer's own end-of-turn token, if it names one."""
        eos = self.tokenizer.id_of(self.template.special_tokens.get("eos_token", ""))
        return frozenset() if eos is None else frozenset({eos})

    def render(self, frame: Frame, messages: Sequence[Message]) -> Rendered:
        """The whole conversation's prompt ids, generation prompt included.

        Raises:
            TemplateRefused: the template raised.
            RequestError: a tool call's arguments are not what the template needs.
        """
        plain = [self.template.to_json(m) for m in messages]
        context, dicts, marking = mark_untrusted(self.tokenizer, [dict(frame.arguments), *frame.tools], plain)
        arguments, *tools = context
        text = self.template.render(dicts, tools, arguments, add_generation_prompt=True)
        if not text:
            raise TemplateRefused("the model's chat template renders this conversation as nothing")
        return self._encode(text, marking, after=None)

    @one_moment()
    def extend(
        self, frame: Frame, outline: Outline, ended: Ended, new: Sequence[Message]
    ) -> Rendered | NotExtendable:
        """The bridge after a sampled turn: `prompt + completion + bridge` is the next prompt.

        `outline` stands for the messages before the turn, `new` are the messages after it (at least one).
        Takes time in proportion to `new`, whatever the length of the history.

        Raises:
            RequestError: a tool call in `new` has arguments that the template cannot take.
        """
        if ended.in_reasoning and not ended.message.reasoning:
            # cut before its first word: a thought all the same
            ended = Ended(replace(ended.message, reasoning="x"), ended.stop_id, in_reasoning=True)
        if self._counts:
            outline = outline.whole
        # Harmony shows a call's name with its result: the names are untrusted text of the bridge, too.
        names: Json = {"role": "assistant", "names": [call.name for call in ended.message.tool_calls]}
        plain = [names, *(self.template.to_json(m) for m in new)]
        [arguments], dicts, marking = mark_untrusted(self.tokenizer, [dict(frame.arguments)], plain)
        tools = self._tools if frame.tools else ()
        stage = Stage.of(self.template, outline.messages, tools, arguments)
        seam = self._find_seam(stage, ended, dicts)
        if isinstance(seam, _Seam) and (self._tool_name in seam.bridge or STAND_IN in seam.bridge):
            # Mistral repeats tools and the system's text with each user: the real ones, then.
            context = [dict(frame.arguments), *frame.tools]
            before = [self.template.to_json(m) for m in outline.originals]
            plain = [*before, *plain]
            [arguments, *tools], dicts, marking = mark_untrusted(self.tokenizer, context, plain)
            before, dicts = dicts[: len(before)], dicts[len(before) :]
            seam = self._find_seam(Stage(before, tools, arguments), ended, dicts)
        if isinstance(seam, NotExtendable):
            return seam
        if STAND_IN in seam.bridge and not any(STAND_IN in (m.content or "") for m in new):
            return NotExtendable(Rewrite.HISTORY, "earlier messages are repeated behind the turn")
        return self._encode(seam.bridge, marking, after=seam.stop)

    def outline(self, outline: Outline, new: Sequence[Message]) -> Outline:
        """The outline of a conversation that goes on with `new`."""
        return outline.followed_by(new, self.template.content_tests)

    def _find_seam(self, stage: Stage, ended: Ended, marked: Sequence[Json]) -> _Seam | NotExtendable:
        """The bridge's text, or why there is none. `marked` are the calls' names, then the new messages."""
        names, *new = marked
        named = zip(ended.message.tool_calls, names["names"], strict=True)
        calls = tuple(ToolCall(id=call.id, name=name, arguments=call.arguments) for call, name in named)
        try:
            probe = self._prober.probe(stage, replace(ended.message, tool_calls=calls), new)
            if self._preserve:
                return self._seam(ended, probe)
            seam = self._rewrite(stage, ended, probe) or self._seam(ended, probe)
            if isinstance(seam, _Seam):
                return self._misread(stage, ended.message, new, seam) or seam
        except TemplateRefused as error:
            return NotExtendable(Rewrite.REFUSED, str(error))
        return seam

    def _rewrite(self, stage: Stage, ended: Ended, probe: Probe) -> NotExtendable | None:
        """What the template would change of what the model saw and sampled; None where nothing."""
        followed, prompt = probe.followed, probe.prompt
        if not followed.startswith(prompt):
            closed = self.template.render(
                stage.before, stage.tools, stage.arguments, add_generation_prompt=False
            )
            if followed.startswith(closed):
                return NotExtendable(
                    Rewrite.GENERATION_PROMPT, "the turn no longer starts as its prompt ended"
                )
            return NotExtendable(
                Rewrite.HISTORY, "earlier messages are rendered differently once these follow"
            )
        if probe.reasoning and probe.reasoning not in followed:
            return NotExtendable(
                Rewrite.REASONING, "the turn's reasoning is not rendered once these messages follow"
            )
        if probe.content and probe.content not in followed:
            return NotExtendable(
                Rewrite.CONTENT, "the turn's text is not rendered once these messages follow"
            )
        if any(mark not in followed for mark in probe.calls):
            return NotExtendable(Rewrite.TOOL_CALLS, "the turn's tool calls are not rendered")
        if probe.is_woven:
            return NotExtendable(Rewrite.CONTENT, "the turn's text moves behind what follows its calls")
        if ended.message.reasoning == "":  # an empty thought has no text: compare how the turn opens
            opening, opened = (
                text[len(prompt) : min((text.index(m) for m in probe.sentinels if m in text), default=0)]
                for text in (followed, probe.last)
            )
            if opening != opened:
                return NotExtendable(
                    Rewrite.REASONING, "the turn's empty thought is not rendered once these follow"
                )
        return None

    def _seam(self, ended: Ended, probe: Probe) -> _Seam | NotExtendable:
        """Where the sampled text ends in `followed`, and with it the bridge."""
        if ended.in_reasoning and ended.stop_id is None:
            return self._thought_seam(probe)
        marks = [mark for mark in probe.sentinels if mark in probe.followed and mark in probe.last]
        if not marks:
            return NotExtendable(
                Rewrite.CONTENT, "nothing of the turn is rendered once these messages follow"
            )
        tail = probe.followed[max(probe.followed.rindex(m) + len(m) for m in marks) :]
        last_tail = probe.last[max(probe.last.rindex(m) + len(m) for m in marks) :]
        closing = self._closing(tail, last_tail)
        special = self.tokenizer.special_tokens
        ends = [m.start() for m in self.tokenizer.control_pattern.finditer(closing) if m[0] in special]
        if ended.stop_id is not None:
            stop = self.tokenizer.token_text(ended.stop_id)
            if stop in closing:
                return _Seam(tail[closing.rindex(stop) + len(stop) :], stop)
            if not ends and tail.startswith(stop, len(closing)):  # it doubles as the next opener (GLM)
                return _Seam(tail[len(closing) + len(stop) :], stop)
            other = self.tokenizer.control_pattern.match(tail, len(closing))
            # A last turn ends with it, an earlier one otherwise.
            if not ends and stop in last_tail and other is not None:
                if not self._preserve:
                    return NotExtendable(
                        Rewrite.END_OF_TURN, f"{stop} becomes {other[0]} once messages follow"
                    )
                return _Seam(tail[other.end() :], stop)
            if not self._preserve:
                return NotExtendable(Rewrite.END_OF_TURN, f"the template does not end this turn with {stop}")
        # Cut by length or a stop string, or stopped by a token that this template does not write: close it.
        if not ends:
            return _Seam(tail[len(closing) :], None)
        if probe.content and not probe.calls:
            return _Seam(tail[ends[0] :], None)
        # Calls have closing tokens of their own, and some templates write an opener where none is asked for.
        known = (self.template.special_tokens.get("eos_token"), self._text_end)
        at = (closing.index(end) for end in known if end and closing.count(end) == 1)
        return _Seam(tail[next(at, ends[-1]) :], None)

    def _thought_seam(self, probe: Probe) -> _Seam | NotExtendable:
        """The bridge after a thought that was cut: the template closes the thought, then the turn."""
        thought, content, last, followed = probe.reasoning, probe.content, probe.last, probe.followed
        if thought and thought in followed:
            return _Seam(followed[followed.rindex(thought) + len(thought) :], None)
        if thought and content and thought in last and content in last and content in followed:
            closing = last[last.rindex(thought) + len(thought) : last.rindex(content)]
            return _Seam(closing + followed[followed.rindex(content) + len(content) :], None)
        return NotExtendable(Rewrite.REASONING, "the thought is not rendered once these messages follow")

    def _closing(self, tail: str, last_tail: str) -> str:
        """How the template closes a turn: what both texts begin with, no control token torn.

        Some close a last turn with other whitespace (Nemotron Nano 2), or write more of its calls once it is
        not the last (Apriel): then what both have from their first special token on.
        """
        closing = self._common(tail, last_tail)
        first, last_first = self._first_special(tail), self._first_special(last_tail)
        if first is None or first.end() <= len(closing):
            return closing
        if last_first is None:  # a last turn has no end at all
            rest, shown = last_tail[len(closing) :].strip(), tail[len(closing) : first.start()].strip()
            return tail[: first.start()] if shown == rest or (rest and shown.endswith(rest)) else closing
        if first[0] != last_first[0]:
            return closing
        return tail[: first.start()] + self._common(tail[first.start() :], last_tail[last_first.start() :])

    def _first_special(self, text: str) -> re.Match[str] | None:
        special = self.tokenizer.special_tokens
        return next((m for m in self.tokenizer.control_pattern.finditer(text) if m[0] in special), None)

    def _common(self, text: str, other: str) -> str:
        """What both begin with, no control token torn."""
        pairs = zip(text, other, strict=False)
        end = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
        for whole in (text, other):
            torn = (
                m.start() for m in self.tokenizer.control_pattern.finditer(whole) if m.start() < end < m.end()
            )
            end = next(torn, end)
        return text[:end]

    def _misread(
        self, stage: Stage, message: Message, new: Sequence[Json], seam: _Seam
    ) -> NotExtendable | None:
        """What the template makes of a turn that it may take for something else, rendered as it is.

        It may write an empty turn without its opening (functionary), or look for a text that the turn holds.
        """
        texts = [text for text in (message.content, message.reasoning) if text]
        is_empty = not texts and not message.tool_calls
        if not is_empty and not any(test in text for test in self.template.content_tests for text in texts):
            return None
        calls = tuple(ToolCall(id=call.id, name=call.name, arguments="{}") for call in message.tool_calls)
        turn = self.template.to_json(replace(message, tool_calls=calls))
        render, tools, arguments = self.template.render, stage.tools, stage.arguments
        prompt = render(stage.before, tools, arguments, add_generation_prompt=True)
        whole = render([*stage.before, turn, *new], tools, arguments, add_generation_prompt=True)
        if not whole.startswith(prompt):
            return NotExtendable(Rewrite.GENERATION_PROMPT, "the turn no longer starts as its prompt ended")
        end = (seam.stop or "") + seam.bridge
        shown = whole[len(prompt) : len(whole) - len(end)]
        if not whole[len(prompt) :].endswith(end) or any(text.strip() not in shown for text in texts):
            return NotExtendable(Rewrite.CONTENT, "the template takes the turn's text for something else")
        return None

    def _look_at_rounds(self) -> tuple[bool, str | None]:
        """Whether what follows a turn hangs on how many came before, and the token that ends a turn of text.

        Cohere's template numbers the calls.
        """
        call = ToolCall(id="probe0001", name=self._tool_name, arguments=json.dumps({"a": self._sentinel}))
        result = Message(role="tool", content="r", tool_call_id=call.id)
        user = Message(role="user", content="u")
        with_calls = [Message(role="assistant", tool_calls=(call,)), result]
        with_text = [Message(role="assistant", content=self._sentinel), user]
        after = [
            [self._bridge_after(user, rounds * num) for num in (2, 3)]
            for rounds in (with_text, with_calls, [*with_calls, *with_text])
        ]
        end = self._first_special(after[0][0] or "")
        return any(two != three for two, three in after), end and end[0]

    def _bridge_after(self, user: Message, rounds: Sequence[Message]) -> str | None:
        """What a template writes behind the last of some equal rounds."""
        messages = [self.template.to_json(m) for m in (user, *rounds)]
        try:
            text = self.template.render(messages, self._tools, {}, add_generation_prompt=True)
        except TemplateRefused:
            return None
        return text.rpartition(self._sentinel)[2]

    def _encode(self, text: str, marking: Marking, *, after: str | None) -> Rendered:
        """Encode text that stands after the control token `after`.

        It is encoded together with that token, which may swallow the space behind it, and the token's id
        taken off.
        """
        whole = (after or "") + text
        encode = self.tokenizer.encode
        ids = self.tokenizer.encode_marked(whole, marking.mark) if marking.mark else encode(whole)
        if after is not None:
            if ids[0] != self.tokenizer.id_of(after):
                raise TemplateRefused(f"the stop token {after!r} is not encoded as one token")
            ids = ids[1:]
        return Rendered(TokenRun(ids), text[-_TAIL_CHARS:].replace(marking.mark or "\0", ""), marking.found)
