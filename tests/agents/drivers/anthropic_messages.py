"""The anthropic SDK: `create`, the `stream` helper, and the beta tool runner, streamed or not."""

import anthropic
from tools import BASE_URL, FUNCTIONS, KEY, MODE, SCHEMAS, TASK, answer

client = anthropic.Anthropic(base_url=BASE_URL.removesuffix("/v1"), api_key=KEY)
request = {"model": "policy", "max_tokens": 4096, "system": "You are a helpful assistant."}
messages = [{"role": "user", "content": TASK}]
tools = [
    {"name": name, "description": FUNCTIONS[name].__doc__, "input_schema": schema}
    for name, schema in SCHEMAS.items()
]


def create():
    if MODE == "create":
        return client.messages.create(**request, messages=messages, tools=tools)
    with client.messages.stream(**request, messages=messages, tools=tools) as stream:
        for _ in stream:
            pass
        return stream.get_final_message()


def text_of(message):
    return "".join(block.text for block in message.content if block.type == "text")


def loop():
    while True:
        message = create()
        messages.append({"role": "assistant", "content": message.content})
        if message.stop_reason != "tool_use":
            return message
        results = [
            {
                "type": "tool_result",
                "tool_use_id": block.id,
                "content": str(FUNCTIONS[block.name](**block.input)),
            }
            for block in message.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})


@anthropic.beta_tool
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(FUNCTIONS["add"](a, b))


@anthropic.beta_tool
def read_file(path: str) -> str:
    """Read a text file."""
    return FUNCTIONS["read_file"](path)


if "runner" in MODE:
    is_stream = {"stream": True} if "stream" in MODE else {}
    threads = {"thread": False} if "whole" in MODE else {}  # whole: the full history in each request
    runner = client.beta.messages.tool_runner(
        **request, messages=messages, tools=[add, read_file], **is_stream, **threads
    )
    if is_stream:
        for stream in runner:
            for _ in stream:
                pass
            last = stream.get_final_message()
    else:
        last = runner.until_done()
else:
    last = loop()
answer(text_of(last))
