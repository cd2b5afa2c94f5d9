"""The openai SDK, Responses: items replayed, or `previous_response_id`; the `stream` helper."""

import json

from openai import OpenAI
from tools import BASE_URL, FUNCTIONS, KEY, MODE, SCHEMAS, TASK, answer

client = OpenAI(base_url=BASE_URL, api_key=KEY)
tools = [
    {
        "type": "function",
        "name": name,
        "description": FUNCTIONS[name].__doc__,
        "parameters": schema,
        "strict": True,
    }
    for name, schema in SCHEMAS.items()
]
items = [{"role": "user", "content": TASK}]
previous = None


def respond():
    request = {
        "model": "policy",
        "instructions": "You are a helpful assistant.",
        "input": items,
        "tools": tools,
        "previous_response_id": previous,
    }
    if previous is None:
        del request["previous_response_id"]
    if MODE == "stream":
        with client.responses.stream(**request) as stream:
            for _ in stream:
                pass
            return stream.get_final_response()
    return client.responses.create(**request)


while True:
    response = respond()
    calls = [item for item in response.output if item.type == "function_call"]
    if not calls:
        answer(response.output_text)
        break
    results = [
        {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": str(FUNCTIONS[call.name](**json.loads(call.arguments))),
        }
        for call in calls
    ]
    if MODE == "previous":
        previous, items = response.id, results
    else:
        items += [*response.output, *results]
