"""Episodes as Ray tasks, on a small Ray of this machine's own."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rolloutkit import Served, agent, away, rollouts, until

import tokentape
from tokentape.errors import ConfigError, GatewayRefused
from tokentape.rollout import Episode, OnRay, onray
from tokentape.schema import SAMPLES

ray: Any = pytest.importorskip("ray", reason="needs the extra `ray`")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module", autouse=True)
def on_ray() -> Iterator[None]:
    environment = {"env_vars": {"PYTHONPATH": f"{Path(__file__).parents[2] / 'src'}:{Path(__file__).parent}"}}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env=environment,
    )
    yield
    ray.shutdown()


def make(name: str, notes: Path | None = None) -> Any:
    """An episode as a function of no module: Ray sends it by value."""

    async def episode(task: Any, episode: Episode) -> float:
        import aiohttp

        body = {"model": episode.model, "messages": [{"role": "user", "content": str(task)}]}
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{episode.base_url}/chat/completions", json=body) as answer,
        ):
            answer.raise_for_status()
        if notes is not None:
            with notes.open("a") as file:
                file.write(f"{episode.session_id} {os.getpid()}\n")
        first = episode.attempt == 1
        if name == "raise" and first:
            raise RuntimeError("the tool broke")
        if name == "late" and first:
            await asyncio.sleep(60)
        if name == "block" and first:
            time.sleep(60)  # noqa: ASYNC251
        if name == "die" and first:
            os._exit(7)
        if name == "hang":
            await asyncio.sleep(60)
        return float(episode.member)

    return episode


async def test_groups_are_references_to_arrow(served: Served, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    groups = await served.all(make("well", notes), range(6), group_size=2, concurrency=4, on=OnRay())
    assert all(group.complete for group in groups)
    assert all(isinstance(ref, ray.ObjectRef) for group in groups for ref in group.refs)
    assert str(os.getpid()) not in {line.split()[1] for line in notes.read_text().splitlines()}
    await served.check(groups)

    @ray.remote
    def rows(table: pa.Table) -> tuple[int, bool]:
        return table.num_rows, table.schema == SAMPLES

    assert await rows.remote(groups[0].refs[0]) == (1, True)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("raise", "episode_failed", "RuntimeError: the tool broke"),
        ("late", "episode_timeout", "not over after 4 s"),
        ("block", "episode_timeout", "its Ray task died"),
        ("die", "episode_failed", "its Ray task died"),
    ],
)
async def test_what_fails_is_typed_and_tried_again(served: Served, name: str, kind: str, said: str) -> None:
    (group,) = await served.all(make(name), ["t"], on="ray", deadline_s=4)
    assert group.complete
    assert [failure.kind for failure in group.failures] == [kind]
    assert said in group.failures[0].message
    await served.check([group])


async def test_a_task_that_dies_behind_its_finish_is_finished(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker goes when the gateway has the reward and the driver does not know."""

    def dying(settings: Any, attempt: Any) -> Any:
        from tokentape.rollout.control import Control

        async def samples(self: Any, session_id: str) -> Any:
            os._exit(7)

        Control.samples = samples
        return onray._perform(settings, attempt)

    runner = onray.RayRunner.__init__

    def init(self: Any, *arguments: Any) -> None:
        runner(self, *arguments)
        self._perform = ray.remote(num_returns=2, max_retries=0)(dying)

    monkeypatch.setattr(onray.RayRunner, "__init__", init)
    (group,) = await served.all(make("well"), ["t"], on="ray")
    assert group.complete
    assert group.failures == ()
    await served.check([group])


async def test_what_the_gateway_refuses_ends_the_run(served: Served) -> None:
    with pytest.raises(GatewayRefused, match=r"400.*temprature") as caught:
        await served.all(make("well"), ["t"], on="ray", session={"sampling": {"temprature": 1}})
    assert caught.value.code == 400


async def test_a_trainer_without_a_loop(served: Served) -> None:
    def train() -> list[int]:
        with served.rollouts(make("well"), range(3), group_size=2, concurrency=2, on="ray") as groups:
            return [group.table.num_rows for group in groups]

    assert await asyncio.to_thread(train) == [2, 2, 2]


async def test_a_run_goes_on(served: Served) -> None:
    first = await served.all(make("well"), range(4), group_size=2, concurrency=2, on="ray", run="r")
    second = await served.all(make("well"), range(4), group_size=2, concurrency=2, on="ray", run="r")
    assert {g.group_id: g.session_ids for g in first} == {g.group_id: g.session_ids for g in second}
    await served.check(second)


async def test_cancelling_stops_tasks(served: Served, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    async with served.rollouts(make("hang", notes), range(2), on="ray", concurrency=2):
        await until(lambda: notes.exists() and len(notes.read_text().splitlines()) == 2, 30)
        started = time.monotonic()
    assert time.monotonic() - started < 8
    await served.check([])


async def test_who_leaves_does_not_wait_for_a_gateway_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onray, "_CANCEL_S", 1.0)

    async def episode(task: Any, episode: Episode) -> float:
        raise RuntimeError

    async with away() as (url, asked):
        async with rollouts(episode, [0], url, gateway_timeout_s=60.0, on="ray"):
            await until(lambda: "DELETE" in "".join(asked), 30)
            started = time.monotonic()
        assert time.monotonic() - started < 8
        assert any(one.startswith("GET") for one in asked)  # the driver has looked for itself


async def test_commands_run_in_tasks_too(served: Served, tmp_path: Path) -> None:
    import sys

    script = agent(tmp_path, "turn(); print(0.5)")
    (group,) = await served.all([sys.executable, str(script)], ["t"], group_size=2, on="ray")
    assert group.rewards == [0.5, 0.5]
    await served.check([group])


async def test_tables_stay_in_the_object_store(served: Served) -> None:
    @ray.remote
    def make_table() -> pa.Table:
        return pa.table({"token_ids": pa.array(range(1_000_000), pa.int32())})

    async with served.rollouts(make("well"), [], on="ray") as groups:
        runner = groups._driver._runner
        ref = make_table.remote()
        ray.wait([ref])
        before = pa.total_allocated_bytes()
        (table,) = runner.resolve([ref])
        assert table.num_rows == 1_000_000
        assert pa.total_allocated_bytes() == before


def test_an_old_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.9.3")
    with pytest.raises(ConfigError, match=r"ray 2.49 or newer.*this is 2.9.3"):
        asyncio.run(_enter())


async def _enter() -> None:
    async with tokentape.rollouts(make("well"), [0], gateway="http://127.0.0.1:1", on="ray"):
        pass
