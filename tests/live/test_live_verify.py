"""`make live`: what a real SGLang sampled, verified by the same server's prefill."""

import asyncio
import contextlib
import copy
import itertools
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
from tokentape.verify import Report, verify
from updatekit import sessions

Json = dict[str, Any]
pytestmark = pytest.mark.live


def swapped_ids(row: Json) -> None:
    """The most certain id and the one behind it change places; of two equal ones one becomes another.

    Where the model was sure of nothing, another id may be as likely, and no verifier could tell.
    """
    ids, spans = row["token_ids"], [range(turn["start"], turn["end"] - 1) for turn in row["turns"]]
    at = max(itertools.chain(*spans), key=row["logprobs"].__getitem__)
    ids[at], ids[at + 1] = ids[at + 1] + (ids[at] == ids[at + 1]), ids[at]


def shifted_logprobs(row: Json) -> None:
    span = slice(row["turns"][0]["start"], row["turns"][0]["end"])
    row["logprobs"][span] = shifted(row["logprobs"][span])


def shifted(values: list[float]) -> list[float]:
    return [values[-1], *values[:-1]]


def variety(row: Json) -> float:
    """What a shift changes in the first turn, nats: of a turn all of whose tokens were certain, nothing."""
    values = row["logprobs"][row["turns"][0]["start"] : row["turns"][0]["end"]]
    return sum(abs(a - b) for a, b in zip(values, shifted(values), strict=True))


def shifted_mask(row: Json) -> None:
    row["loss_mask"] = [0, *row["loss_mask"][:-1]]


def unknown_id(row: Json) -> None:
    row["token_ids"][row["turns"][0]["start"]] = 10**6


DAMAGE = [swapped_ids, shifted_logprobs, shifted_mask, unknown_id]


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
async def test_a_run_is_verified(
    sglang_server: Callable[[str], Any], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A good file is, and in half precision, too, every damaged one is not."""
    server = sglang_server(name)
    num = 8 if name == "tiny" else 3
    rows = await sessions(server.url, server.model_dir, num_sessions=num, num_turns=3, max_tokens=64)
    rows.sort(key=variety, reverse=True)
    vocab_size = model_sizes(server.model_dir).vocab_size
    assert vocab_size is not None
    tokenizer = Tokenizer(server.model_dir / "tokenizer.json", num_ids=vocab_size)
    async with contextlib.aclosing(SGLangEngine(SGLangConfig(server.url), vocab_size=vocab_size)) as engine:
        info = await engine.info()
        assert await engine.dtype() != "float32"
        options: Json = {"engine_version": info.weight_version, "vocab_size": vocab_size}
        options |= {"tolerance": 0.3, "max_share": 0.01, "tokenizer": tokenizer, "concurrency": 2}

        async def verified(rows: list[Json]) -> Report:
            path = tmp_path / "f.parquet"
            await asyncio.to_thread(pq.write_table, pa.Table.from_pylist(rows, schema=SAMPLES), path)
            return await verify(path, engine, **options)

        report = await verified(rows)
        whole, drift = report.whole, report.drift
        with capsys.disabled():
            print(  # noqa: T201
                f"\n{name}: {whole.num_tokens} tokens, mean {whole.mean:.4f}, largest {whole.largest:.3f}, "
                f"k3 {whole.k3:.1e}, beyond 0.3: {whole.share_beyond:.2%}; {drift}"
            )
        assert report.problems == []
        assert report.num_violations == 0
        assert whole.num_tokens == report.num_trained > 100
        for damage in DAMAGE:
            damaged = copy.deepcopy(rows)
            damage(damaged[0])
            report = await verified(damaged)
            with capsys.disabled():
                print(f"  {damage.__name__}: {report.problems}")  # noqa: T201
            assert report.problems, damage.__name__
            if report.num_violations:
                assert damaged[0]["sample_id"] in report.violations[0]
            else:
                assert report.first_offence is not None
                assert report.first_offence.sample_id == damaged[0]["sample_id"], damage.__name__
        assert (await engine.info()).weight_version == info.weight_version, "the server is alive"
