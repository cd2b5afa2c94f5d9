"""The manual's snippets, its tutorials as written, and the samples that pages about trainers read."""

import asyncio
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import tokentape
from tokentape.engines.base import EngineInfo
from tokentape.testing import FakeEngine, Reply, byte_level_tokenizer, write_model_dir

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
RECORDED = "rollouts.parquet"
"""The name under which snippets find the recorded samples in their working directory."""

ENVIRONMENT = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
"""The package of this checkout, whatever is installed; nothing that the theme advertises."""

_START_TIMEOUT_S = 120.0
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NEEDS = re.compile(r"# pip install (.+)")


def snippets(language: str, pages: list[Path] | None = None) -> Iterator[tuple[str, str]]:
    """The name and the code of each."""
    for page in PAGES if pages is None else pages:
        for number, (found, code) in enumerate(_FENCE.findall(page.read_text(encoding="utf-8")), 1):
            if found == language:
                name = page.relative_to(DOCS) if page.is_relative_to(DOCS) else page.name
                yield f"{name}-{number}", code


def needs(code: str) -> list[tuple[str, str]]:
    """The packages, each with its version, that a snippet names in its first line; mostly none."""
    match = _NEEDS.match(code)
    return [] if match is None else [(n, v) for n, _, v in (w.partition("==") for w in match[1].split())]


def missing(code: str) -> list[str]:
    """Those of them that are not installed."""
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return [name for name, _ in needs(code) if name.lower() not in installed]


async def write_recorded(directory: Path) -> None:
    """Write `rollouts.parquet`: two groups of two episodes of two turns, with rewards, of weights "7"."""
    tokenizer = byte_level_tokenizer()
    end = tokenizer.token_to_id("<|im_end|>")
    reply = Reply([*tokenizer.encode("hello world").ids, end])
    info = EngineInfo(model="fake", context_length=8192, weight_version="7")
    engine = FakeEngine(responder=lambda _: reply, info=info)
    async with tokentape.open(model=write_model_dir(directory / "model"), engine=engine) as tape:
        for number in range(4):
            session = tape.session(session_id=f"s{number}", group_id=f"g{number // 2}")
            messages = [{"role": "user", "content": f"Say hello, {number // 2}."}]
            first = await session.chat(messages, temperature=1.0)
            messages += [first.message, {"role": "user", "content": "Again."}]
            await session.chat(messages, temperature=1.0)
            await session.finish(reward=float(number % 2))
        await tape.export(directory / RECORDED)


# -- tutorials


async def walk(page: Path, directory: Path, other: Mapping[str, str]) -> str:
    """Do what a page says, in its order, and return what was printed.

    Files whose first line has their name are written, other Python is run, and so are `tokentape` and
    `python FILE`; engine and gateway run until the end. `other` is what stands here in place of the page's
    ports and names.
    """
    servers, said = list[asyncio.subprocess.Process](), ""
    try:
        for line in _lines(page, directory, other):
            match line.split():
                case ["tokentape", "engine" | "serve" as name, *options]:
                    port = [] if "--port" in options else ["--port", other["8000"]]
                    command = [sys.executable, "-m", "tokentape", name, *options, *port]
                    servers.append(await _started(command, directory))
                case ["tokentape", *options]:
                    said += await _done([sys.executable, "-m", "tokentape", *options], directory)
                case ["python", name]:
                    said += await _done([sys.executable, name], directory)
    finally:
        for server in servers:
            server.terminate()
            await server.wait()
    return said


def _lines(page: Path, directory: Path, other: Mapping[str, str]) -> Iterator[str]:
    """A page's commands; what it calls a file is written, and other Python is a command, too."""
    (directory / "src").symlink_to(ROOT / "src")
    for kind, block in _FENCE.findall(page.read_text(encoding="utf-8")):
        code = re.sub("|".join(map(re.escape, other)), lambda match: other[match[0]], block)
        if kind == "console":
            yield from code.splitlines()
        if kind == "python":
            name = re.match(r"# (\w+\.py)\n", code)
            (directory / (name[1] if name else "snippet.py")).write_text(code, encoding="utf-8")
            yield "" if name else "python snippet.py"


async def _started(command: list[str], directory: Path) -> asyncio.subprocess.Process:
    """A server, when it has said where it listens."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=directory, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT_S)
    assert line.startswith(b"listening on "), command
    return process


async def _done(command: list[str], directory: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=directory, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, (command, out.decode(), err.decode())
    return out.decode()


def free_port() -> str:
    """A port that nobody has, as text."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
