"""openai-agents: an Agent with function tools; chat or responses, streamed or not."""

import asyncio

from openai import AsyncOpenAI
from tools import BASE_URL, KEY, MODE, TASK, add, answer, read_file

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=BASE_URL, api_key=KEY)
model_class = OpenAIResponsesModel if "responses" in MODE else OpenAIChatCompletionsModel
agent = Agent(
    name="helper",
    instructions="You are a helpful assistant.",
    model=model_class(model="policy", openai_client=client),
    tools=[function_tool(add), function_tool(read_file)],
)


async def main() -> None:
    if "stream" in MODE:
        result = Runner.run_streamed(agent, TASK)
        async for _ in result.stream_events():
            pass
    else:
        result = await Runner.run(agent, TASK)
    answer(result.final_output)


asyncio.run(main())
