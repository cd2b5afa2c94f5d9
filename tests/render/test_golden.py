"""Golden: prompt + canonical completion + the bridge that `extend` finds is the full render, id by id."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from render_golden import (
    CASES,
    EXACT,
    KEPT,
    SEAM,
    TOOLS,
    Case,
    Models,
    end_of,
    ends_of,
    every_template,
    judge,
    reference_ids,
    says,
    split_at_end,
    text_of,
)
from render_params import ALL, only, shared
from render_strategies import conversations

from tokentape.errors import TemplateRefused
from tokentape.outline import Outline
from tokentape.render import Ended, Frame, Rendered, Renderer, Rewrite
from tokentape.types import Message, ToolCall

# Templates that keep the reasoning of turns with calls.
THINKS = ("qwen3.5", "glm", "gpt-oss", "minimax", "nemotron")
# SmolLM2's shows no calls, R1's never a turn as it was sampled; for Hermes 3 see below.
BRANCHES_EACH_TURN = ("smollm2", "deepseek-r1", "hermes-3")
HISTORIES = ("template", "preserve")
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


# -- the cases of docs/templates.md


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("model", ALL)
def test_golden(models: Models, model: str, history: str) -> None:
    renderer = models.renderer(model, history)
    outcomes: dict[str, str] = {}
    for name, case in CASES.items():
        try:
            outcomes[name] = judge(renderer, model, case, preserve=history == "preserve")
        except TemplateRefused:
            outcomes[name] = "no prompt"  # Hermes 3 has no prompt without tools
    if history == "preserve":
        assert set(outcomes.values()) <= {EXACT, SEAM, KEPT, "no prompt", Rewrite.REFUSED}
    assert {EXACT, SEAM} & set(outcomes.values()) or model == "deepseek-r1"


@pytest.mark.parametrize("history", HISTORIES)
def test_golden_of_the_tiny_model(tiny: Renderer, history: Any) -> None:
    renderer = Renderer(tiny.tokenizer, tiny.template, history=history)
    outcomes = {
        name: judge(renderer, "qwen", case, preserve=history == "preserve") for name, case in CASES.items()
    }
    rewritten = {"thought+text": "reasoning_dropped", "thought+text after call": "history_rewritten"}
    expected = rewritten if history == "template" else dict.fromkeys(rewritten, KEPT)
    assert outcomes == dict.fromkeys(CASES, EXACT) | expected


# -- conversations that nobody chose


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(
    "model",
    only(
        *(
            "qwen3",
            "qwen2.5",
            "qwen3-coder",
            "qwen3.5",
            "llama-3.1",
            "glm-4.7",
            "deepseek-v3.1",
            "deepseek-r1",
        ),
        *("smollm2", "gpt-oss", "minimax-m2", "kimi-k2", "mistral-small-3.2", "nemotron-3", "hermes-3"),
    ),
)
def test_golden_of_any_conversation(models: Models, model: str, history: str) -> None:
    renderer = models.renderer(model, history)
    seen: set[str] = set()

    @FEW
    @given(conversations())
    def run(case: Case) -> None:
        try:
            seen.add(judge(renderer, model, case, preserve=history == "preserve"))
        except TemplateRefused:
            seen.add("no prompt")

    run()
    assert seen != {"no prompt"}


@FEW
@given(case=conversations(), preserve=st.booleans())
def test_golden_of_any_conversation_with_the_tiny_model(tiny: Renderer, case: Case, preserve: bool) -> None:
    renderer = Renderer(tiny.tokenizer, tiny.template, history="preserve" if preserve else "template")
    judge(renderer, "qwen", case, preserve=preserve)


# -- many turns


def chain(renderer: Renderer, model: str, *, thinks: bool, num_turns: int = 8) -> int:
    """Play turns with canonical completions, each prompt extended; return how many needed no branch."""
    frame = Frame(TOOLS)
    messages = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="Weather in word1q?"),
    ]
    outline = renderer.outline(Outline(), messages)
    ids = list(renderer.render(frame, messages).run.ids)
    num_extended = 0
    for number in range(10, 10 + num_turns):
        calls = [ToolCall(id=f"call000{number}", name="get_weather", arguments=f'{{"city": "c{number}"}}')]
        reply = says(None, f"Thought {number}." if thinks else None, calls)
        new = [Message(role="tool", content=f"word{number}q, clear", tool_call_id=calls[0].id)]
        end = end_of(model, reply)
        answer = renderer.extend(frame, outline, Ended(reply, renderer.tokenizer.id_of(end)), new)
        whole = text_of(renderer, frame, [*messages, reply, *new])
        if isinstance(answer, Rendered):
            prompt = text_of(renderer, frame, messages)
            turn, found, _ = split_at_end(whole, f"word{number}q", ends_of(model))
            ids += reference_ids(renderer, (turn + found)[len(prompt) :]) + list(answer.run.ids)
            num_extended += 1
            assert whole.startswith(prompt)
            assert ids == reference_ids(renderer, whole) or renderer.tokenizer.decode(ids) == whole
        else:
            ids = list(renderer.render(frame, [*messages, reply, *new]).run.ids)
        messages += [reply, *new]
        outline = renderer.outline(outline, [reply, *new])
    assert len(outline.messages) < 8
    return num_extended


@pytest.mark.parametrize("model", shared([n for n in every_template() if n not in BRANCHES_EACH_TURN]))
def test_many_turns_need_no_branch(models: Models, model: str) -> None:
    assert chain(models.renderer(model), model, thinks=model.startswith(THINKS)) == 8


def test_many_turns_of_the_tiny_model(tiny: Renderer) -> None:
    assert chain(tiny, "qwen", thinks=True, num_turns=12) == 12


@pytest.mark.parametrize("model", only("hermes-3"))
def test_a_result_that_is_no_longer_the_last_is_rendered_otherwise(models: Models, model: str) -> None:
    """Hermes 3 writes a newline behind `</tool_response>` only once something follows."""
    assert chain(models.renderer(model), model, thinks=False) == 1


# -- completions without the template's end of turn


def closings(text: str, model: str) -> int:
    return sum(text.count(end) for end in set(ends_of(model)))


@pytest.mark.parametrize("content", ["It is sunny and", 'I look.\n{"name": "get_w', "One  \n"])
@pytest.mark.parametrize("model", ALL)
def test_a_text_cut_by_length_is_closed_once(models: Models, model: str, content: str) -> None:
    """The bridge begins with the template's own end of turn, which GLM's next opener is too."""
    renderer = models.renderer(model, "preserve")
    user = [Message(role="user", content="And word7q?")]
    before, reply = CASES["text"].before, says(content)
    frame = Frame(TOOLS)  # Hermes 3 has no prompt without tools
    answer = renderer.extend(frame, renderer.outline(Outline(), before), Ended(reply, None), user)
    assert isinstance(answer, Rendered)
    whole = text_of(renderer, frame, [*before, reply, *user])
    _, end, bridge = split_at_end(whole, "word7q", ends_of(model))
    assert renderer.tokenizer.decode(answer.run.ids) == end + bridge
    assert closings(renderer.tokenizer.decode(answer.run.ids).split("word7q")[0], model) == 1
