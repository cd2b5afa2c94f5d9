"""Groups are delivered whole, or say what is missing and why."""

import asyncio
from typing import Any

import pyarrow as pa
import pytest
from rolloutkit import Served, rollouts, solve, turn, until

from gatewaykit import Gateway, gateway_for, sampled
from tokentape.errors import ConfigError, GatewayRefused, GatewayUnavailable, GroupFailed
from tokentape.invariants import check_samples
from tokentape.rollout import Episode, Result
from tokentape.schema import SAMPLES
from tokentape.testing import FakeSGLang

NESTED: dict[str, Any] = {}
NESTED["inside"] = NESTED


class Tensor:
    """One of two elements."""

    def __float__(self) -> float:
        raise ValueError("only one element tensors can be converted")


class Scalar:
    """A number that is none of Python's own, as NumPy's are."""

    def __float__(self) -> float:
        return 0.5


def odd(*given: Any) -> Result:
    """A result of whatever an agent puts into it."""
    return Result(*given)


async def test_every_group_is_whole(served: Served) -> None:
    groups = await served.all(solve, [f"task {n}" for n in range(6)], group_size=3, concurrency=5)
    assert sorted(group.index for group in groups) == list(range(6))
    for group in groups:
        assert group.complete
        assert group.task == f"task {group.index}"
        assert group.rewards == [0.0, 1.0, 2.0]
        assert isinstance(group.table, pa.Table)
        assert group.table.schema == SAMPLES
        assert check_samples(group.table.to_pylist()) == []
    await served.check(groups)


async def test_no_more_run_than_may(served: Served) -> None:
    running = most = 0

    async def episode(task: Any, episode: Episode) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await turn(episode)
        running -= 1
        return 0.0

    await served.all(episode, range(6), group_size=4, concurrency=3)
    assert most == 3


async def test_what_an_episode_returns_is_recorded(served: Served) -> None:
    async def episode(task: Any, episode: Episode) -> Result:
        reply = await turn(episode)
        turn_id = reply["tokentape"]["turn_id"]
        return Result(None, {"note": task}, {turn_id: 0.5}, {turn_id: 0.25})

    (group,) = await served.all(episode, ["x"])
    assert group.rewards == [None]
    (row,) = group.table.to_pylist()
    assert row["reward"] == 0.25
    assert row["turns"][0]["reward"] == 0.5
    (session,) = await served.sessions()
    assert session["metadata"]["note"] == "x"
    assert session["metadata"]["rollout"]["attempt"] == 1


async def test_sampling_and_limits_are_the_sessions(served: Served) -> None:
    async def episode(task: Any, episode: Episode) -> float:
        await turn(episode)
        with pytest.raises(Exception, match="400"):
            await turn(episode)
        return 1.0

    await served.all(episode, [0], session={"max_turns": 1, "sampling": {"temperature": 0.25}})
    assert served.fake.requests[0].sampling_params["temperature"] == 0.25


async def test_a_failed_attempt_is_tried_again_and_leaves_nothing(served: Served) -> None:
    async def episode(task: Any, episode: Episode) -> float:
        await turn(episode)
        if episode.attempt == 2:  # the first one's session is gone before, not only at the end of the run
            mine = {
                s["session_id"] for s in await served.sessions() if f".{episode.member}." in s["session_id"]
            }
            assert mine == {episode.session_id}
        if episode.attempt == 1 and episode.member == 1:
            raise RuntimeError("the tool broke")
        return 1.0

    (group,) = await served.all(episode, ["t"], group_size=3)
    assert group.complete
    (failure,) = group.failures
    assert (failure.kind, failure.member, failure.attempt) == ("episode_failed", 1, 1)
    assert failure.message == "RuntimeError: the tool broke"
    assert failure.session_id not in group.session_ids
    await served.check([group])


async def broken(task: Any, episode: Episode) -> float:
    await turn(episode)
    if task == "bad" and episode.member == 1:
        await asyncio.sleep(0.3)  # the others are finished before
        raise ValueError("never works")
    return 1.0


async def test_a_failed_group_is_dropped_with_its_reasons(served: Served) -> None:
    groups = await served.all(broken, ["good", "bad", "fine"], group_size=3)
    bad = next(group for group in groups if group.task == "bad")
    assert not bad.complete
    assert (bad.members, bad.table.num_rows) == ((), 0)
    assert [(f.kind, f.attempt) for f in bad.failures if f.member == 1] == [
        ("episode_failed", 1),
        ("episode_failed", 2),
    ]
    await served.check([group for group in groups if group.complete])


async def test_a_failed_group_is_kept_if_asked(served: Served) -> None:
    (group,) = await served.all(broken, ["bad"], group_size=3, on_failure="keep")
    assert not group.complete
    assert [member.member for member in group.members] == [0, 2]
    await served.check([group])


async def test_a_failed_group_ends_the_run_if_asked(served: Served) -> None:
    with pytest.raises(GroupFailed, match="never works") as caught:
        await served.all(broken, ["bad"], group_size=3, on_failure="raise")
    assert {failure.member for failure in caught.value.failures} == {1}
    assert {s["state"] for s in await served.sessions()} <= {"finished"}


@pytest.mark.parametrize(
    ("returned", "kind", "said"),
    [
        (None, "episode_result_wrong", "returned None"),
        ("0.5", "episode_result_wrong", "returned '0.5'"),
        (float("nan"), "episode_result_wrong", "not a finite number"),
        (Result(1.0, {"x": object()}), "episode_result_wrong", "cannot be sent"),
        (Result(1.0, {"rollout": 1}), "episode_result_wrong", "not the agent's"),
        (Result(1.0, {}, {"t-nobody": 1.0}), "episode_result_wrong", "turn_rewards"),
        (odd("0.5"), "episode_result_wrong", "a number, not '0.5'"),
        (odd(1.0, {}, {"t": "high"}), "episode_result_wrong", "a number, not 'high'"),
        (odd(1.0, None), "episode_result_wrong", "TypeError"),
        (Result(1.0, {"out": "\udcff"}), "episode_result_wrong", "cannot be sent"),
        (Result(1.0, NESTED), "episode_result_wrong", "cannot be sent"),
        pytest.param(10**400, "episode_result_wrong", "OverflowError", id="huge"),
        (Tensor(), "episode_result_wrong", "only one element"),
    ],
)
async def test_a_wrong_result_is_a_failure(served: Served, returned: Any, kind: str, said: str) -> None:
    async def episode(task: Any, episode: Episode) -> Any:
        await turn(episode)
        return returned

    (group,) = await served.all(episode, [0])
    assert [failure.kind for failure in group.failures] == [kind, kind]
    assert said in group.failures[0].message
    await served.check([])


async def test_rewards_may_be_of_other_number_types(served: Served) -> None:
    async def episode(task: Any, episode: Episode) -> Any:
        turn_id = (await turn(episode))["tokentape"]["turn_id"]
        return odd(Scalar(), {}, {turn_id: Scalar()}, {turn_id: None})

    (group,) = await served.all(episode, [0])
    assert group.rewards == [0.5]
    await served.check([group])


async def test_a_function_that_is_not_async_is_a_failure(served: Served) -> None:
    (group,) = await served.all(lambda task, episode: 1.0, [0], retries=0)
    assert [failure.kind for failure in group.failures] == ["episode_failed"]
    await served.check([])


async def test_an_episode_without_a_turn_is_a_failure(served: Served) -> None:
    async def episode(task: Any, episode: Episode) -> float:
        return 1.0

    (group,) = await served.all(episode, [0], retries=0)
    assert [failure.kind for failure in group.failures] == ["episode_empty"]
    await served.check([])


async def test_a_late_episode_is_stopped(served: Served) -> None:
    stopped: list[str] = []

    async def episode(task: Any, episode: Episode) -> float:
        await turn(episode)
        try:
            await asyncio.sleep(60 if episode.attempt == 1 else 0)
        except asyncio.CancelledError:
            stopped.append(episode.session_id)
            raise
        return 1.0

    (group,) = await served.all(episode, [0], deadline_s=0.5)
    assert group.complete
    assert [failure.kind for failure in group.failures] == ["episode_timeout"]
    assert group.failures[0].elapsed_s < 5
    assert stopped == [group.failures[0].session_id]
    await served.check([group])


async def test_an_episode_that_does_not_listen_is_left_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokentape.rollout.attempt._GRACE_S", 0.1)
    late: list[str] = []

    async def episode(task: Any, episode: Episode) -> float:
        for _ in range(8):
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue
        try:
            await turn(episode)
        except Exception as error:
            late.append(str(error))
            raise
        return 1.0

    (group,) = await served.all(episode, [0], deadline_s=0.2, retries=0)
    assert [failure.kind for failure in group.failures] == ["episode_timeout"]
    await asyncio.sleep(1)
    assert len(late) == 1
    assert "404" in late[0]
    await served.check([])


async def test_only_so_many_groups_wait(served: Served) -> None:
    begun: set[int] = set()

    async def episode(task: Any, episode: Episode) -> float:
        begun.add(episode.index)
        await turn(episode)
        return 1.0

    async with served.rollouts(episode, range(40), group_size=2, concurrency=4, ahead=3) as groups:
        await until(lambda: len(begun) == 5)  # two that run, three ahead
        await asyncio.sleep(0.3)
        taken = 0
        async for _ in groups:
            taken += 1
            await asyncio.sleep(0.01)
            assert len(begun) <= 5 + taken
    assert taken == 40


async def test_tasks_are_read_as_there_is_room(served: Served) -> None:
    read = 0

    def tasks() -> Any:
        nonlocal read
        while True:
            read += 1
            yield read

    async with served.rollouts(solve, tasks(), concurrency=2, ahead=1) as groups:
        async for group in groups:
            if group.index >= 5:
                break
    assert read < 12


async def test_cancelling_leaves_nothing_half_done(served: Served) -> None:
    open_turns = 0

    async def episode(task: Any, episode: Episode) -> float:
        nonlocal open_turns
        await turn(episode)
        open_turns += bool(task)
        await asyncio.sleep(60 if task else 0)
        return 1.0

    async def consume() -> None:
        async with served.rollouts(episode, [0, 1, 2], group_size=2, concurrency=6) as groups:
            async for _ in groups:
                pass

    consumer = asyncio.create_task(consume())
    await until(lambda: open_turns == 4)
    await asyncio.sleep(0.1)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert [s["state"] for s in await served.sessions()] == ["finished", "finished"]


async def test_a_loop_without_context_closes_itself(served: Served) -> None:
    async for group in served.rollouts(solve, range(3), group_size=2):
        assert group.complete
    await served.check_finished(6)


async def test_agents_get_their_sessions_own_key(fake: FakeSGLang, model_dir: Any, store: Any) -> None:
    keys: set[str] = set()
    fake.responder = lambda _: sampled("hello")

    async def episode(task: Any, episode: Episode) -> float:
        keys.add(episode.api_key)
        await turn(episode)
        return 1.0

    async with gateway_for(fake.url, model_dir, store, http={"api_key": "secret"}) as gateway:
        groups = [g async for g in rollouts(episode, range(2), gateway.url, api_key="secret")]
        assert all(group.complete for group in groups)
        assert len(keys) == 2
        assert "secret" not in keys
        with pytest.raises(GatewayRefused, match="401"):
            _ = [g async for g in rollouts(episode, range(2), gateway.url, api_key="wrong")]


async def test_a_gateway_that_is_away_ends_the_run(gateway: Gateway) -> None:
    with pytest.raises(GatewayUnavailable, match="no answer"):
        _ = [g async for g in rollouts(solve, [0], "http://127.0.0.1:1", gateway_timeout_s=0.5)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group_size": 0}, "group_size"),
        ({"run": "a.b"}, "letters, digits"),
        ({"journal": "x.jsonl"}, "run with a name"),
        ({"session": {"metadata": {}}}, "metadata is set here"),
        ({"on": "mars"}, "local, ray"),
        ({"gateway": "localhost:8000"}, "URL"),
    ],
)
def test_wrong_options_are_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rollouts(solve, [0], options.pop("gateway", "http://127.0.0.1:1"), **options)
    with pytest.raises(ConfigError, match="list of its words"):
        rollouts("python agent.py", [0], "http://127.0.0.1:1")


def test_a_trainer_without_a_loop(tmp_path: Any) -> None:
    import threading

    from gatewaykit import TOKENIZER
    from tokentape.testing import write_model_dir

    started, ended, url = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with FakeSGLang(TOKENIZER) as fake:
            fake.responder = lambda _: sampled("hello")
            model = write_model_dir(tmp_path, tokenizer=TOKENIZER, context_length=8192)
            async with gateway_for(fake.url, model, tmp_path / "s.sqlite") as gateway:
                url.append(gateway.url)
                started.set()
                await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert started.wait(20)
        with rollouts(solve, range(4), url[0], group_size=2) as groups:
            whole = [group for group in groups if group.complete]
        assert len(whole) == 4
        for group in rollouts(solve, range(100), url[0], group_size=2):
            assert group.table.num_rows == 2
            break
    finally:
        ended.set()
        thread.join()
