"""The pages tell the truth: their snippets run, their commands exist, the README's tree is the tree."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tokentape.cli import main
from tokentape.testing import FakeSGLang, Reply, byte_level_tokenizer, write_model_dir

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
GATEWAY = "http://127.0.0.1:8000"
ENGINE, MODEL = "http://127.0.0.1:30000", "Qwen/Qwen3-8B"


def snippets(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, match in enumerate(FENCE.finditer(page.read_text()), 1):
            if match[1] == language:
                yield f"{page.name}-{number}", match[2]


def pytest_params(language: str) -> list[object]:
    return [pytest.param(code, id=name) for name, code in snippets(language)]


@pytest.mark.parametrize("code", pytest_params("python"))
async def test_python_snippets_run(code: str, tmp_path: Path) -> None:
    if GATEWAY not in code and ENGINE not in code:
        await run_python(code)
        return
    from tokentape.engines.sglang import SGLangConfig
    from tokentape.gateway.service import ServiceConfig, running

    write_model_dir(tmp_path)
    tokenizer = byte_level_tokenizer()
    end = tokenizer.token_to_id("<|im_end|>")
    async with FakeSGLang(tokenizer) as fake:
        fake.responder = lambda _: Reply(ids=[*tokenizer.encode("hello world").ids, end])
        config = ServiceConfig(
            model=str(tmp_path), engine=SGLangConfig(fake.url), store=tmp_path / "s.sqlite"
        )
        if ENGINE in code:
            said = await run_python(code.replace(ENGINE, fake.url).replace(MODEL, str(tmp_path)))
        else:
            async with running(config) as url:
                said = await run_python(code.replace(GATEWAY, url))
    assert re.search(r"[1-9]\d* trained, reward 1\.0", said)


async def run_python(code: str) -> str:
    import asyncio

    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", code, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.parametrize("code", pytest_params("console"))
def test_commands_exist(code: str) -> None:
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        if words[:1] == ["tokentape"]:
            command = main.commands[words[1]]
            known = {name for option in command.params for name in option.opts}
            assert {word for word in words[2:] if word.startswith("--")} <= known, line


def test_every_command_is_documented() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for name, command in main.commands.items():
        assert f"tokentape {name}" in text
        assert command.help
        assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_the_readme_shows_the_tree() -> None:
    block = next(code for _, code in snippets("text") if code.startswith("src/tokentape/"))
    shown = {line.split()[0] for line in block.splitlines()[1:] if line.strip()}
    package = ROOT / "src" / "tokentape"
    folders = {name for name in shown if name.endswith("/")}
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    real = {m for m in modules if not m.endswith(("__init__.py", "__main__.py"))}
    assert {m for m in real if not m.startswith(tuple(folders))} == shown - folders
    assert all((package / folder).is_dir() for folder in folders)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
