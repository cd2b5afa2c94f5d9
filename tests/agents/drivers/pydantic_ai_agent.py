"""pydantic-ai: an Agent with plain tools over each of the three protocols, streamed or not."""

import asyncio

from pydantic_ai import Agent
from tools import BASE_URL, KEY, MODE, TASK, add, answer, read_file


def model():
    if "messages" in MODE:
        from anthropic import AsyncAnthropic
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        client = AsyncAnthropic(base_url=BASE_URL.removesuffix("/v1"), api_key=KEY)
        return AnthropicModel("policy", provider=AnthropicProvider(anthropic_client=client))
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model_class = OpenAIResponsesModel if "responses" in MODE else OpenAIChatModel
    return model_class("policy", provider=OpenAIProvider(base_url=BASE_URL, api_key=KEY))


agent = Agent(model(), instructions="You are a helpful assistant.", tools=[add, read_file])


async def watch(_context, events) -> None:
    async for _ in events:
        pass


async def main() -> None:
    handler = watch if "stream" in MODE else None
    answer((await agent.run(TASK, event_stream_handler=handler)).output)


asyncio.run(main())
