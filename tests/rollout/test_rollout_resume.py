"""A run goes on after its driver, or its gateway, has died; no episode is there twice."""

import asyncio
import gc
import json
from pathlib import Path
from typing import Any

import pytest
from rolloutkit import Served, rollouts, solve, turn, until

from gatewaykit import gateway_for, sampled
from tokentape.errors import ConfigError, GatewayRefused, StoreError
from tokentape.rollout import Episode, Group
from tokentape.rollout.control import Control
from tokentape.rollout.journal import Journal
from tokentape.rollout.names import read
from tokentape.testing import FakeSGLang


async def some(served: Served, count: int, episode: Any = solve, **options: Any) -> list[Group]:
    """The first groups of a run, whose driver then stops."""
    taken: list[Group] = []
    async with served.rollouts(episode, range(8), group_size=2, run="r", **options) as groups:
        async for group in groups:
            taken.append(group)
            if len(taken) == count:
                break
    return taken


async def test_a_run_goes_on(served: Served, tmp_path: Path) -> None:
    options = {"journal": tmp_path / "j.jsonl", "concurrency": 4}
    first = await some(served, 3, **options)
    second = await some(served, 100, **options)
    assert {group.index for group in first} | {group.index for group in second} == set(range(8))
    twice = [group for group in second if group.index in {one.index for one in first}]
    assert [group.index for group in twice] == [first[-1].index]  # the one that was in hand
    assert twice[0].session_ids == first[-1].session_ids
    await served.check([*first[:-1], *second])
    assert await some(served, 100, **options) == []


async def test_without_a_journal_all_come_again(served: Served) -> None:
    first = await some(served, 100)
    requests = len(served.fake.requests)
    second = await some(served, 100)
    assert {g.group_id: g.session_ids for g in first} == {g.group_id: g.session_ids for g in second}
    assert len(served.fake.requests) == requests
    await served.check(second)


async def test_what_is_half_done_is_deleted(served: Served) -> None:
    gateway = served.gateway
    dead = await gateway.create(session_id="r.000001.0.1-00000000", group_id="r.000001")
    await gateway.chat(dead, [{"role": "user", "content": "half an episode"}])
    foreign = await gateway.create(session_id="r.mine")
    other = await gateway.create(session_id="r2.000001.0.1-00000000")
    groups = await some(served, 100)
    sessions = {s["session_id"] for s in await served.sessions()}
    assert {foreign, other} < sessions
    assert dead not in sessions
    assert len(sessions) == 2 + 16
    assert all(group.complete for group in groups)


async def test_a_second_one_of_an_episode_is_deleted(served: Served) -> None:
    (first,) = (await some(served, 1))[:1]
    again = f"{first.group_id}.0.9-ffffffff"
    await served.gateway.create(session_id=again)
    await served.gateway.ok("POST", f"/sessions/{again}/finish", {"reward": 9.0})
    groups = await some(served, 100)
    await served.check(groups)
    assert first.session_ids in [group.session_ids for group in groups]


async def test_what_outlives_a_driver_is_deleted(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """A task of an earlier driver whose session is made, and finished, when the new one has looked."""
    zombie = "r.000003.1.1-ffffffff"

    async def episode(task: Any, episode: Episode) -> float:
        if (episode.index, episode.member) == (7, 0):
            await served.gateway.create(session_id=zombie)
            await served.gateway.create(session_id="r.mine")
            await served.gateway.ok("POST", f"/sessions/{zombie}/finish", {"reward": 9.0})
        return await solve(task, episode)

    groups = await some(served, 100, episode)
    await served.gateway.ok("DELETE", "/sessions/r.mine")
    await served.check(groups)
    assert f"{zombie} (finished) is nobody's" in caplog.text


async def test_other_tasks_are_refused(served: Served, tmp_path: Path) -> None:
    await some(served, 2)
    with pytest.raises(ConfigError, match="another task"):
        _ = [g async for g in served.rollouts(solve, range(100, 108), group_size=2, run="r")]
    with pytest.raises(ConfigError, match="another group size"):
        _ = [g async for g in served.rollouts(solve, range(8), group_size=3, run="r")]
    assert {s["state"] for s in await served.sessions()} == {"finished"}


async def test_one_driver_at_a_time(served: Served, tmp_path: Path) -> None:
    options = {"run": "r", "journal": tmp_path / "j.jsonl"}
    async with served.rollouts(solve, range(2), **options):
        with pytest.raises(ConfigError, match="another driver"):
            async with served.rollouts(solve, range(2), **options):
                pass


class Lossy(Control):
    """The reply to some calls is lost: the gateway has done what was asked, and the caller does not know."""

    lost: int
    methods: tuple[str, ...]
    dying = False

    async def _ask(self, method: str, path: str, body: Any = None, **options: Any) -> bytes:
        from tokentape.errors import GatewayUnavailable

        received = await super()._ask(method, path, body, **options)
        what = path.rsplit("/", 1)[-1] if method == "POST" else method
        if what in self.methods and Lossy.lost > 0:
            Lossy.lost -= 1
            if self.dying:
                raise GatewayUnavailable("lost")
            received = await super()._ask(method, path, body, **options)
        return received


@pytest.mark.parametrize("call", ["sessions", "finish", "DELETE"])
async def test_a_lost_reply_is_asked_for_again(
    served: Served, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr("tokentape.rollout.start.Control", Lossy)
    monkeypatch.setattr(Lossy, "methods", (call,), raising=False)
    monkeypatch.setattr(Lossy, "lost", 3, raising=False)

    async def episode(task: Any, episode: Episode) -> float:
        await turn(episode)
        if episode.attempt == 1:
            raise RuntimeError
        return 1.0

    groups = await served.all(episode, range(3), group_size=2)
    assert all(group.complete for group in groups)
    await served.check(groups)


async def test_a_driver_that_dies_at_finish(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("tokentape.rollout.start.Control", Lossy)
        patched.setattr(Lossy, "methods", ("finish",), raising=False)
        patched.setattr(Lossy, "lost", 1, raising=False)
        patched.setattr(Lossy, "dying", True)
        with pytest.raises(Exception, match="lost"):
            await some(served, 100)
    done = {s["session_id"] for s in await served.sessions() if s["state"] == "finished"}
    assert done
    groups = await some(served, 100)
    assert done <= {session_id for group in groups for session_id in group.session_ids}
    await served.check(groups)


# CPython 3.11 forgets a connection that it accepts in the moment in which its server closes.
FORGOTTEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@FORGOTTEN
async def test_the_gateway_restarts_in_the_middle(
    fake: FakeSGLang, model_dir: Path, store: Path, unused_port: int
) -> None:
    fake.responder = lambda _: sampled("hello world", delay_s=0.02)
    taken: list[Group] = []

    async def consume() -> None:
        url = f"http://127.0.0.1:{unused_port}"
        async with rollouts(
            solve, range(20), url, group_size=2, concurrency=4, retries=0, gateway_timeout_s=30
        ) as groups:
            async for group in groups:
                taken.append(group)  # noqa: PERF401  # one by one, as a trainer does

    consumer = asyncio.create_task(consume())
    for count in (3, 8):
        async with gateway_for(fake.url, model_dir, store, port=unused_port):
            while len(taken) < count:
                await asyncio.sleep(0.02)
                assert not consumer.done()
        await asyncio.sleep(0.3)
    async with gateway_for(fake.url, model_dir, store, port=unused_port) as gateway:
        await consumer
        assert len(taken) == 20
        assert all(group.complete for group in taken)
        await Served(gateway, fake).check(taken)
    gc.collect()


@FORGOTTEN
async def test_the_engine_restarts_in_the_middle(served: Served) -> None:
    fake = served.fake
    taken: list[Group] = []

    async def episode(task: Any, episode: Episode) -> float:
        await asyncio.sleep(0.05)
        return await solve(task, episode)

    async def consume() -> None:
        async with served.rollouts(episode, range(20), group_size=2, concurrency=4, retries=0) as groups:
            async for group in groups:
                taken.append(group)  # noqa: PERF401

    consumer = asyncio.create_task(consume())
    await until(lambda: len(taken) > 3)
    await fake.aclose()
    await asyncio.sleep(1)
    assert not consumer.done()
    await fake.start()
    await consumer
    assert len(taken) == 20
    assert all(group.complete for group in taken)
    assert any(failure.outage for group in taken for failure in group.failures)
    await served.check(taken)
    gc.collect()


async def test_a_session_that_vanishes_ends_the_run(served: Served) -> None:
    async def episode(task: Any, episode: Episode) -> float:
        await turn(episode)
        if task == 3:
            await served.gateway.ok("DELETE", f"/sessions/{episode.session_id}")
        return 1.0

    with pytest.raises(GatewayRefused, match="404"):
        await served.all(episode, range(6), concurrency=2)
    assert {s["state"] for s in await served.sessions()} == {"finished"}


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


async def test_late_words_of_an_earlier_attempt_reach_no_one(served: Served) -> None:
    late: list[Any] = []

    async def episode(task: Any, episode: Episode) -> float:
        if episode.attempt == 1:
            late.append(episode)
            raise RuntimeError
        await turn(episode)
        with pytest.raises(Exception, match="404"):
            await turn(late[0], "from the grave")
        return 1.0

    (group,) = await served.all(episode, [0])
    assert group.table.num_rows == 1
    await served.check([group])


# -- names and journals


def test_names_are_read() -> None:
    assert read("run", "run.000012.3.1-0123abcd") == (12, 3)
    assert read("run", "run2.000012.3.1-0123abcd") is None
    assert read("run", "run.mine") is None
    assert read("run", "run.000012.3.1") is None


def test_a_journal_remembers(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, "r", 4) as journal:
        journal.mark(3)
        journal.mark(1)
    with path.open("ab") as file:
        file.write(b'{"deliv')  # a driver died while it wrote
    with Journal(path, "r", 4) as journal:
        assert journal.delivered == {1, 3}
        journal.mark(0)
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [
        {"delivered": 3},
        {"delivered": 1},
        {"delivered": 0},
    ]
    with pytest.raises(ConfigError, match="of run 'r' in groups of 4"):
        Journal(path, "r", 8)
    path.write_text("notes\n")
    with pytest.raises(ConfigError, match="not a journal"):
        Journal(path, "r", 4)
    with pytest.raises(ConfigError, match="No such file"):
        Journal(tmp_path / "no" / "j.jsonl", "r", 4)


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fileno: int) -> None:
        raise OSError(28, "No space left on device")

    with Journal(tmp_path / "j.jsonl", "r", 4) as journal:
        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(StoreError, match="No space left"):
            journal.mark(1)
        assert journal.delivered == set()
