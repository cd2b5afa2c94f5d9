"""What tests of rollouts share: an agent's turn, and what a store must look like afterwards."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

import tokentape
from gatewaykit import USER, Gateway
from tokentape.engines.server import serve
from tokentape.rollout import Episode, Group, Rollouts
from tokentape.testing import FakeSGLang


async def turn(episode: Episode, content: str = "hello") -> dict[str, Any]:
    """One turn of an agent."""
    body = {"model": episode.model, "messages": [{**USER, "content": content}]}
    headers = {"Authorization": f"Bearer {episode.api_key}"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{episode.base_url}/chat/completions", json=body, headers=headers) as answer,
    ):
        answer.raise_for_status()
        return await answer.json()


async def solve(task: Any, episode: Episode) -> float:
    await turn(episode, str(task))
    return float(episode.member)


def rollouts(episode: Any, tasks: Any, gateway: str, **options: Any) -> Rollouts:
    defaults: dict[str, Any] = {"retries": 1, "deadline_s": 10.0, "gateway_timeout_s": 10.0, "journal": False}
    return tokentape.rollouts(episode, tasks, gateway=gateway, **{**defaults, **options})


@dataclass
class Served:
    """A gateway and its engine."""

    gateway: Gateway
    fake: FakeSGLang
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def rollouts(self, episode: Any, tasks: Any, **options: Any) -> Rollouts:
        return rollouts(episode, tasks, self.gateway.url, **{**self.options, **options})

    async def all(self, episode: Any, tasks: Any, **options: Any) -> list[Group]:
        async with self.rollouts(episode, tasks, **options) as groups:
            return [group async for group in groups]

    async def sessions(self) -> list[dict[str, Any]]:
        return (await self.gateway.ok("GET", "/sessions?limit=1000"))["sessions"]

    async def check_finished(self, count: int) -> None:
        assert [s["state"] for s in await self.sessions()] == ["finished"] * count

    async def check(self, groups: Sequence[Group]) -> None:
        """The store has these groups' episodes, finished, and nothing else; each has all its samples."""
        sessions = await self.sessions()
        assert {s["state"] for s in sessions} <= {"finished"}
        assert sorted(s["session_id"] for s in sessions) == sorted(i for g in groups for i in g.session_ids)
        counts = Counter(tuple(s["session_id"].split(".")[:3]) for s in sessions)
        assert set(counts.values()) <= {1}
        for group in groups:
            rows = group.table.to_pylist()
            assert [row["session_id"] for row in rows] == group.session_ids
            assert [row["reward"] for row in rows] == group.rewards
            assert {row["group_id"] for row in rows} <= {group.group_id}


@contextlib.asynccontextmanager
async def away() -> AsyncGenerator[tuple[str, list[str]]]:
    """A gateway that is away as soon as it has opened a session: its URL, and what it did not answer."""
    asked: list[str] = []

    async def create(request: web.Request) -> web.Response:
        return web.json_response({"session_id": "x", "base_url": "http://127.0.0.1:1"})

    async def list_sessions(request: web.Request) -> web.Response:
        return web.json_response({"sessions": [], "has_more": False})

    async def refuse(request: web.Request) -> web.Response:
        asked.append(f"{request.method} {request.path.rpartition('/')[2]}")
        return web.Response(status=503)

    app = web.Application()
    app.add_routes([web.post("/sessions", create), web.get("/sessions", list_sessions)])
    app.add_routes([web.route("*", "/sessions/{rest:.+}", refuse)])
    async with serve(app, "127.0.0.1", 0, drain_s=1.0) as url:
        yield url, asked


async def until(condition: Callable[[], Any], within_s: float = 10.0) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def agent(tmp_path: Path, code: str) -> Path:
    """A command's script; `turn()` in it takes a turn and returns the task."""
    path = tmp_path / "agent.py"
    path.write_text(
        "import json, os, subprocess, sys, time, urllib.request\n"
        "def turn():\n"
        "    task = json.load(sys.stdin)\n"
        "    body = {'model': os.environ['TOKENTAPE_MODEL'],\n"
        "            'messages': [{'role': 'user', 'content': str(task)}]}\n"
        "    headers = {'Authorization': 'Bearer ' + os.environ['OPENAI_API_KEY'],\n"
        "               'Content-Type': 'application/json'}\n"
        "    url = os.environ['OPENAI_BASE_URL'] + '/chat/completions'\n"
        "    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)).read()\n"
        "    return task\n" + code
    )
    return path
