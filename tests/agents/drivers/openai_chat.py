"""The openai SDK, Chat Completions: `create`, or the helpers `stream` and `parse`."""

import json

from openai import OpenAI
from tools import BASE_URL, FUNCTIONS, KEY, MODE, SCHEMAS, TASK, answer

client = OpenAI(base_url=BASE_URL, api_key=KEY)
tools = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": FUNCTIONS[name].__doc__,
            "parameters": schema,
            "strict": True,
        },
    }
    for name, schema in SCHEMAS.items()
]
messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": TASK}]


def complete():
    request = {"model": "policy", "messages": messages, "tools": tools}
    if MODE == "stream":
        with client.chat.completions.stream(**request) as stream:
            kinds = {event.type for event in stream}
            assert "chunk" in kinds
            return stream.get_final_completion()
    call = client.chat.completions.parse if MODE == "parse" else client.chat.completions.create
    return call(**request)


while True:
    message = complete().choices[0].message
    messages.append(message)
    if not message.tool_calls:
        answer(message.content)
        break
    for call in message.tool_calls:
        result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
