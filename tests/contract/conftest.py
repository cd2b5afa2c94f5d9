"""The engines that must all keep the same contract: the scripted fake, the embedded engine, a real SGLang."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from contract import Contracted
from gatewaykit import END, TOKENIZER
from tokentape.engines import server
from tokentape.engines.local import LocalEngine
from tokentape.testing import FakeSGLang, Reply, write_model_dir

CONTEXT = 2048


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand random parameters: at temperature 1 hardly anything that they say is canonical."""
    directory = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=TOKENIZER.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    written = (directory / "config.json").read_text()
    write_model_dir(directory, tokenizer=TOKENIZER, context_length=CONTEXT)
    (directory / "config.json").write_text(written)
    return directory


@pytest.fixture(scope="session")
def embedded(random_model: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(random_model, device="cpu")
    yield engine
    engine.close()


def _endless(request: Any) -> Reply:
    """What the fake samples: as many tokens as are asked for, slowly enough to be interrupted."""
    wanted = request.sampling_params.get("max_new_tokens", 128)
    return Reply([(7 * at + len(request.input_ids)) % 250 for at in range(wanted)], delay_s=0.004)


@asynccontextmanager
async def _url_of(request: pytest.FixtureRequest) -> AsyncGenerator[tuple[str, Path]]:
    match request.param:
        case "fake":
            model_dir = request.getfixturevalue("random_model")
            async with FakeSGLang(TOKENIZER, context_length=CONTEXT, responder=_endless) as fake:
                yield fake.url, model_dir
        case "embedded":
            engine = request.getfixturevalue("embedded")
            async with server.serve(server.make_app(engine), drain_s=0.1) as url:
                yield url, request.getfixturevalue("random_model")
        case _:
            live = request.getfixturevalue("sglang_server")("tiny")
            yield live.url, live.model_dir


@pytest.fixture(params=["fake", "embedded", pytest.param("sglang", marks=pytest.mark.live)])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Contracted]:
    async with _url_of(request) as (url, model_dir), aiohttp.ClientSession() as http:
        async with http.get(f"{url}/v1/models") as response:
            cards = (await response.json())["data"]
        yield Contracted(url, http, model_dir, cards[0]["max_model_len"])
