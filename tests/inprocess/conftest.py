"""A recorder in this process, over the fake SGLang server or a scripted engine."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import tokentape
from gatewaykit import TOKENIZER
from tokentape.testing import FakeSGLang, write_model_dir

CONTEXT = 8192


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model"), tokenizer=TOKENIZER, context_length=CONTEXT)


@pytest.fixture
async def fake() -> AsyncIterator[FakeSGLang]:
    async with FakeSGLang(TOKENIZER, context_length=CONTEXT) as fake:
        yield fake


@pytest.fixture
async def tape(fake: FakeSGLang, model_dir: Path) -> AsyncIterator[tokentape.Recorder]:
    async with tokentape.open(model=model_dir, engine=fake.url) as tape:
        yield tape
