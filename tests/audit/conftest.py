"""Audits of templates that the tests write."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tokentape.audit import Report, audit
from tokentape.testing import byte_level_tokenizer, write_model_dir


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a model directory with the template given."""

    def write(source: str) -> Path:
        directory = write_model_dir(tmp_path / "model", tokenizer=byte_level_tokenizer())
        (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
        return directory

    return write


@pytest.fixture
def audited(model_dir: Callable[[str], Path]) -> Callable[..., Report]:
    """Audits a template."""

    def run(source: str, **options: object) -> Report:
        return audit(model_dir(source), **options)  # type: ignore[arg-type]

    return run
