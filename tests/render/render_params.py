"""The shared models as pytest parameters; where they are missing, one that is skipped and says so."""

from typing import Any

import pytest
from render_golden import SHARED, every_template, with_tokenizer


def shared(names: list[str]) -> list[Any]:
    if not names:
        return [pytest.param("", marks=pytest.mark.skip(reason=f"no reference models at {SHARED}"))]
    return [pytest.param(name, marks=pytest.mark.shared) for name in names]


def only(*names: str) -> list[Any]:
    return shared([name for name in names if (SHARED / name).is_dir()])


ALL = shared(every_template())
WITH_TOKENIZER = shared(with_tokenizer())
