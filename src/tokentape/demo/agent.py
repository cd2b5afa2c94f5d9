"""The demo's agent: an ordinary tool loop on the openai SDK. It knows nothing of tokens."""

from dataclasses import dataclass
from typing import Any

import msgspec
from openai import AsyncOpenAI

from tokentape.demo.task import CALCULATOR, SYSTEM, Question, calculator

MAX_TURNS = 6
MAX_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Episode:
    """What an episode came to: the last answer, None where the agent ran out of turns."""

    answer: str | None
    num_turns: int


async def solve(client: AsyncOpenAI, question: Question, *, seed: int) -> Episode:
    """Ask the policy until it answers without a tool call, running the calculator for it."""
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question.text},
    ]
    for turn in range(MAX_TURNS):
        completion = await client.chat.completions.create(
            model="policy",
            messages=messages,
            tools=[CALCULATOR],  # pyright: ignore[reportArgumentType]  # a plain dict, as most agents have it
            temperature=1.0,
            max_tokens=MAX_TOKENS,
            seed=seed + turn,
        )
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return Episode(message.content, turn + 1)
        for call in message.tool_calls:
            assert call.type == "function"  # noqa: S101  # narrows the SDK's union: no other tool was offered
            messages.append(
                {"role": "tool", "tool_call_id": call.id, "content": _answer(call.function.arguments)}
            )
    return Episode(None, MAX_TURNS)


def _answer(arguments: str) -> str:
    try:
        expression = msgspec.json.decode(arguments).get("expression")
    except msgspec.DecodeError:
        return "error: arguments are not JSON"
    return calculator(expression) if isinstance(expression, str) else "error: `expression` must be a string"
