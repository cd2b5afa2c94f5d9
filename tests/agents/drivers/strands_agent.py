"""strands: an Agent over OpenAIModel or AnthropicModel; it always streams."""

from strands import Agent, tool
from tools import BASE_URL, KEY, MODE, TASK, add, answer, read_file


def model():
    if MODE == "messages":
        from strands.models.anthropic import AnthropicModel

        arguments = {"base_url": BASE_URL.removesuffix("/v1"), "api_key": KEY}
        return AnthropicModel(client_args=arguments, model_id="policy", max_tokens=4096)
    from strands.models.openai import OpenAIModel

    return OpenAIModel(client_args={"base_url": BASE_URL, "api_key": KEY}, model_id="policy")


agent = Agent(
    model=model(),
    tools=[tool(add), tool(read_file)],
    system_prompt="You are a helpful assistant.",
    callback_handler=None,
)
answer(agent(TASK))
