"""A small model that the tests of this directory share."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tokentape.testing import byte_level_tokenizer, write_model_dir


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model"), tokenizer=tokenizer, context_length=8192)
