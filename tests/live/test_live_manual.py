"""`make live`: the tutorial with a real SGLang as written, with the bundled model in place of a large one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from livekit import LiveServer
from manualkit import DOCS, free_port, walk

pytestmark = pytest.mark.live


async def test_the_tutorial_as_written(sglang_server: Callable[[str], LiveServer], tmp_path: Path) -> None:
    server = sglang_server("tiny")
    other = {
        "http://127.0.0.1:30000": server.url,
        "Qwen/Qwen3-8B": str(server.model_dir),
        "8000": free_port(),
    }
    said = await walk(DOCS / "start" / "sglang.md", tmp_path, other)
    assert "trained, reward 1.0, sampled" in said
    assert said.rstrip().endswith("verified")
