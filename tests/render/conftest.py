"""Renderers that the whole directory shares: a real tokenizer takes seconds to load."""

from pathlib import Path

import pytest
from render_golden import Models, Shipped

from tokentape.render import Renderer
from tokentape.testing import write_model_dir


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture
def shipped(tmp_path: Path) -> Shipped:
    """Anew for each test: a tokenizer takes 200 MB, and each of these serves one."""
    return Shipped(tmp_path)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Renderer:
    return Renderer.from_dir(tiny_dir)
