"""What most gateways do: render and tokenise the whole conversation again at every turn.

The floor's server with the conversation's state left out. `python rerender.py MODEL_DIR ENGINE_URL`.
"""

import sys
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import tokenizers
import uvloop
from aiohttp import web
from floor import Chat, generate, read_template, relay, serve


class _Request(msgspec.Struct):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []


def main(directory: Path, engine_url: str) -> None:
    """Run the server."""
    render = read_template(directory)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    decode = msgspec.json.Decoder(_Request).decode

    def make(client: aiohttp.ClientSession) -> Chat:
        async def chat(http: web.Request) -> web.Response:
            request = decode(await http.read())
            text = render(messages=request.messages, tools=request.tools, add_generation_prompt=True)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            answer = await generate(client, engine_url, msgspec.json.encode(ids)[1:-1])
            return relay(answer, len(ids))

        return chat

    uvloop.run(serve(make))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
