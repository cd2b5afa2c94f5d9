"""An engine worker whose truth is known: it writes down what it samples before it sends any of it.

It serves SGLang's protocol through `FakeSGLang`. A line on its standard input says what goes wrong from now
on, and with which share of the requests: `{"mode": "cut", "share": 0.5}`; a mode is one of `GARBAGE` or
`LOSSES`, "slow" or "none". Its log has one JSON object a line (`truth.Generation`).
"""

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from truth import Generation

from tokentape.testing import FakeSGLang, Fault, Reply, byte_level_tokenizer
from tokentape.testing.generation import ReceivedRequest

_TOKENIZER = byte_level_tokenizer()
_VOCAB_SIZE = _TOKENIZER.get_vocab_size()
_NUM_PLAIN = _TOKENIZER.get_vocab_size(with_added_tokens=False)
_END = _TOKENIZER.token_to_id("<|im_end|>")
_WORDS = ("hello", "world", "the", "weather", "tool", "user", "name", "is", "of", "rain", "naïve", "数", "ok")
_TOKEN_S = (0.005, 0.03)  # seconds a token, drawn for each generation
_SLOWER = 10

GARBAGE = ("not_json", "shifted_ids", "logprob", "missing", "wrong_count", "outside")
"""Answers that contradict themselves: nothing of them may be exported."""
LOSSES = ("cut", "disconnect", "stall", "status", "abort", "error_event")
"""Answers that end too early: what was sent of them was sampled."""


class Sampler:
    """Makes completions up, unlike each other, and spoils them as it is told to."""

    def __init__(self, log: Path, seed: str, version: str) -> None:
        self.mode, self.share = "none", 0.0
        self._version = version
        self._rng = random.Random(seed)
        self._log = log.open("ab")
        self._log.write(b"\n")  # the process before may have been killed in the middle of a line

    def respond(self, received: ReceivedRequest) -> Reply | Fault:
        """What the fake answers; it is in the log by then."""
        rng = self._rng
        mode = self.mode if rng.random() < self.share else "none"
        ids = _split(_text(rng), rng)
        is_cut = rng.random() < 0.04
        if not is_cut:
            ids.append(_END)
        delay_s = rng.uniform(*_TOKEN_S) * (_SLOWER if mode == "slow" else 1)
        if mode == "outside":
            ids[rng.randrange(len(ids))] = _VOCAB_SIZE + 7
        logprobs = [-rng.expovariate(0.7) for _ in ids]
        finish = "length" if is_cut else None
        reply = Reply(ids, logprobs=logprobs, finish=finish, cached=0, delay_s=delay_s)
        params = received.sampling_params
        sampled = reply.sample(params["max_new_tokens"], params.get("stop_token_ids") or ())
        after = rng.randrange(len(sampled.ids))
        num_sound = _num_sound(mode, sampled.ids, after, stream=received.stream)
        self._write(received, sampled.ids, logprobs[: len(sampled.ids)], num_sound, mode)
        if mode in ("none", "slow", "outside"):
            return reply
        if mode == "missing":
            return Fault("missing", field="meta_info.output_token_logprobs", reply=reply)
        if mode == "status":
            return Fault("status", status=rng.choice((500, 503)), reply=reply)
        return Fault(mode, after=after, reply=reply)  # pyright: ignore[reportArgumentType]

    def _write(
        self, received: ReceivedRequest, ids: list[int], logprobs: list[float], num_sound: int, mode: str
    ) -> None:
        rid = received.rid.partition("-")[2]  # the gateway puts the length in front
        generation = Generation(rid, received.input_ids, ids, logprobs, self._version, num_sound, mode)
        self._log.write(generation.to_json() + b"\n")
        self._log.flush()  # a kill takes no more than this process


def _num_sound(mode: str, ids: Sequence[int], after: int, *, stream: bool) -> int:
    """How many of the tokens reach the gateway as they were sampled."""
    if mode in ("not_json", "missing", "status"):
        return 0
    if mode in ("shifted_ids", "logprob", "wrong_count"):
        return len(ids) - 1 if stream else 0  # the last event is the one that is spoiled
    if mode == "outside":
        at = next((at for at, i in enumerate(ids) if i >= _VOCAB_SIZE), len(ids))
        return at if stream or at == len(ids) else 0
    if mode in LOSSES:
        return after
    return len(ids)


def _text(rng: random.Random) -> str:
    """What a model might say: words, thoughts, calls, calls that are none."""
    said = " ".join([*rng.choices(_WORDS, k=rng.randrange(3, 12)), f"{rng.getrandbits(32):x}"])
    kind = rng.random()
    if kind < 0.1:
        said = f"<think>\n{said}\n</think>\n\nthe {rng.choice(_WORDS)}"
    if kind < 0.5:
        return said
    call = json.dumps({"name": "weather", "arguments": {"city": said, "n": rng.randrange(100)}})
    if kind > 0.95:
        call = call[:-2]
    text = f"<tool_call>\n{call}\n</tool_call>"
    return f"{text}\n{text}" if kind > 0.85 else text


def _split(text: str, rng: random.Random) -> list[int]:
    """Ids of a text as a model might sample them: about half of its tokens fall apart into bytes."""
    ids: list[int] = []
    for token_id in _TOKENIZER.encode(text).ids:
        if token_id >= _NUM_PLAIN or rng.random() < 0.5:
            ids.append(token_id)
        else:
            ids += [_TOKENIZER.token_to_id(symbol) for symbol in _TOKENIZER.id_to_token(token_id)]
    return ids


async def _obey(sampler: Sampler) -> None:
    """Take what is to go wrong from the standard input, until that ends."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        said = json.loads(line)
        sampler.mode, sampler.share = said["mode"], said["share"]


async def main(options: argparse.Namespace) -> None:
    """Serve until the standard input ends, or killed."""
    sampler = Sampler(options.log, options.seed, options.version)
    async with FakeSGLang(
        vocab_size=_VOCAB_SIZE,
        responder=sampler.respond,
        incremental=options.incremental,
        host=options.host,
        port=options.port,
    ) as fake:
        fake.weight_version = options.version
        print(f"listening on {fake.url}", flush=True)
        await _obey(sampler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--incremental", action="store_true")
    asyncio.run(main(parser.parse_args()))
