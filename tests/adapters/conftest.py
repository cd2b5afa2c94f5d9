"""A fake SGLang, its model directory, and the Letta adapter installed in front of them."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gatewaykit import TOKENIZER
from tokentape.testing import FakeSGLang, write_model_dir

CONTEXT = 200_000  # the byte-level tokenizer needs a token a character, and Letta's prompts are long


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model"), tokenizer=TOKENIZER, context_length=CONTEXT)


@pytest.fixture
async def fake() -> AsyncIterator[FakeSGLang]:
    async with FakeSGLang(TOKENIZER, context_length=CONTEXT) as fake:
        yield fake


@pytest.fixture
async def tapes() -> AsyncIterator[Any]:
    """The adapter installed; it does not retry."""
    from lettakit import as_before

    from tokentape.adapters import letta as ours

    with as_before():
        tapes = ours.install(max_retries=0)
        yield tapes
        await tapes.aclose()


@pytest.fixture
def one(fake: FakeSGLang, model_dir: Path, tapes: Any) -> Any:
    """An adapter as Letta's agent makes it after `install`."""
    from letta.agents import letta_agent_v3
    from lettakit import adapter, llm_config

    return adapter(letta_agent_v3.SGLangNativeAdapter, llm_config(fake.url, model_dir))
