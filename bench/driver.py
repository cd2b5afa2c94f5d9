"""The agent's side: one session of tool turns over one raw connection, so cheap that it does not count.

Bodies are built before the clock starts; the assistant's message goes back as the bytes it came in, as an SDK
would send it.
"""

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Self

import fastokens
import msgspec
from msgspec import Raw

NEW_TOKENS = 580  # per turn: a sampled thought and call, a tool result and what the template adds
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Use this to {name.replace('_', ' ')} in the repository.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": f"The {key}."} for key in keys},
                "required": list(keys),
            },
        },
    }
    for name, keys in {
        "read_file": ("path", "start", "end"),
        "write_file": ("path", "content"),
        "search": ("pattern", "path"),
        "run_tests": ("path",),
    }.items()
]
_WORDS = [
    *("session", "turn", "branch", "prompt", "request", "template", "engine", "gateway", "token", "value"),
    *("result", "error", "path", "state", "record", "the", "a", "of", "and", "to", "in", "is", "for", "that"),
    *("with", "on", "as", "it", "be", "this", "from", "or", "by", "not", "are", "an", "if", "return", "when"),
]


class _Call(msgspec.Struct):
    id: str


class _Choice(msgspec.Struct):
    message: Raw


class _Reply(msgspec.Struct):
    choices: list[_Choice]


class _Calls(msgspec.Struct):
    tool_calls: list[_Call]


class Http:
    """One kept-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect to `http://HOST:PORT`."""
        host, _, port = url.removeprefix("http://").partition(":")
        return cls(*await asyncio.open_connection(host, int(port), limit=1 << 24))

    async def call(self, method: str, path: str, body: bytes = b"") -> bytes:
        """One request; raises `RuntimeError` unless the answer is a 200."""
        head = f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        _, _, length = answer.lower().partition(b"content-length:")
        content = await self._reader.readexactly(int(length.split(b"\r\n", 1)[0]))
        if b" 200 " not in answer[:16]:
            raise RuntimeError(f"{method} {path}: {answer[:64]!r} {content[:500]!r}")
        return content

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


class Texts:
    """Made-up source code of about a given number of tokens, the same in every run."""

    def __init__(self, tokenizer: fastokens.Tokenizer) -> None:
        lines = [self._line(random.Random(seed)) for seed in range(400)]
        self._per_line = len(tokenizer.encode("\n".join(lines)).ids) / len(lines)
        self.results = [msgspec.json.encode(self.of(NEW_TOKENS - 82, seed)) for seed in range(64)]

    @staticmethod
    def _line(rng: random.Random) -> str:
        words = " ".join(rng.choices(_WORDS, k=rng.randint(4, 9)))
        name, number = "_".join(rng.choices(_WORDS, k=2)), rng.randrange(10_000)
        return f'{rng.randrange(1, 900)}:    {name} = self.{rng.choice(_WORDS)}("{words}", {number})'

    def of(self, num_tokens: int, seed: int) -> str:
        """About `num_tokens` tokens of text."""
        rng = random.Random(seed)
        return "\n".join(self._line(rng) for _ in range(max(1, round(num_tokens / self._per_line))))


@dataclass(slots=True)
class Agent:
    """One session: an opening turn, then tool turns. `latencies_ns` are those of all turns so far."""

    http: Http
    session_id: str
    texts: Texts
    latencies_ns: list[int] = field(default_factory=list[int])
    _messages: bytes = b""
    _num_turns: int = 0

    async def open(self, first: str) -> None:
        """Send the long first message."""
        system = msgspec.json.encode({"role": "system", "content": "You are a careful programmer."})
        user = msgspec.json.encode({"role": "user", "content": first})
        self._messages = system + b"," + user
        await self.turn()

    async def turn(self) -> None:
        """Ask for a reply, and append it with the result of the call it makes."""
        start = b'{"model":"policy","tools":' + msgspec.json.encode(_TOOLS) + b',"messages":['
        path, body = f"/sessions/{self.session_id}/v1/chat/completions", start + self._messages + b"]}"
        started = time.perf_counter_ns()
        answer = await self.http.call("POST", path, body)
        self.latencies_ns.append(time.perf_counter_ns() - started)
        message = msgspec.json.decode(answer, type=_Reply).choices[0].message
        call_id = msgspec.json.decode(message, type=_Calls).tool_calls[0].id
        result = self.texts.results[self._num_turns % len(self.texts.results)]
        tool = b'{"role":"tool","tool_call_id":"%s","content":%s}' % (call_id.encode(), result)
        self._messages = b",".join((self._messages, message, tool))
        self._num_turns += 1
