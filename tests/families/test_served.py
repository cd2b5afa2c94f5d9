"""Each family through the whole gateway: `--model` alone, calls read and typed, the next prompt exact."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gatewaykit import Agent, Json, assert_samples_match, gateway_for, seen_by
from tokentape.formats import detect
from tokentape.parse import ThinkTags
from tokentape.template import ChatTemplate
from tokentape.testing import FakeSGLang, Reply
from tokentape.types import Message, ToolCall

MODELS = Path(__file__).parents[2].parent / "shared" / "models"
USER: Json = {"role": "user", "content": "Weather in Paris?"}
TOOL: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "detailed": {"type": "boolean"},
                "note": {"type": "string"},
            },
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": "São Paulo", "days": 2, "detailed": True, "note": "42"}
STOPS = {  # what the model samples behind a call
    "deepseek": "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "glm": "<|observation|>",
    "gpt-oss": "<|call|>",
    "llama": "<|eot_id|>",
    "minimax": "[e~[",
    "qwen": "<|im_end|>",
}
REWRITTEN = ("deepseek-r1",)  # its template never renders a turn as it was sampled


@dataclass(frozen=True)
class Family:
    """A model's directory, and what it samples for a call."""

    directory: Path
    tokenizer: Tokenizer
    template: ChatTemplate
    stop: str

    @classmethod
    def of(cls, name: str) -> "Family":
        stop = next(text for family, text in STOPS.items() if name.startswith(family))
        tokenizer = Tokenizer.from_file(str(MODELS / name / "tokenizer.json"))
        return cls(MODELS / name, tokenizer, ChatTemplate.from_dir(MODELS / name), stop)

    def calls(self, *arguments: Json, reasoning: str | None) -> str:
        """A turn of calls as the template writes it, without its stop token."""
        calls = tuple(
            ToolCall(id=f"functions.get_weather:{n}", name="get_weather", arguments=json.dumps(each))
            for n, each in enumerate(arguments)
        )
        user = self.template.to_json(Message(role="user", content=USER["content"]))
        turn = self.template.to_json(Message(role="assistant", reasoning=reasoning, tool_calls=calls))
        prompt = self.template.render([user], [TOOL], {}, add_generation_prompt=True)
        whole = self.template.render([user, turn], [TOOL], {}, add_generation_prompt=False)
        if not whole.startswith(prompt):  # DeepSeek R1 opens a thought that its turns do not have
            prompt = whole[: whole.index("<｜tool▁calls▁begin｜>")]  # noqa: RUF001
        return whole[len(prompt) :].rstrip().removesuffix(self.stop)

    def sampled(self, text: str, stop: str, seed: int = 0) -> Reply:
        """The text in a split that its encoding would not give, and the stop token."""
        rng, ids = random.Random(seed), list[int]()
        while text:
            size = rng.randint(1, 9)
            ids += self.tokenizer.encode(text[:size], add_special_tokens=False).ids
            text = text[size:]
        return Reply([*ids, self.tokenizer.token_to_id(stop)])


def with_tokenizer() -> list[Any]:
    found = sorted(path.parent.name for path in MODELS.glob("*/tokenizer.json"))
    names = [name for name in found if name != "smollm2"]  # its template shows no calls
    if not names:
        return [pytest.param("", marks=pytest.mark.skip(reason=f"no reference models at {MODELS}"))]
    return [pytest.param(name, marks=pytest.mark.shared) for name in names]


@pytest.mark.parametrize("name", with_tokenizer())
async def test_a_call_its_result_and_an_answer(name: str, tmp_path: Path) -> None:
    family = Family.of(name)
    found = detect(family.template)
    has_reasoning = isinstance(found.format.reasoning, ThinkTags) or name == "gpt-oss"
    keeps_thoughts = has_reasoning and "deepseek" not in name
    text = family.calls(ARGUMENTS, reasoning="I should look." if keeps_thoughts else None)
    if name == "deepseek-r1":
        text = f"I should look.\n</think>\n\n{text}"
    reply = family.sampled(text, family.stop)
    assert family.tokenizer.decode(list(reply.ids)[:-1], skip_special_tokens=False) == text
    async with FakeSGLang(family.tokenizer, context_length=8192) as fake:
        fake.script(reply, family.sampled("It is sunny.", family.stop, seed=1))
        async with gateway_for(fake.url, family.directory, tmp_path / "store.sqlite") as gateway:
            session_id = await gateway.create()
            agent = Agent(gateway, session_id, {"tools": [TOOL], "max_tokens": 512})
            first = await agent.turn(USER, stream=True)
            message = first["choices"][0]["message"]
            [call] = message["tool_calls"]
            assert call["function"]["name"] == "get_weather"
            assert json.loads(call["function"]["arguments"]) == ARGUMENTS
            assert not message["content"]
            assert first["choices"][0]["finish_reason"] == "tool_calls"
            assert first["tokentape"]["parse"]["status"] == "ok"
            if keeps_thoughts or name == "deepseek-r1":
                assert message["reasoning_content"] == "I should look."
            second = await agent.turn(*agent.results())
            samples = await gateway.samples(session_id)
    assert_samples_match(seen_by(fake), samples, num_turns=2)
    reason = second["tokentape"]["branch_reason"]
    assert reason == ("generation_prompt_rewritten" if name in REWRITTEN else None)
    assert len(samples) == 1 + (name in REWRITTEN)


# -- a wrong format is noticed


async def served(tmp_path: Path, model_dir: Path, tokenizer: Tokenizer, text: str, **service: Any) -> Any:
    async with FakeSGLang(tokenizer, context_length=8192) as fake:
        end = tokenizer.token_to_id("<|im_end|>")
        fake.script(Reply([*tokenizer.encode(text).ids, end]))
        async with gateway_for(fake.url, model_dir, tmp_path / "store.sqlite", **service) as gateway:
            session_id = await gateway.create()
            reply = await gateway.chat(session_id, [USER], tools=[TOOL], max_tokens=512)
            metrics = (await gateway.ok("GET", "/metrics")).decode()
    return reply, metrics


def counted(metrics: str, name: str) -> dict[str, float]:
    lines = [line for line in metrics.splitlines() if line.startswith(f"tokentape_{name}_total")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines if '"' in line}


CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {json.dumps({"city": "Paris"})}}}\n</tool_call>'


async def test_another_family_s_call_is_told(
    tmp_path: Path, model_dir: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    reply, metrics = await served(tmp_path, model_dir, tokenizer, f"Sure. {CALL}", tool_format="glm")
    assert reply["choices"][0]["message"]["content"] == f"Sure. {CALL}"
    assert "tool_calls" not in reply["choices"][0]["message"]
    assert counted(metrics, "foreign_calls") == {"hermes": 1.0}
    text = caplog.text
    assert "the chat template writes tool calls as hermes reads them, not glm" in text
    assert "has a tool call of format hermes in its text; this gateway reads glm" in text


async def test_the_right_format_tells_nothing(
    tmp_path: Path, model_dir: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    reply, metrics = await served(tmp_path, model_dir, tokenizer, CALL)
    assert reply["choices"][0]["message"]["tool_calls"]
    assert counted(metrics, "foreign_calls") == {}
    assert "tool call of format" not in caplog.text
    assert "not glm" not in caplog.text


# -- ids that a template is particular about

SHORT_IDS = """{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content or '' }}
{%- for c in m.tool_calls or [] %}
{%- if c.id is undefined or c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif -%}
<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{%- elif m.role == 'tool' %}T:{{ m.tool_call_id }}:{{ m.content }}<|im_end|>
{%- else %}U:{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"""


async def test_call_ids_fit_the_template(tmp_path: Path, model_dir: Path, tokenizer: Tokenizer) -> None:
    """Mistral's raises on any id that is not nine letters and digits."""
    directory = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (directory / "chat_template.jinja").write_text(SHORT_IDS)
    async with FakeSGLang(tokenizer, context_length=8192) as fake:
        end = tokenizer.token_to_id("<|im_end|>")
        fake.script(Reply([*tokenizer.encode(CALL).ids, end]), Reply([*tokenizer.encode("Sunny.").ids, end]))
        async with gateway_for(fake.url, directory, tmp_path / "store.sqlite") as gateway:
            session_id = await gateway.create()
            agent = Agent(gateway, session_id, {"tools": [TOOL], "max_tokens": 512})
            await agent.turn(USER)
            [call] = agent.messages[-1]["tool_calls"]
            assert len(call["id"]) == 9
            assert call["id"].isalnum()
            second = await agent.turn(*agent.results())
            assert second["tokentape"]["branch_reason"] is None
            samples = await gateway.samples(session_id)
    assert_samples_match(seen_by(fake), samples, num_turns=2)
