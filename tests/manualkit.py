"""The manual's snippets, and the file of samples that those about trainers read."""

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import tokentape
from tokentape.engines.base import EngineInfo
from tokentape.testing import FakeEngine, Reply, byte_level_tokenizer, write_model_dir

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
RECORDED = "rollouts.parquet"
"""The name under which snippets find the recorded samples in their working directory."""

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
