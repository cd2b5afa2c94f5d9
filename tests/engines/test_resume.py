"""`ResumingEngine`: an aborted generation goes on behind what was sampled, and nothing of it is lost."""

import asyncio
import contextlib
import dataclasses
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest

from tokentape.engines.base import EngineInfo, GenerateRequest, GenerateResult, TokenChunk
from tokentape.engines.local import LocalEngine
from tokentape.engines.resume import MAX_STALLS, ResumingEngine
from tokentape.engines.server import make_app, serve
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.errors import EngineAborted, EngineFailed
from tokentape.model import TINY_MODEL
from tokentape.testing import FakeEngine, Reply
from tokentape.types import Prompt, RoutedExperts, Sampling, Support, VersionSpan

PROMPT = [5, 6, 7]
STOP = 99


def span(version: str, start: int, end: int) -> VersionSpan:
    return VersionSpan(version, start, end)


def logprobs(ids: Sequence[int]) -> list[float]:
    return [-i / 64 for i in ids]


class Aborting:
    """Answers each call with the next of `parts`: ids, how it ends, and the weights."""

    def __init__(self, *parts: tuple[list[int], str, str], matched: int | None = None) -> None:
        self.parts = list(parts)
        self.requests: list[GenerateRequest] = []
        self.matched = matched
        self.before: Callable[[], None] = lambda: None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult]:
        self.requests.append(request)
        self.before()
        ids, finish, version = self.parts.pop(0)
        for part in [[i] for i in ids] if request.stream else [ids] if ids else []:
            yield TokenChunk(part, logprobs(part))
        spans = (span(version, 0, len(ids)),) if ids else ()
        matched = self.matched if finish == "stop" else None
        support = experts = None
        if request.capture_support:
            lengths, kept = array("i", [2] * len(ids)), array("i", [n for i in ids for n in (i, 0)])
            support = Support(lengths.tobytes(), kept.tobytes(), array("f", logprobs(ids)).tobytes())
        if request.experts_from is not None and ids:
            all_ids = request.prompt.to_list() + ids
            rows = bytes(all_ids[request.experts_from : -1])  # an expert per token, its own id
            experts = RoutedExperts(rows, "uint8", 1)
        yield GenerateResult(ids, logprobs(ids), finish, matched, spans, 3, support, experts)  # type: ignore[arg-type]

    async def interrupt(self) -> None: ...

    async def info(self) -> EngineInfo:
        return EngineInfo("m", None, "default")

    async def aclose(self) -> None: ...


def request(*, stream: bool = False, **fields: Any) -> GenerateRequest:
    sampling = {k: fields.pop(k) for k in list(fields) if k in Sampling.__struct_fields__}
    return GenerateRequest(
        "r", Prompt.of(PROMPT), Sampling(**{"max_tokens": 8, **sampling}), stream, **fields
    )


async def run(engine: ResumingEngine, asked: GenerateRequest) -> tuple[list[TokenChunk], GenerateResult]:
    chunks: list[TokenChunk] = []
    async with contextlib.aclosing(engine.generate(asked)) as parts:
        async for part in parts:
            if isinstance(part, GenerateResult):
                result = part
            else:
                chunks.append(part)
    assert [i for c in chunks for i in c.ids] == result.completion_ids
    assert [x for c in chunks for x in c.logprobs] == result.logprobs
    return chunks, result


def resuming(engine: Any, resumed: list[None] | None = None) -> ResumingEngine:
    seen = resumed if resumed is not None else []
    return ResumingEngine(engine, stop_ids=frozenset({STOP}), on_resume=lambda: seen.append(None))


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@both
async def test_the_rest_is_asked_behind_what_was_sampled(stream: bool) -> None:
    engine = Aborting(
        ([11, 12], "abort", "1"),
        ([], "abort", "1"),
        ([13], "abort", "2"),
        ([14, STOP], "stop", "2"),
        matched=STOP,
    )
    resumed: list[None] = []
    asked = request(stream=stream, temperature=0.5)
    _, result = await run(resuming(engine, resumed), asked)
    assert result.completion_ids == [11, 12, 13, 14, STOP]
    assert result.logprobs == logprobs([11, 12, 13, 14, STOP])
    assert result.versions == (span("1", 0, 2), span("2", 2, 5))
    assert (result.finish_reason, result.matched, result.num_cached_tokens) == ("stop", STOP, 3)
    assert len(resumed) == 3
    assert [r.prompt.to_list() for r in engine.requests] == [
        PROMPT,
        [*PROMPT, 11, 12],
        [*PROMPT, 11, 12],
        [*PROMPT, 11, 12, 13],
    ]
    assert [r.sampling.max_tokens for r in engine.requests] == [8, 6, 6, 5]
    assert {r.sampling.temperature for r in engine.requests} == {0.5}
    assert len({r.rid for r in engine.requests}) == 4


async def test_what_was_captured_is_aligned() -> None:
    engine = Aborting(([11, 12], "abort", "1"), ([13, STOP], "stop", "2"), matched=STOP)
    _, result = await run(resuming(engine), request(capture_support=True, experts_from=1))
    assert result.routed_experts == RoutedExperts(bytes([*PROMPT, 11, 12, 13][1:]), "uint8", 1)
    assert result.support is not None
    assert array("i", result.support.ids).tolist() == [11, 0, 12, 0, 13, 0, STOP, 0]
    assert array("f", result.support.logprobs).tolist() == logprobs([11, 12, 13, STOP])


@pytest.mark.parametrize(
    ("ids", "finish", "matched"), [([11, STOP], "stop", STOP), ([1, 2, 3, 4, 5, 6, 7, 8], "length", None)]
)
async def test_one_that_was_done_is_not_resumed(ids: list[int], finish: str, matched: int | None) -> None:
    """An engine that is told to abort as the last token comes says "abort" all the same."""
    engine = Aborting((ids, "abort", "1"))
    _, result = await run(resuming(engine), request())
    assert (result.completion_ids, result.finish_reason, result.matched) == (ids, finish, matched)


STATEFUL: list[dict[str, Any]] = [
    {"json_schema": "{}"},
    {"structural_tag": "{}"},
    {"stop": ("x",)},
    {"frequency_penalty": 0.5},
    {"presence_penalty": -0.5},
    {"repetition_penalty": 1.1},
]


@pytest.mark.parametrize("sampling", STATEFUL, ids=lambda s: next(iter(s)))
async def test_where_the_ids_are_not_all_the_turn_begins_again(sampling: dict[str, Any]) -> None:
    engine = Aborting(([11, 12], "abort", "1"), ([13, STOP], "stop", "2"), matched=STOP)
    _, result = await run(resuming(engine), request(**sampling))
    assert (result.completion_ids, result.versions) == ([13, STOP], (span("2", 0, 2),))
    assert [r.prompt.to_list() for r in engine.requests] == [PROMPT, PROMPT]
    engine = Aborting(([], "abort", "1"), ([13, STOP], "stop", "2"), matched=STOP)
    assert (await run(resuming(engine), request(stream=True, **sampling)))[1].completion_ids == [13, STOP]
    engine = Aborting(([11, 12], "abort", "1"))
    with pytest.raises(
        EngineAborted, match="send the request again"
    ) as raised:  # two tokens are with the reader
        await run(resuming(engine), request(stream=True, **sampling))
    assert (raised.value.num_tokens, raised.value.retryable) == (2, True)


async def test_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentape.engines.resume._STALL_S", 1e-4)
    engine = Aborting(*[([11], "abort", "1")] + [([], "abort", "1")] * 20)
    with pytest.raises(EngineAborted, match=f"{MAX_STALLS} times"):
        await run(resuming(engine), request())
    assert len(engine.requests) == 1 + MAX_STALLS


async def test_a_failure_is_no_abort() -> None:
    engine = resuming(FakeEngine(EngineFailed("broken"), responder=lambda _: Reply([1, STOP])))
    with pytest.raises(EngineFailed, match="broken"):
        await run(engine, request())


@both
async def test_a_pause_holds_what_runs_and_what_comes(stream: bool) -> None:
    fake = FakeEngine(responder=lambda r: Reply([20 + len(r.prompt) + n for n in range(5)], delay_s=0.02))
    engine = resuming(fake)
    running = asyncio.create_task(run(engine, request(stream=stream, max_tokens=5)))
    await asyncio.sleep(0.05)
    await engine.pause()
    assert (engine.paused, engine.num_running) == (True, 0)
    late = asyncio.create_task(run(engine, dataclasses.replace(request(max_tokens=5), rid="late")))
    await asyncio.sleep(0.05)
    assert (len(fake.requests), running.done(), late.done()) == (1, False, False)
    fake._info = EngineInfo("m", None, "2")
    engine.resume()
    (_, first), (_, second) = await asyncio.gather(running, late)
    cut = first.versions[0].end
    assert 0 < cut < 5
    assert [v.version for v in first.versions] == ["default", "2"]
    assert fake.requests[1].prompt.to_list() == PROMPT + first.completion_ids[:cut]
    assert len(first.completion_ids) == len(second.completion_ids) == 5
    assert second.versions == (span("2", 0, 5),)


async def test_announced_names_are_for_weights_without_one() -> None:
    engine = resuming(Aborting(([11], "length", "default"), ([12], "length", "own")))
    engine.version = "7"
    assert (await run(engine, request()))[1].versions == (span("7", 0, 1),)
    assert (await run(engine, request()))[1].versions == (span("own", 0, 1),)
    assert (await engine.info()).weight_version == "7"
    assert (await engine.reported()).weight_version == "default"


async def test_leaving_early_leaves_the_engine() -> None:
    fake = FakeEngine(responder=lambda _: Reply(range(1, 9), delay_s=0.01))
    engine = resuming(fake)
    async with contextlib.aclosing(engine.generate(request(stream=True))) as parts:
        await anext(parts)
    assert (fake.aborted, engine.num_running) == (["r"], 0)


async def test_a_seeded_draw_goes_on_as_if_nothing_had_been() -> None:
    """The embedded engine draws by the seed and the place, wherever the prompt ends."""
    local = await asyncio.to_thread(LocalEngine, TINY_MODEL)
    prompt = local.encode("<|im_start|>user\nTell a story.<|im_end|>\n<|im_start|>assistant\n")
    asked = GenerateRequest("a", Prompt.of(prompt), Sampling(max_tokens=64, seed=7, temperature=1.5), True)
    try:
        async with (
            serve(make_app(local)) as url,
            contextlib.aclosing(SGLangEngine(SGLangConfig(url), vocab_size=1024)) as engine,
        ):
            _, undisturbed = await run(resuming(engine), asked)
            resumed: list[None] = []
            disturbed, got = resuming(engine, resumed), list[TokenChunk]()
            async with contextlib.aclosing(disturbed.generate(dataclasses.replace(asked, rid="b"))) as parts:
                async for part in parts:
                    if isinstance(part, GenerateResult):
                        result = part
                        break
                    got.append(part)
                    if len(got) in (3, 9):
                        await disturbed.interrupt()
    finally:
        local.close()
    assert len(undisturbed.completion_ids) > 12
    assert resumed, "it was never interrupted: this run proves nothing"
    assert result.completion_ids == undisturbed.completion_ids


async def test_a_pause_does_not_wait_for_an_engine_that_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the request and answers no abort; the gateway asks again when all goes on."""
    monkeypatch.setattr("tokentape.engines.resume._GRACE_S", 0.05)

    class Paused(Aborting):
        left: list[str]

        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult]:
            if len(self.requests) == 0:
                self.requests.append(request)
                try:
                    await asyncio.sleep(60)
                finally:
                    self.left = [request.rid]
            async for part in super().generate(request):
                yield part

    paused = Paused(([11, STOP], "stop", "2"), matched=STOP)
    engine = resuming(paused)
    running = asyncio.create_task(run(engine, request()))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await engine.pause()
    assert (engine.num_running, running.done(), paused.left) == (0, False, ["r"])
    engine.resume()
    assert (await running)[1].completion_ids == [11, STOP]
    assert paused.requests[1].rid != paused.requests[0].rid
