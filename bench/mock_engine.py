"""A mock engine: SGLang's `/generate` as cheap as it can be, so that what is measured is in front of it.

It samples nothing: every answer is the same scripted completion, with the counts of the request it answers.
It measures its own time per request, from the last byte of the request to the first of the answer. Two routes
are for the bench: `/times` (read and cleared) and `/last`, the ids of the last request as they were sent.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import cast

import msgspec
import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class Completion(msgspec.Struct):
    """The scripted completion: its ids, the last of them the stop token, and its text without that."""

    ids: list[int]
    text: str


class Engine:
    """What all connections share. `times_ns` are the engine's own times since they were last read."""

    def __init__(self, completion: Completion) -> None:
        ids = completion.ids
        triples = [[-0.25, token_id, None] for token_id in ids]
        self.times_ns: list[int] = []
        self.last = b"[]"
        answer = msgspec.json.encode(
            {
                "text": completion.text,
                "output_ids": ids,
                "meta_info": {
                    "id": "mock",
                    "finish_reason": {"type": "stop", "matched": ids[-1]},
                    "weight_version": "default",
                    "weight_versions": [{"version": "default", "start": 0, "end": len(ids)}],
                    "output_token_logprobs": triples,
                    "completion_tokens": len(ids),
                    "cached_tokens": 0,
                    "prompt_tokens": 0,
                },
            }
        )
        self._answer = answer.removesuffix(b"0}}")

    def generate(self, body: bytes) -> bytes:
        """The answer to one request; its ids are counted, not decoded."""
        start = body.index(b'"input_ids":[') + 12
        self.last = body[start : body.index(b"]", start) + 1]
        return self._answer + b"%d}}" % (self.last.count(b",") + 1)

    def question(self, path: bytes) -> bytes:
        """What is not a generation."""
        if path == b"/last":
            return self.last
        if path == b"/times":
            times, self.times_ns = self.times_ns, []
            return msgspec.json.encode(times)
        return b'{"model_path":"mock","weight_version":"default","data":[{"max_model_len":1048576}]}'


class Connection(asyncio.Protocol):
    """One client's connection: requests with a Content-Length, one after another."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._received = bytearray()
        self._end = self._body = 0
        self._path = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where answers go."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not of this class

    def data_received(self, data: bytes) -> None:
        """Answer when the request is complete."""
        self._received += data
        if not self._end and not self._read_head():
            return
        if len(self._received) < self._end:
            return
        started = time.perf_counter_ns()
        body = bytes(self._received[self._body : self._end])
        generates = self._path == b"/generate"
        answer = self._engine.generate(body) if generates else self._engine.question(self._path)
        head = _HEAD % len(answer)
        if generates:
            self._engine.times_ns.append(time.perf_counter_ns() - started)
        self._transport.write(head + answer)
        del self._received[: self._end]
        self._end = 0

    def _read_head(self) -> bool:
        """Find the request's path and its end, once its head is here."""
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._received[:end])
        self._path = head.split(b" ", 2)[1]
        _, found, length = head.lower().partition(b"content-length:")
        self._body = end + 4
        self._end = self._body + (int(length.split(b"\r\n", 1)[0]) if found else 0)
        return True


async def main(engine: Engine) -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(lambda: Connection(engine), "127.0.0.1", 0)
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    script = Path(sys.argv[1]).read_bytes()
    uvloop.run(main(Engine(msgspec.json.decode(script, type=Completion))))
