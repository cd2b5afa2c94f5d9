"""A gateway with its real HTTP server in front of a scripted engine: fixtures for several directories."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gatewaykit import TOKENIZER, Gateway, gateway_for
from tokentape.testing import FakeSGLang, write_model_dir

CONTEXT = 8192


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model"), tokenizer=TOKENIZER, context_length=CONTEXT)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture
async def fake() -> AsyncIterator[FakeSGLang]:
    async with FakeSGLang(TOKENIZER, context_length=CONTEXT) as fake:
        yield fake


@pytest.fixture
async def gateway(fake: FakeSGLang, model_dir: Path, store: Path) -> AsyncIterator[Gateway]:
    async with gateway_for(fake.url, model_dir, store) as gateway:
        yield gateway


@pytest.fixture
async def strict(fake: FakeSGLang, model_dir: Path, store: Path) -> AsyncIterator[Gateway]:
    async with gateway_for(fake.url, model_dir, store, http={"strict": True}) as gateway:
        yield gateway
