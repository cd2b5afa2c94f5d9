"""An engine under contract, and a few lines of HTTP."""

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.model import model_sizes

PROMPT = [40, 41, 42, 43, 44, 45, 46, 47]
ON: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True}

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@dataclass
class Contracted:
    """An engine under contract, and the model directory that fits it."""

    url: str
    http: aiohttp.ClientSession
    model_dir: Path
    context_length: int

    @property
    def much(self) -> int:
        """More tokens than are sampled while a test looks on."""
        return self.context_length - 100

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.http.request(method, self.url + path, json=body) as response:
            is_json = response.content_type == "application/json"
            return response.status, await response.json() if is_json else await response.text()


def body(
    max_new_tokens: int = 8, /, *, prompt: list[int] = PROMPT, stream: bool = False, **params: Any
) -> Any:
    return {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": max_new_tokens, **ON, **params},
        "return_logprob": True,
        "stream": stream,
    }


async def events(engine: Contracted, request: Any) -> list[Any]:
    """The decoded events of a stream, [DONE] checked and left out."""
    async with engine.http.post(f"{engine.url}/generate", json=request) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        lines = [line.strip() async for line in response.content if line.strip()]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


@contextlib.asynccontextmanager
async def client_of(engine: Contracted) -> AsyncIterator[SGLangEngine]:
    vocab_size = model_sizes(engine.model_dir).vocab_size
    assert vocab_size is not None
    async with contextlib.aclosing(SGLangEngine(SGLangConfig(engine.url), vocab_size=vocab_size)) as client:
        yield client
