"""`make live`: what a real SGLang sampled, verified by the same server's prefill."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.model import model_sizes
from tokentape.schema import SAMPLES
from tokentape.tokenizer import Tokenizer
from tokentape.verify import verify
from updatekit import sessions

pytestmark = pytest.mark.live


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
async def test_a_run_is_verified(
    sglang_server: Callable[[str], Any], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = sglang_server(name)
    num = 8 if name == "tiny" else 3
    rows = await sessions(server.url, server.model_dir, num_sessions=num, num_turns=3, max_tokens=64)
    path, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    await asyncio.to_thread(pq.write_table, pa.Table.from_pylist(rows, schema=SAMPLES), path)
    turn, ids = rows[0]["turns"][0], rows[0]["token_ids"]
    at = next(at for at in range(turn["start"], turn["end"] - 1) if ids[at] != ids[at + 1])
    ids[at], ids[at + 1] = ids[at + 1], ids[at]
    await asyncio.to_thread(pq.write_table, pa.Table.from_pylist(rows, schema=SAMPLES), bad)
    vocab_size = model_sizes(server.model_dir).vocab_size
    assert vocab_size is not None
    tokenizer = Tokenizer(server.model_dir / "tokenizer.json", num_ids=vocab_size)
    async with contextlib.aclosing(SGLangEngine(SGLangConfig(server.url), vocab_size=vocab_size)) as engine:
        info = await engine.info()
        options: dict[str, Any] = {"engine_version": info.weight_version, "vocab_size": vocab_size}
        options |= {"tolerance": 0.3, "max_share": 0.01, "tokenizer": tokenizer, "concurrency": 2}
        report, spoiled = await verify(path, engine, **options), await verify(bad, engine, **options)
    with capsys.disabled():
        whole, drift = report.whole, report.drift
        print(  # noqa: T201
            f"\n{name}: {whole.num_tokens} tokens, mean {whole.mean:.4f}, largest {whole.largest:.3f}, "
            f"k3 {whole.k3:.1e}, beyond 0.3: {whole.share_beyond:.2%}; {drift}"
        )
    assert report.problems == []
    assert report.num_violations == 0
    assert report.whole.num_tokens == report.num_trained > 200
    assert spoiled.problems
    assert spoiled.first_offence is not None
    assert spoiled.first_offence.sample_id == rows[0]["sample_id"]
