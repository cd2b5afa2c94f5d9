"""A gateway whose scripted model has room for the prompts of coding agents."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gatewaykit import TOKENIZER, Gateway, gateway_for
from tokentape.testing import FakeSGLang, write_model_dir

CONTEXT = 1 << 20  # a byte-level tokenizer makes 120,000 ids of a coding agent's system prompt and tools


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-agents", action="store_true", help="write what was found into the README's table"
    )


@pytest.fixture
async def fake() -> AsyncIterator[FakeSGLang]:
    async with FakeSGLang(TOKENIZER, context_length=CONTEXT) as fake:
        yield fake


@pytest.fixture
async def gateway(fake: FakeSGLang, tmp_path: Path) -> AsyncIterator[Gateway]:
    model_dir = write_model_dir(tmp_path / "model", tokenizer=TOKENIZER, context_length=CONTEXT)
    async with gateway_for(fake.url, model_dir, tmp_path / "store.sqlite") as gateway:
        yield gateway
