"""The pages tell the truth: their snippets run, their commands exist, the README's tree is the tree."""

import asyncio
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from manualkit import PAGES, RECORDED, ROOT, needs, snippets, write_recorded
from tokentape.cli import main
from tokentape.testing import FakeSGLang, Reply, byte_level_tokenizer, write_model_dir

GATEWAY = "http://127.0.0.1:8000"
ENGINE, MODEL = "http://127.0.0.1:30000", "Qwen/Qwen3-8B"
TUTORIAL = "start/tutorial.md"


def pytest_params(language: str) -> list[object]:
    """All but what is run elsewhere: the tutorial's files, and the trainers' examples that share one."""
    return [
        pytest.param(code, id=name)
        for name, code in snippets(language)
        if not (language == "python" and name.startswith(TUTORIAL))
        and not (needs(code) or "from episode" in code or code.startswith("# episode.py"))
    ]


@pytest.mark.parametrize("code", pytest_params("python"))
async def test_python_snippets_run(code: str, tmp_path: Path) -> None:
    if RECORDED in code:
        await write_recorded(tmp_path)
    if GATEWAY not in code and ENGINE not in code:
        await run_python(code, tmp_path)
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
            said = await run_python(code.replace(ENGINE, fake.url).replace(MODEL, str(tmp_path)), tmp_path)
        else:
            async with running(config) as url:
                said = await run_python(code.replace(GATEWAY, url), tmp_path)
    assert re.search(r"[1-9]\d* trained, reward 1\.0", said)


async def run_python(code: str, directory: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-c",
        code,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.parametrize("code", [*pytest_params("console"), *pytest_params("sh")])
def test_commands_exist(code: str) -> None:
    for line in code.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        if words[:1] == ["tokentape"]:
            command = main.commands[words[1]]
            known = {name for option in command.params for name in option.opts}
            assert {word for word in words[2:] if word.startswith("--")} <= known, line


@pytest.mark.parametrize("code", pytest_params("toml"))
def test_toml_is_toml(code: str) -> None:
    assert tomllib.loads(code)


@pytest.mark.parametrize("code", pytest_params("json"))
def test_json_is_json(code: str) -> None:
    assert json.loads(code)


@pytest.mark.parametrize("code", pytest_params("yaml"))
def test_yaml_is_yaml(code: str) -> None:
    assert yaml.safe_load(code)


def test_every_kind_of_snippet_has_a_test() -> None:
    """`text` is output; `py` is Python for a process of others, and compiled only."""
    kinds = {kind for page in PAGES for kind in re.findall(r"^```(\w+)", page.read_text(), re.MULTILINE)}
    assert kinds <= {"python", "py", "console", "sh", "toml", "json", "yaml", "text"}
    for name, code in snippets("py"):
        compile(code, name, "exec")


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
