"""LangGraph: langchain's `create_agent` graph over ChatOpenAI or ChatAnthropic, streamed or not."""

from langchain.agents import create_agent
from tools import BASE_URL, KEY, MODE, TASK, add, answer, read_file


def model():
    if "messages" in MODE:
        from langchain_anthropic import ChatAnthropic

        return ChatAnthropic(model="policy", base_url=BASE_URL.removesuffix("/v1"), api_key=KEY)
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model="policy",
        base_url=BASE_URL,
        api_key=KEY,
        use_responses_api="responses" in MODE,
        stream_usage=True,
    )


graph = create_agent(model(), [add, read_file], system_prompt="You are a helpful assistant.")
question = {"messages": [{"role": "user", "content": TASK}]}
if "stream" in MODE:
    said: dict[str, str] = {}
    for message, _ in graph.stream(question, stream_mode="messages"):
        if message.type == "AIMessageChunk":
            said[message.id] = said.get(message.id, "") + message.text
    answer(list(said.values())[-1])
else:
    answer(graph.invoke(question)["messages"][-1].text)
