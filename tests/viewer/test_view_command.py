"""`tokentape view` as a process, and the page of a gateway of several processes."""

import signal
from pathlib import Path

import aiohttp
import pytest

from gatewaykit import USER, Gateway, gateway_for, sampled
from serving import run, serving
from tokentape.engines.local import LocalEngine
from tokentape.engines.server import make_app, serve
from tokentape.export import stored_samples, write_parquet
from tokentape.model import TINY_MODEL
from tokentape.stores import open_store
from tokentape.testing import FakeSGLang


async def recorded(engine: str, model: Path, store: Path) -> str:
    """A store with one finished session of one turn."""
    async with gateway_for(engine, model, store) as gateway:
        session_id = await gateway.create()
        await gateway.chat(session_id, [USER], max_tokens=12)
        await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 1})
        return session_id


async def test_a_store_and_a_file_with_an_engine(tmp_path: Path) -> None:
    local, store, file = LocalEngine(TINY_MODEL), tmp_path / "s.sqlite", tmp_path / "f.parquet"
    async with serve(make_app(local)) as engine:
        session_id = await recorded(engine, TINY_MODEL, store)
        opened = open_store(store, readonly=True)
        await write_parquet(file, stored_samples(opened))
        await opened.aclose()
        for what in (store, file):
            command = ("view", str(what), "--model", str(TINY_MODEL), "--engine", engine, "--port", "0")
            async with serving(tmp_path / "log", *command) as process, aiohttp.ClientSession() as http:
                assert process.url.endswith("/ui/")
                gateway = Gateway(process.url.removesuffix("/ui/"), http)
                assert b"main.js" in await gateway.ok("GET", "/ui/")
                info = await gateway.ok("GET", "/ui/api/info")
                assert info == {
                    "kind": "store" if what == store else "file",
                    "name": what.name,
                    "has_texts": True,
                    "has_engine": True,
                    "has_wire": False,
                }
                [branch] = (await gateway.ok("GET", f"/sessions/{session_id}/view"))["branches"]
                path = f"/sessions/{session_id}/view/{branch['branch_id']}"
                [[start, values]] = (await gateway.ok("GET", f"{path}/scores"))["spans"]
                piece = await gateway.ok("GET", f"{path}/tokens?start={start}&end={branch['num_tokens']}")
                assert values == pytest.approx(piece["logprobs"], abs=1e-4)
                process.process.send_signal(signal.SIGTERM)
                assert await process.ended() == 0
    local.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nothing.sqlite",), "does not exist"),
        (("{file}",), "file is not a database"),
        (("{store}", "--engine", "http://127.0.0.1:1"), "--engine needs --model"),
        (("{store}", "--model", "/nowhere"), "no such directory"),
    ],
)
async def test_what_cannot_be_viewed(
    fake: FakeSGLang, model_dir: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    store, file = tmp_path / "s.sqlite", tmp_path / "f.txt"
    fake.responder = lambda _: sampled("hello")
    await recorded(fake.url, model_dir, store)
    file.write_text("no store, and long enough to be read as one " * 9)
    code, stdout, stderr = await run("view", *(one.format(store=store, file=file) for one in arguments))
    assert (code, stdout) == (2, "")
    assert says in " ".join(stderr.split())


async def test_processes_of_a_gateway(fake: FakeSGLang, model_dir: Path, store: Path, tmp_path: Path) -> None:
    """Whichever is asked, the session's own answers: it knows what the store does not, as the wire."""
    fake.responder = lambda _: sampled("hello")
    command = ("serve", "--model", str(model_dir), "--engine", fake.url, "--port", "0", "--workers", "2")
    async with (
        serving(tmp_path / "log", *command, "--store", str(store)) as process,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http,
    ):
        gateway = Gateway(process.url, http)
        for _ in range(4):
            session_id = await gateway.create()
            turn_id = (await gateway.chat(session_id, [USER]))["tokentape"]["turn_id"]
            for _ in range(3):
                assert (await gateway.ok("GET", f"/sessions/{session_id}/view"))["summary"]["turns"] == 1
                wire = await gateway.ok("GET", f"/sessions/{session_id}/view/{turn_id}/wire")
                assert wire["kept"]
        assert len((await gateway.ok("GET", "/ui/api/sessions"))["sessions"]) == 4


async def test_replicas(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    fake.responder = lambda _: sampled("hello")
    async with (
        gateway_for(fake.url, model_dir, database) as one,
        gateway_for(fake.url, model_dir, database) as other,
    ):
        session_id = await one.create()
        turn_id = (await one.chat(session_id, [USER]))["tokentape"]["turn_id"]
        for gateway in (one, other):
            assert (await gateway.ok("GET", f"/sessions/{session_id}/view"))["summary"]["turns"] == 1
            assert (await gateway.ok("GET", f"/sessions/{session_id}/view/{turn_id}/wire"))["kept"]
            assert len((await gateway.ok("GET", "/ui/api/sessions"))["sessions"]) == 1


async def test_an_engine_with_another_model_is_asked_nothing(tmp_path: Path, model_dir: Path) -> None:
    """An id that it does not know would kill it."""
    store = tmp_path / "s.sqlite"
    local = LocalEngine(TINY_MODEL)
    async with serve(make_app(local)) as engine:
        await recorded(engine, TINY_MODEL, store)
        command = ("view", str(store), "--model", str(model_dir), "--engine", engine, "--port", "0")
        code, stdout, stderr = await run(*command)
    assert (code, stdout) == (2, "")
    assert "the engine has another model than --model" in " ".join(stderr.split())
    local.close()
