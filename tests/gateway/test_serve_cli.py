"""The command line: what it prints, how it ends, what it says of a wrong option."""

import asyncio
import contextlib
import json
import shutil
import signal
import socket
from pathlib import Path

import aiohttp
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from gatewaykit import USER, Agent, Gateway, assert_samples_match, gateway_for, sampled, seen_by
from serving import run, serving
from tokentape.cli import main
from tokentape.store import SQLiteStore
from tokentape.testing import FakeSGLang

URL = "http://127.0.0.1:1"


def arguments(url: str, model_dir: Path, store: Path, *more: str) -> tuple[str, ...]:
    base = ("serve", "--model", str(model_dir), "--engine", url, "--port", "0", "--store", str(store))
    return (*base, *more)


@pytest.mark.parametrize("command", [(), ("serve",), ("engine",), ("export",), ("demo",)], ids=" ".join)
def test_help(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: {' '.join(('tokentape', *command))} ")
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


async def test_as_a_module() -> None:
    code, stdout, stderr = await run("--version")
    assert (code, stderr) == (0, "")
    assert stdout.startswith("tokentape, version ")


async def test_sigterm_drains(fake: FakeSGLang, model_dir: Path, store: Path, tmp_path: Path) -> None:
    """A turn that runs is answered in full, then the process ends with 0."""
    command = arguments(fake.url, model_dir, store)
    async with serving(tmp_path / "log", *command) as process, aiohttp.ClientSession() as http:
        gateway = Gateway(process.url, http)
        session_id = await gateway.create()
        fake.script(
            sampled("hello world " * 2, seed=1, delay_s=0.03),
            sampled("hello world " * 2, seed=2, delay_s=0.03),
        )
        turns = [
            asyncio.create_task(gateway.chat(session_id, [USER], stream=stream)) for stream in (False, True)
        ]
        await fake.until(lambda: len(fake.requests) == 2)
        process.process.send_signal(signal.SIGTERM)
        replies = await asyncio.gather(*turns)
        assert [r["choices"][0]["message"]["content"] for r in replies] == ["hello world " * 2] * 2
        assert await process.ended() == 0
    assert process.stdout == [f"listening on {process.url}\n"]
    assert "Traceback" not in process.log.read_text()
    assert not fake.aborts


async def test_sigterm_without_work(fake: FakeSGLang, model_dir: Path, store: Path, tmp_path: Path) -> None:
    async with serving(tmp_path / "log", *arguments(fake.url, model_dir, store)) as process:
        process.process.send_signal(signal.SIGTERM)
        assert await process.ended() == 0


async def test_sigterm_ends_what_does_not_end(
    fake: FakeSGLang, model_dir: Path, store: Path, tmp_path: Path
) -> None:
    command = arguments(fake.url, model_dir, store, "--drain-timeout", "0.3")
    async with serving(tmp_path / "log", *command) as process, aiohttp.ClientSession() as http:
        gateway = Gateway(process.url, http)
        session_id = await gateway.create()
        fake.script(sampled("hello world " * 40, seed=1, delay_s=0.1))
        turn = asyncio.create_task(gateway.chat(session_id, [USER]))
        await fake.until(lambda: len(fake.requests) == 1)
        process.process.send_signal(signal.SIGTERM)
        with pytest.raises(aiohttp.ClientError):
            await turn
        assert await process.ended() == 0
    await fake.until(lambda: bool(fake.aborts) or fake.requests[0].disconnected)
    assert "Traceback" not in process.log.read_text()
    async with gateway_for(fake.url, model_dir, store) as gateway:
        assert (await gateway.show(session_id))["turns"] == 0


async def test_options_of_serve(fake: FakeSGLang, model_dir: Path, store: Path, tmp_path: Path) -> None:
    more = (
        "--strict",
        "--auto-sessions",
        "--served-model-name",
        "mine",
        "--context-length",
        "50",
        "--api-key",
        "k",
    )
    headers = {"Authorization": "Bearer k"}
    async with (
        serving(tmp_path / "log", *arguments(fake.url, model_dir, store, *more)) as process,
        aiohttp.ClientSession(headers=headers) as http,
    ):
        gateway = Gateway(process.url, http)
        reply = await gateway.chat("new", [USER], max_tokens=3, model="mine")
        assert reply["model"] == "mine"
        assert (await gateway.post("new", {"messages": [USER], "user": "x"})).error["param"] == "user"
        assert (await gateway.post("new", {"messages": [USER], "max_tokens": 60})).error["code"] == (
            "context_length_exceeded"
        )
        assert (
            await gateway.request("GET", "/sessions", headers={"Authorization": "Bearer x"})
        ).status == 401


def invoke(*command: str) -> Result:
    """A command that ends by itself, in this process."""
    return CliRunner().invoke(main, command, prog_name="tokentape")


def refused(*command: str) -> str:
    """Exit code 2, nothing on stdout, one line on stderr."""
    result = invoke(*command)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("tokentape: ")
    return result.stderr


def test_wrong_models(model_dir: Path, store: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert str(missing) in refused(*arguments(URL, missing, store))

    def copy(name: str, *without: str) -> Path:
        directory = tmp_path / name
        shutil.copytree(model_dir, directory)
        for file in without:
            (directory / file).unlink()
        return directory

    bare = copy("bare", "chat_template.jinja")
    line = refused(*arguments(URL, bare, store))
    assert str(bare / "chat_template.jinja") in line
    wordless = copy("wordless", "tokenizer.json")
    assert str(wordless / "tokenizer.json") in refused(*arguments(URL, wordless, store))
    (wordless / "tokenizer.json").write_text("{nonsense")
    assert str(wordless / "tokenizer.json") in refused(*arguments(URL, wordless, store))
    broken = copy("broken")
    (broken / "chat_template.jinja").write_text("{% if %}")
    assert "the chat template does not compile" in refused(*arguments(URL, broken, store))
    (bare / "config.json").write_text("{")
    (bare / "chat_template.jinja").write_text("x")
    assert str(bare / "config.json") in refused(*arguments(URL, bare, store))


def test_wrong_options(model_dir: Path, store: Path, tmp_path: Path) -> None:
    command = ("serve", "--model", str(model_dir), "--store", str(store), "--port", "0", "--engine")
    for url in ("localhost:30000", "ftp://x", "http://", "nonsense"):
        assert url in refused(*command, url)
    assert "nonsense" in refused(*arguments(URL, model_dir, store, "--tool-format", "nonsense"))
    assert "nonsense" in refused(*arguments(URL, model_dir, store, "--reasoning-format", "nonsense"))
    garbage = tmp_path / "garbage.sqlite"
    garbage.write_bytes(b"this is no database, not at all, and longer than a header is" * 20)
    assert str(garbage) in refused(*arguments(URL, model_dir, garbage))
    nowhere = tmp_path / "no" / "store.sqlite"
    assert str(nowhere) in refused(*arguments(URL, model_dir, nowhere))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert port in refused(*arguments(URL, model_dir, store)[:5], "--store", str(store), "--port", port)


@pytest.mark.parametrize(
    "command", [("serve",), ("serve", "--port", "x"), ("nonsense",), ("export",), ("engine", "--nonsense")]
)
def test_usage_errors(command: tuple[str, ...]) -> None:
    result = invoke(*command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage:")


async def test_export(fake: FakeSGLang, model_dir: Path, store: Path, tmp_path: Path) -> None:
    """Also while the gateway runs: what is committed is in the file."""
    out = tmp_path / "new" / "rollouts.parquet"
    async with gateway_for(fake.url, model_dir, store) as gateway:
        fake.script(*(sampled("the weather", seed=n) for n in range(6)))
        agents = [
            Agent(gateway, await gateway.create(session_id=f"s{n}", metadata={"n": n})) for n in range(3)
        ]
        for agent in agents:
            await agent.turn(USER)
            await agent.turn(USER)
        samples = [sample for agent in agents for sample in await gateway.samples(agent.session_id)]
        code, stdout, stderr = await run("export", "--store", str(store), "--out", str(out))
        assert (code, stdout, stderr) == (0, f"3 samples in {out}\n", "")
    rows = pq.read_table(out).to_pylist()
    assert rows == samples
    assert_samples_match(seen_by(fake), rows, num_turns=6)
    code, _, _ = await run("export", "--store", str(store), "--out", str(out), "--session", "s1")
    assert code == 0
    [row] = pq.read_table(out).to_pylist()
    assert json.loads(row["metadata"]) == {"n": 1}


def test_wrong_exports(tmp_path: Path) -> None:
    store, out, garbage = tmp_path / "store.sqlite", tmp_path / "out.parquet", tmp_path / "garbage"
    garbage.write_bytes(b"no database" * 100)
    out.write_bytes(b"the file of before")
    asyncio.run(SQLiteStore(store).aclose())
    assert "s9" in refused("export", "--store", str(store), "--out", str(out), "--session", "s9")
    assert str(garbage) in refused("export", "--store", str(garbage), "--out", str(out))
    assert out.read_bytes() == b"the file of before"
    assert [p.name for p in tmp_path.glob(".*")] == []
    unwritable = garbage / "x.parquet"
    assert str(unwritable) in refused("export", "--store", str(store), "--out", str(unwritable))
