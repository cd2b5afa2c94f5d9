"""`EnginePool`: a session stays with its worker, a failing worker loses nothing but the work."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from tokentape.engines.base import GenerateRequest, GenerateResult, TokenChunk
from tokentape.engines.pool import EnginePool, PoolConfig, Worker
from tokentape.engines.resume import ResumingEngine
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.errors import (
    ContextOverflow,
    EngineDisconnected,
    EngineProtocolError,
    EngineUnavailable,
    NotFound,
    RequestError,
    WorkerNeeded,
)
from tokentape.testing import FakeSGLang, Fault, Reply
from tokentape.types import Prompt, Sampling

IDS = [11, 12, 13, 14, 15, 16]
FAST = PoolConfig(health_interval_s=0.05, health_timeout_s=0.2)


@contextlib.asynccontextmanager
async def pool_of(
    *fakes: FakeSGLang, config: PoolConfig = FAST, token_timeout_s: float = 5.0
) -> AsyncGenerator[EnginePool]:
    def make(url: str) -> SGLangEngine:
        settings = SGLangConfig(url, connect_timeout_s=1.0, token_timeout_s=token_timeout_s)
        return SGLangEngine(settings, vocab_size=32_000)

    pool = EnginePool([fake.url for fake in fakes], make, config)
    try:
        yield pool
    finally:
        await pool.aclose()


def request(
    rid: str, session: str = "", *, stream: bool = False, ids: int = 3, **sampling: object
) -> GenerateRequest:
    return GenerateRequest(
        rid,
        Prompt.of(range(1, ids + 1)),
        Sampling(max_tokens=20, **sampling),
        stream,
        session=session,  # type: ignore[arg-type]
    )


async def run(engine: EnginePool | ResumingEngine, call: GenerateRequest) -> tuple[list[int], GenerateResult]:
    """The tokens as a reader sees them, and the end."""
    seen: list[int] = []
    async with contextlib.aclosing(engine.generate(call)) as parts:
        async for part in parts:
            if isinstance(part, TokenChunk):
                seen += part.ids
            else:
                return seen, part
    raise AssertionError("no result")


def resuming(pool: EnginePool) -> ResumingEngine:
    return ResumingEngine(pool, on_resume=lambda: None)


async def until(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110  # any state, no event
            await asyncio.sleep(0.01)


async def test_sessions_stay_and_new_ones_go_to_the_least_loaded() -> None:
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a, b) as pool:
        a.responder = b.responder = lambda _: Reply(IDS, delay_s=0.03)
        await asyncio.gather(*(run(pool, request(f"r{i}", f"s{i}")) for i in range(8)))
        assert (len(a.requests), len(b.requests)) == (4, 4)
        assert sum(pool.num_sessions().values()) == 8
        first = {r.rid.rpartition("r")[2] for r in a.requests}
        for turn in range(3):
            await asyncio.gather(*(run(pool, request(f"t{turn}r{i}", f"s{i}")) for i in range(8)))
        assert {r.rid.rpartition("r")[2] for r in a.requests} == first


async def test_a_session_leaves_a_crowded_worker() -> None:
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a, b, config=PoolConfig(slack=2)) as pool:
        a.responder = b.responder = lambda _: Reply(IDS, delay_s=0.05)
        await asyncio.gather(*(run(pool, request(f"r{i}", "one")) for i in range(6)))
        assert (len(a.requests), len(b.requests)) == (3, 3)  # more than two more: the session has moved


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=500),
        Fault("status", status=503),
        Fault("disconnect"),
        Fault("not_json"),
        Fault("missing", field="meta_info.output_token_logprobs"),
        Fault("die"),
    ],
    ids=lambda fault: f"{fault.kind}{fault.status or ''}",
)
async def test_what_fails_before_a_token_is_asked_of_another(fault: Fault, stream: bool) -> None:
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a, b) as pool:
        a.script(fault)
        b.responder = lambda _: Reply(IDS)
        seen, result = await run(resuming(pool), request("r", "s", stream=stream))
        assert seen == result.completion_ids == IDS
        assert [r.rid for r in b.requests] == ["3-r-1"]
        assert sum(pool.moved.values()) == 1


async def test_garbage_at_the_end_of_a_whole_answer_is_never_shown() -> None:
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a, b) as pool:
        a.script(Fault("missing", field="meta_info.finish_reason", reply=Reply([1, 2, 3])))
        b.responder = lambda _: Reply(IDS)
        assert (await run(pool, request("r", "s")))[0] == IDS


@pytest.mark.parametrize("kind", ["disconnect", "cut", "stall", "die_in_the_middle"])
async def test_a_stream_goes_on_elsewhere_behind_its_tokens(kind: str) -> None:
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a, b, token_timeout_s=0.3) as pool:
        a.weight_version, b.weight_version = "1", "2"
        if kind == "die_in_the_middle":
            a.script(Reply(IDS, delay_s=0.1))
        else:
            a.script(Fault(kind, after=3, reply=Reply(IDS)))  # type: ignore[arg-type]
        b.responder = lambda r: Reply(IDS[len(r.input_ids) - 3 :])
        task = asyncio.create_task(run(resuming(pool), request("r", "s", stream=True)))
        if kind == "die_in_the_middle":
            await a.until(lambda: bool(a.requests) and len(a.requests[0].output_ids) >= 2)
            await a.kill()
        seen, result = await task
        assert seen == result.completion_ids == IDS
        kept = len(b.requests[0].input_ids) - 3
        assert b.requests[0].input_ids == [1, 2, 3, *IDS[:kept]]
        assert b.requests[0].sampling_params["max_new_tokens"] == 20 - kept
        assert [(v.version, v.start, v.end) for v in result.versions] == [("1", 0, kept), ("2", kept, 6)]
        assert 0 < kept < 6
        assert len(result.logprobs) == 6
        # What follows goes there, too.
        await run(resuming(pool), request("next", "s", stream=True))
        assert len(a.requests) == 1


@pytest.mark.parametrize("version", ["1", None], ids=["known", "changed on the way"])
async def test_weights_that_changed_on_the_way_are_not_guessed(version: str | None) -> None:
    class Lost(SGLangEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk | GenerateResult]:
            yield TokenChunk([11], [-0.5], None, "1")
            yield TokenChunk([12], [-0.5], None, version)
            raise EngineDisconnected("lost", num_tokens=2)

    async with FakeSGLang() as b, pool_of(b) as pool:
        lost = Lost(SGLangConfig("http://127.0.0.1:1"), vocab_size=100)
        pool._workers = {"lost": Worker("lost", lost), **pool._workers}
        b.responder = lambda _: Reply(IDS[2:])
        if version is None:
            with pytest.raises(EngineDisconnected):
                await run(resuming(pool), request("r", "s", stream=True))
            assert not b.requests
        else:
            assert (await run(resuming(pool), request("r", "s", stream=True)))[0] == IDS


async def test_garbage_behind_tokens_that_were_shown_fails() -> None:
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a, b) as pool:
        a.script(Fault("logprob", value=None, reply=Reply(IDS)))
        with pytest.raises(EngineProtocolError):
            await run(resuming(pool), request("r", "s", stream=True))
        assert not b.requests


async def test_the_callers_own_faults_are_told_once() -> None:
    async with FakeSGLang(context_length=10) as a, FakeSGLang() as b, pool_of(a, b) as pool:
        with pytest.raises(ContextOverflow):
            await run(pool, request("r", "s"))
        with pytest.raises(RequestError):
            await run(pool, request("r2", "s", stop_token_ids=(99_999,)))
        assert (len(b.requests), dict(pool.moved)) == (0, {})
        assert [w.state for w in pool.workers] == ["healthy", "healthy"]


async def test_a_worker_that_is_gone_is_ejected_and_comes_back() -> None:
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a, b) as pool:
        pool.watch()
        await a.kill()
        for index in range(4):
            await run(pool, request(f"r{index}", f"s{index}"))
        assert pool.workers[0].state == "ejected"
        assert len(b.requests) == 4
        assert sum(pool.moved.values()) == 1  # tried once, then known to be gone
        await a.start()
        await until(lambda: pool.workers[0].state == "healthy")
        await run(pool, request("again", "new"))
        assert len(a.requests) == 1
        assert pool.workers[0].num_ejections == 1


async def test_a_hung_worker_loses_what_it_runs() -> None:
    """It takes connections and says nothing: only the look at its health tells."""
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a, b, token_timeout_s=60) as pool:
        pool.watch()
        a.script(Fault("stall", after=2, reply=Reply(IDS)))
        b.responder = lambda r: Reply(IDS[len(r.input_ids) - 3 :])
        task = asyncio.create_task(run(resuming(pool), request("r", "s", stream=True)))
        await a.until(lambda: bool(a.requests) and len(a.requests[0].output_ids) >= 2)
        a.answering.clear()
        seen, _ = await asyncio.wait_for(task, 10)
        assert seen == IDS
        assert pool.workers[0].state == "ejected"


async def test_nobody_left() -> None:
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a, b) as pool:
        await a.kill()
        await b.kill()
        for _ in range(2):  # also when both are known to be gone
            with pytest.raises(EngineUnavailable):
                await run(pool, request("r", "s"))
        await b.start()  # nobody has looked yet, but one that is ill is better than none
        await run(pool, request("r3", "s"))


async def test_retries_are_bounded() -> None:
    async with contextlib.AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeSGLang()) for _ in range(5)]
        pool = await stack.enter_async_context(pool_of(*fakes, config=PoolConfig(retries=2)))
        for fake in fakes:
            fake.responder = lambda _: Fault("status", status=500)
        with pytest.raises(Exception, match="500"):
            await run(pool, request("r", "s"))
        assert sum(len(fake.requests) for fake in fakes) == 3


async def test_workers_come_and_go() -> None:
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a) as pool:
        with pytest.raises(WorkerNeeded):
            await pool.remove(a.url)
        with pytest.raises(NotFound):
            await pool.remove("http://127.0.0.1:1")
        with pytest.raises(RequestError):
            await pool.add("no url")
        with pytest.raises(EngineUnavailable):
            await pool.add("http://127.0.0.1:1")
        assert len(pool.workers) == 1
        await pool.add(b.url)
        a.responder = lambda _: Reply(IDS, delay_s=0.05)
        task = asyncio.create_task(run(pool, request("r", "s")))
        await a.until(lambda: bool(a.requests))
        await pool.remove(a.url)
        assert [w.state for w in pool.workers] == ["draining", "healthy"]
        await run(pool, request("r2", "s"))  # its session's next turn goes elsewhere already
        assert (await task)[0] == IDS
        assert [w.url for w in pool.workers] == [b.url]
        assert pool.num_sessions() == {b.url: 1}


async def test_a_worker_taken_away_in_the_middle() -> None:
    async with FakeSGLang() as a, FakeSGLang() as b, pool_of(a, b) as pool:
        a.script(Reply(IDS, delay_s=0.1))
        b.responder = lambda r: Reply(IDS[len(r.input_ids) - 3 :])
        task = asyncio.create_task(run(resuming(pool), request("r", "s", stream=True)))
        await a.until(lambda: bool(a.requests) and len(a.requests[0].output_ids) >= 2)
        await pool.remove(a.url, abort=True)
        assert (await task)[0] == IDS
        assert [w.url for w in pool.workers] == [b.url]


async def test_the_shortest_context_counts() -> None:
    async with FakeSGLang(context_length=100) as a, FakeSGLang(context_length=50) as b, pool_of(a, b) as pool:
        assert (await pool.info()).context_length == 50
        await b.kill()
        assert (await pool.info()).context_length == 100
        await a.kill()
        with pytest.raises(EngineUnavailable):
            await pool.info()
