"""A gateway with its real HTTP server in front of a scripted engine."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gatewaykit import TOKENIZER, Gateway, gateway_for
from tokentape.testing import FakeSGLang, write_model_dir


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model"), tokenizer=TOKENIZER)


@pytest.fixture
async def fake() -> AsyncIterator[FakeSGLang]:
    async with FakeSGLang(TOKENIZER) as fake:
        yield fake


@pytest.fixture
async def gateway(fake: FakeSGLang, model_dir: Path, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with gateway_for(fake.url, model_dir, tmp_path / "store.sqlite") as gateway:
        yield gateway
