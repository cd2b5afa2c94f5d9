"""The outline: bounded, and as good as the whole conversation when the template is asked what follows."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from render_golden import TOOLS, Case, Models, end_of, says, tool
from render_params import only
from render_strategies import conversations

from tokentape.errors import TemplateRefused
from tokentape.outline import Outline
from tokentape.probe import Prober, Stage
from tokentape.render import Ended, Frame, NotExtendable, Rendered, Renderer
from tokentape.template import ChatTemplate
from tokentape.types import Json, Message, ToolCall


def everything(messages: Sequence[Message]) -> Outline:
    """The whole conversation in the outline's place."""
    return Outline(tuple(messages), tuple(range(len(messages))), tuple(messages))


def turn(rng: random.Random, number: int) -> list[Message]:
    calls = [
        ToolCall(id=f"call{number:02}{i:03}", name="get_time", arguments='{"tz": "CET"}')
        for i in range(rng.choice([0, 0, 1, 1, 2, 3]))
    ]
    reply = says(rng.choice([None, "Text."]) if calls else "Text.", rng.choice([None, "", "Thought."]), calls)
    results = [Message(role="tool", content=rng.choice(["", "12:30"]), tool_call_id=c.id) for c in calls]
    return [reply, *(results or [Message(role="user", content=rng.choice(["Go on.", "<tool_response>"]))])]


@pytest.mark.parametrize("seed", range(5))
def test_bounded_over_a_thousand_messages(tiny: Renderer, seed: int) -> None:
    rng = random.Random(seed)
    outline = Outline()
    lengths: list[int] = []
    num_messages = 0
    while num_messages < 1000:
        new = turn(rng, num_messages % 90)
        outline = tiny.outline(outline, new)
        num_messages += len(new)
        lengths.append(len(outline.messages))
    kinds = set(outline.kinds)
    transitions = set(zip(outline.kinds, outline.kinds[1:], strict=False))
    assert len(outline.messages) <= (len(transitions) + 1) * len(kinds)
    assert lengths[-1] < 400  # 1,000 messages of every kind in every order
    assert max(len(m.content or "") for m in outline.messages) < 200


def test_an_agent_s_loop_has_an_outline_of_one_round(tiny: Renderer) -> None:
    start = [Message(role="system", content="S"), Message(role="user", content="U")]
    outline = tiny.outline(Outline(), start)
    for number in range(500):
        call = ToolCall(id=f"c{number}", name="get_time", arguments="{}")
        result = Message(role="tool", content="r" * 9999, tool_call_id=call.id)
        outline = tiny.outline(outline, [says("Hm.", "Thought.", [call]), result])
    assert [m.role for m in outline.messages] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert outline.messages[-1].tool_call_id == "c499"  # a template may look the call up
    assert max(len(m.content or "") for m in outline.messages) < 12


MODELS = (
    *("qwen3", "qwen3.5", "qwen2.5", "glm-4.7", "llama-3.1", "deepseek-v3.1", "deepseek-r1", "gpt-oss"),
    *("minimax-m2", "kimi-k2", "mistral-small-3.2", "nemotron-3", "hermes-3", "smollm2"),
)


def check_same_answer(renderer: Renderer, model: str, case: Case) -> None:
    """`extend` says the same of the outline as of the real history."""
    frame = Frame(case.tools)
    try:
        renderer.render(frame, case.before)
    except TemplateRefused:
        return  # no model was ever asked that
    for stop in (end_of(model, case.reply), None):
        ended = Ended(case.reply, renderer.tokenizer.id_of(stop) if stop else None)
        short = renderer.extend(frame, renderer.outline(Outline(), case.before), ended, case.new)
        whole = renderer.extend(frame, everything(case.before), ended, case.new)
        assert isinstance(short, Rendered) == isinstance(whole, Rendered), (short, whole)
        if isinstance(short, NotExtendable) and isinstance(whole, NotExtendable):
            assert short.reason == whole.reason
        else:
            assert short == whole


@pytest.mark.parametrize("history", ["template", "preserve"])
@pytest.mark.parametrize("model", only(*MODELS))
def test_the_outline_is_as_good_as_the_history(models: Models, model: str, history: str) -> None:
    renderer = models.renderer(model, history)

    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(conversations(max_turns=8))
    def run(case: Case) -> None:
        check_same_answer(renderer, model, case)

    run()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(conversations(max_turns=10))
def test_the_outline_is_as_good_as_the_history_for_the_tiny_model(tiny: Renderer, case: Case) -> None:
    check_same_answer(tiny, "qwen", case)


def test_an_outline_that_forgets_is_caught(tiny: Renderer) -> None:
    """The negative control: an outline of nothing but the last message."""
    call = ToolCall(id="c1", name="get_time", arguments="{}")
    before = (
        Message(role="user", content="U"),
        says(None, "Thought.", [call]),
        Message(role="tool", content="r", tool_call_id="c1"),
    )
    ended = Ended(says("Text."), tiny.tokenizer.id_of("<|im_end|>"))
    new = [Message(role="user", content="V")]
    forgetful = tiny.extend(Frame(TOOLS), everything(before[-1:]), ended, new)
    assert isinstance(tiny.extend(Frame(TOOLS), everything(before), ended, new), NotExtendable)
    assert isinstance(forgetful, Rendered)


@pytest.mark.parametrize("model", only("mistral-small-3.2"))
@pytest.mark.parametrize("text", ["x", "y", "Go on."])
def test_a_stand_in_is_no_message_of_the_request(models: Models, model: str, text: str) -> None:
    """Mistral moves the tools to the user message that equals the last one."""
    renderer = models.renderer(model)
    case = Case(
        "", (Message(role="user", content="Hi"),), says("Text."), (Message(role="user", content=text),), TOOLS
    )
    check_same_answer(renderer, model, case)
    ended = Ended(case.reply, renderer.tokenizer.id_of("</s>"))
    answer = renderer.extend(Frame(TOOLS), renderer.outline(Outline(), case.before), ended, case.new)
    assert isinstance(answer, NotExtendable)


class CountingTemplate(ChatTemplate):
    """Counts what it renders."""

    num_chars = 0
    num_calls = 0

    def render(
        self,
        messages: Sequence[Json],
        tools: Sequence[Json] | None,
        arguments: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
    ) -> str:
        text = super().render(messages, tools, arguments, add_generation_prompt=add_generation_prompt)
        self.num_chars += len(text)
        self.num_calls += 1
        return text


def test_cost_does_not_grow_with_history(tiny: Renderer) -> None:
    template = CountingTemplate(tiny.template.source, {})
    renderer = Renderer(tiny.tokenizer, template)
    frame = Frame(tuple(tool(f"t{i}", city={"type": "string"}) for i in range(200)))
    outline = renderer.outline(Outline(), [Message(role="user", content="long " * 10_000)])
    costs: set[tuple[int, int]] = set()
    for number in range(100, 400):
        call = ToolCall(id=f"c{number}", name="get_time", arguments="{}")
        reply = says("Hm. " * 500, "Thought. " * 500, [call])
        new = [Message(role="tool", content="r" * 1000, tool_call_id=call.id)]
        template.num_chars = template.num_calls = 0
        answer = renderer.extend(frame, outline, Ended(reply, tiny.tokenizer.id_of("<|im_end|>")), new)
        assert isinstance(answer, Rendered)
        costs.add((template.num_calls, template.num_chars))
        outline = renderer.outline(outline, [reply, *new])
    assert len(costs) <= 6  # the first turns have a shorter outline, and what they ask first is kept
    assert max(costs) < (8, 16000)
    assert min(costs)[0] == 1  # what follows is all that is rendered anew


@pytest.mark.parametrize(
    "look",
    [
        "{{ m.tool_call_id }}",
        "{{ m.tool_call_id[:3] }}",
        "{{ m.tool_call_id|length }}",
        "{{ m|tojson }}",
        "{{ [m.tool_call_id]|join }}",
        "{% if m.tool_call_id == messages[0].content %}x{% endif %}",
    ],
)
def test_what_looks_at_ids_is_rendered_anew(tiny: Renderer, look: str) -> None:
    """Two turns that differ by the ids of their calls alone; a template that shows them, in any way."""
    body = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}LOOK<|im_end|>{% endfor %}"
    shy = body.replace(
        "LOOK", "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments|tojson }}{% endif %}"
    )
    shown = shy.replace("{{ m.role }}", "{{ m.role }}{% if m.role == 'tool' %}" + look + "{% endif %}")
    num_calls: list[int] = []
    for source in (shy, shown):
        template = CountingTemplate(source, {})
        prober = Prober(template, "ttsentinel", preserve=False)
        for number in (1, 22, 333):
            template.num_calls = 0
            call = ToolCall(f"c{number}", "f", "{}")
            before = [
                Message("user", "c22"),
                says("x", None, [call]),
                Message("tool", "r", None, (), call.id),
            ]
            stage = Stage.of(template, before, (), {})
            turn, new = says("y", None, [call]), [template.to_json(Message("tool", "s", None, (), call.id))]
            probe = prober.probe(stage, turn, new)
            plain = Prober(template, "ttsentinel", preserve=False)
            assert probe == plain.probe(replace(stage, key=None), turn, new)
            num_calls.append(template.num_calls - 3)
    assert num_calls[:3] == [5, 1, 1]  # the negative control: nobody looks, and two are kept
    assert num_calls[4:] == [3, 3]
