"""The floor: a gateway that does only what the protocol forces, in a straight line.

Decode the request once, tokenise the new text, splice its ids behind the session's (kept as JSON text), send,
relay. No store, no checks, no tree, no log-probabilities, one template's bridge hard-coded: nothing that has
to be right could be faster. `python floor.py MODEL_DIR ENGINE_URL`.
"""

import asyncio
import json
import secrets
import sys
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import fastokens
import msgspec
import uvloop
from aiohttp import web
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Raw

SAMPLING = b'],"sampling_params":{"max_new_tokens":4096},"return_logprob":true,"stream":false}'
Chat = Callable[[web.Request], Awaitable[web.Response]]


class _Message(msgspec.Struct):
    role: str
    content: str | None = None


class _Request(msgspec.Struct):
    messages: list[_Message]
    tools: Raw = Raw(b"[]")


class Answer(msgspec.Struct):
    """What is read of the engine's answer."""

    text: str
    output_ids: Raw


class _Call(msgspec.Struct):
    name: str
    arguments: Raw


@dataclass(slots=True)
class _Session:
    """`runs` are pieces of a JSON list of ids; `num_messages` are in them."""

    runs: list[bytes] = field(default_factory=list[bytes])
    num_messages: int = 0


def read_template(directory: Path) -> Callable[..., str]:
    """The model's chat template, as transformers would compile it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render


def relay(answer: Answer, num_prompt: int) -> web.Response:
    """The engine's answer in OpenAI's shape: thought, text and one tool call cut out of the text."""
    head, _, tail = answer.text.partition("<tool_call>\n")
    call = msgspec.json.decode(tail.partition("\n</tool_call>")[0], type=_Call)
    thought, _, content = head.partition("\n</think>\n\n")
    function = {"name": call.name, "arguments": bytes(call.arguments).decode()}
    message = {
        "role": "assistant",
        "content": content or None,
        "reasoning_content": thought.removeprefix("<think>\n"),
        "tool_calls": [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}],
    }
    reply = {
        "id": f"t-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}],
        "usage": {"prompt_tokens": num_prompt},
    }
    return web.Response(body=msgspec.json.encode(reply), content_type="application/json")


async def generate(client: aiohttp.ClientSession, url: str, ids_json: bytes) -> Answer:
    """One call of the engine; `ids_json` has no brackets."""
    body = b'{"input_ids":[' + ids_json + SAMPLING
    async with client.post(f"{url}/generate", data=body) as response:
        return msgspec.json.decode(await response.read(), type=Answer)


async def serve(make: Callable[[aiohttp.ClientSession], Chat]) -> None:
    """Serve a chat route until killed."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 20) as client:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/sessions/{session_id}/v1/chat/completions", make(client))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        print(f"listening on http://{host}:{port}", flush=True)
        await asyncio.Event().wait()


def _bridge(new: list[_Message]) -> str:
    """ChatML between a sampled `<|im_end|>` and the next generation, for tool results."""
    results = "".join(f"\n<tool_response>\n{message.content}\n</tool_response>" for message in new)
    return f"\n<|im_start|>user{results}<|im_end|>\n<|im_start|>assistant\n"


def main(directory: Path, engine_url: str) -> None:
    """Run the floor."""
    render = read_template(directory)
    encode = fastokens.Tokenizer.from_file(str(directory / "tokenizer.json")).encode_batch_flat
    decode = msgspec.json.Decoder(_Request).decode
    sessions: dict[str, _Session] = {}

    def opening(request: _Request) -> str:
        messages: list[dict[str, Any]] = msgspec.to_builtins(request.messages)
        return render(messages=messages, tools=msgspec.json.decode(request.tools), add_generation_prompt=True)

    def make(client: aiohttp.ClientSession) -> Chat:
        async def chat(http: web.Request) -> web.Response:
            request = decode(await http.read())
            session = sessions.setdefault(http.match_info["session_id"], _Session())
            new = request.messages[session.num_messages :]
            ids: array[int] = array("i")
            ids.frombytes(encode([_bridge(new) if session.runs else opening(request)])[0])
            session.runs.append(msgspec.json.encode(ids.tolist())[1:-1])
            answer = await generate(client, engine_url, b",".join(session.runs))
            session.runs.append(bytes(answer.output_ids)[1:-1])
            session.num_messages = len(request.messages) + 1
            return relay(answer, len(ids))

        return chat

    uvloop.run(serve(make))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
