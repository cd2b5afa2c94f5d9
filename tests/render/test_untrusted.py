"""Text from outside cannot write control tokens, wherever in a request it stands."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from render_golden import TOOLS, Models, ends_of, says
from render_params import WITH_TOKENIZER, only

from tokentape.errors import RequestError
from tokentape.outline import Outline
from tokentape.render import Ended, Frame, Rendered, Renderer
from tokentape.testing import write_model_dir
from tokentape.types import Json, Message, ToolCall
from tokentape.untrusted import mark_untrusted

CLEAN = "ok"


def conversation(text: str, *, reply: str = "Hm.") -> list[Message]:
    call = ToolCall(id="call00001", name="get_time", arguments='{"tz": "CET"}')
    return [
        Message(role="system", content=f"S {text} s"),
        Message(role="user", content=f"U {text} u"),
        says(calls=[call]),
        Message(role="tool", content=f"R {text} r", tool_call_id="call00001"),
        says(reply),
        Message(role="user", content=text),
    ]


def tools(text: str) -> tuple[Json, ...]:
    """A tool with the text as name, description, key, value, default, wherever templates walk through."""
    schema = {
        "type": "object",
        "properties": {
            text: {"type": "string", "description": text, text: text, "enum": [text], "default": text},
            "nested": {"type": "object", "properties": {text: {"type": text}}, "items": {text: text}},
        },
        "required": [text],
        text: {text: text},
    }
    function = {"name": text, "description": text, "parameters": schema, text: text}
    return ({"type": "function", "function": function},)


def control_ids(renderer: Renderer, ids: Sequence[int]) -> Counter[int]:
    control = set(renderer.tokenizer.control_tokens.values())
    return Counter(i for i in ids if i in control)


def some_tokens(renderer: Renderer) -> list[str]:
    """Every control token but the hundreds that differ in a number alone."""
    tokens = sorted(renderer.tokenizer.control_tokens)
    numbered = [token for token in tokens if any(c.isdigit() for c in token)]
    return [token for token in tokens if token not in numbered] + numbered[:4]


@pytest.mark.parametrize("model", WITH_TOKENIZER)
def test_no_control_token_from_outside(models: Models, model: str) -> None:
    """Every control token at once in messages and tools: the control ids are those of a clean render."""
    renderer = models.renderer(model)
    everything = " ".join(some_tokens(renderer))
    clean = renderer.render(Frame(tools(CLEAN)), conversation(CLEAN))
    dirty = renderer.render(Frame(tools(everything)), conversation(everything))
    assert control_ids(renderer, dirty.run.ids) == control_ids(renderer, clean.run.ids)
    assert dirty.neutralised == tuple(sorted(some_tokens(renderer)))
    assert clean.neutralised == ()
    expected = renderer.tokenizer.decode(clean.run.ids)
    if "R ok r" in expected:  # Llama's tool results are JSON strings, SmolLM2 has no calls
        assert f"R {everything} r" in renderer.tokenizer.decode(dirty.run.ids)
    assert f"U {everything} u" in renderer.tokenizer.decode(dirty.run.ids)


@pytest.mark.parametrize(
    "model", only("qwen3-coder", "qwen3", "minimax-m2", "glm-4.7", "llama-3.1", "gpt-oss")
)
def test_each_control_token_alone_and_cut(models: Models, model: str) -> None:
    """As the whole of a string too, and without the brackets that a template may write around a string."""
    renderer = models.renderer(model)
    clean = control_ids(renderer, renderer.render(Frame(tools(CLEAN)), conversation(CLEAN)).run.ids)
    for token in some_tokens(renderer)[:12]:
        for text in (token, token[1:-1], token[1:], token[:-1], f"/{token[1:-1]}", token + token):
            if text in ("ok", "/") or not text:
                continue
            ids = renderer.render(Frame(tools(text)), conversation(text)).run.ids
            assert control_ids(renderer, ids) == clean, (token, text)


@pytest.mark.parametrize("model", only("qwen3-coder"))
def test_a_key_that_the_template_would_complete(models: Models, model: str) -> None:
    """Qwen3-Coder's template writes `<KEY>` for a schema's unknown keys."""
    renderer = models.renderer(model)
    parameters = {"type": "object", "properties": {"p": {"type": "string", "|im_end|": "x"}}}
    tool: Json = {"type": "function", "function": {"name": "t", "description": "d", "parameters": parameters}}
    rendered = renderer.render(Frame((tool,)), [Message(role="user", content="U")])
    tokens = [renderer.tokenizer.token_text(i) for i in rendered.run.ids]
    assert "<|im_end|>x</|im_end|>" in renderer.tokenizer.decode(rendered.run.ids)
    assert tokens.count("<|im_end|>") == 2
    assert rendered.neutralised == ("<|im_end|>",)


@pytest.mark.parametrize("model", WITH_TOKENIZER)
def test_no_control_token_in_a_bridge(models: Models, model: str) -> None:
    renderer = models.renderer(model, "preserve")
    everything = " ".join(some_tokens(renderer))
    call = ToolCall(id="call00001", name="get_time", arguments='{"tz": "CET"}')
    before = [Message(role="user", content="U")]
    stop_id = renderer.tokenizer.id_of(ends_of(model)[1])
    answers: list[Rendered] = []
    for text in (CLEAN, everything):
        result = Message(role="tool", content=f"R {text} r", tool_call_id="call00001")
        outline = renderer.outline(Outline(), before)
        answer = renderer.extend(Frame(TOOLS), outline, Ended(says(calls=[call]), stop_id), [result])
        assert isinstance(answer, Rendered)
        answers.append(answer)
    clean, dirty = answers
    assert control_ids(renderer, dirty.run.ids) == control_ids(renderer, clean.run.ids)
    assert f"R {everything} r" in renderer.tokenizer.decode(dirty.run.ids)
    assert (clean.neutralised, dirty.neutralised) == ((), tuple(sorted(some_tokens(renderer))))


@pytest.mark.parametrize("model", WITH_TOKENIZER)
def test_an_assistant_keeps_its_grammar_and_no_special_token(models: Models, model: str) -> None:
    renderer = models.renderer(model)
    special = renderer.tokenizer.special_tokens
    # `</think>` makes templates cut the text: a matter of their own
    grammar = [t for t in some_tokens(renderer) if t not in special and "think" not in t]
    specials = [t for t in some_tokens(renderer) if t in special]
    clean = control_ids(renderer, renderer.render(Frame(TOOLS), conversation(CLEAN)).run.ids)
    rendered = renderer.render(Frame(TOOLS), conversation(CLEAN, reply=" ".join([*specials, *grammar])))
    added = control_ids(renderer, rendered.run.ids) - clean
    assert {renderer.tokenizer.token_text(i): n for i, n in added.items()} == dict.fromkeys(grammar, 1)
    assert rendered.neutralised == tuple(sorted(specials))


def test_a_mark_that_no_text_has(tiny: Renderer) -> None:
    """The mark is the first noncharacter that the request does not contain; with none left, a refusal."""
    noncharacters = [chr(c) for c in range(0xFDD0, 0xFDF0)]
    for used in (noncharacters[:1], noncharacters[:-1]):
        text = "<|im_end|>" + "".join(used)
        rendered = tiny.render(Frame(), [Message(role="user", content=text)])
        assert tiny.tokenizer.decode(rendered.run.ids) == (
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert list(rendered.run.ids).count(tiny.tokenizer.id_of("<|im_end|>")) == 1  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="all 32 Unicode noncharacters") as error:
        tiny.render(Frame(), [Message(role="user", content="<|im_end|>" + "".join(noncharacters))])
    assert error.value.param == "messages"
    clean = tiny.render(Frame(), [Message(role="user", content="".join(noncharacters))])
    assert clean.neutralised == ()


def test_the_tail_shows_no_mark(tiny: Renderer) -> None:
    rendered = tiny.render(Frame(), [Message(role="user", content="<|im_end|>")])
    assert rendered.tail.endswith("user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n")


def test_what_has_no_control_token_is_handed_on_as_it_is(tiny: Renderer) -> None:
    messages: list[Json] = [{"role": "user", "content": "<|im_end"}]
    given: list[Any] = [list(TOOLS), messages]
    marked = mark_untrusted(tiny.tokenizer, *given)
    assert marked[0] is given[0]
    assert marked[1] is given[1]


def test_without_marking_the_checks_fail(tiny: Renderer) -> None:
    """The negative control: the same text, not marked."""
    text = tiny.template.render(
        [{"role": "user", "content": "<|im_end|>"}], None, {}, add_generation_prompt=True
    )
    clean = tiny.render(Frame(), [Message(role="user", content=CLEAN)])
    assert control_ids(tiny, tiny.tokenizer.encode(text)) != control_ids(tiny, clean.run.ids)


def test_template_arguments_are_untrusted_too(tmp_path: Path) -> None:
    write_model_dir(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_text("{{ date }}" + path.read_text())
    renderer = Renderer.from_dir(tmp_path)
    end = renderer.tokenizer.id_of("<|im_end|>")
    message = [Message("user", "hi")]
    clean = renderer.render(Frame(arguments={"date": "today"}), message)
    dirty = renderer.render(Frame(arguments={"date": "<|im_end|>"}), message)
    assert dirty.neutralised == ("<|im_end|>",)
    assert dirty.run.ids.count(end) == clean.run.ids.count(end)
    assert renderer.tokenizer.decode(dirty.run.ids).startswith("<|im_end|>")
