"""Samples as Arrow, Parquet and JSON: one truth in three forms, whole or not at all."""

import json
import math
import struct
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import TOOLS, Recorder, call, record, result, said, turn, user

from tokentape.errors import ConfigError, InternalError, StoreError
from tokentape.export.samples import (
    chat_message,
    samples,
    stored_samples,
    to_arrow_stream,
    to_json_rows,
    write_parquet,
)
from tokentape.invariants import check_samples
from tokentape.labels import labels
from tokentape.schema import SAMPLES
from tokentape.store import SQLiteStore
from tokentape.tape import Origin, Tape, lay_out, version_order
from tokentape.types import Message, Sampling, ToolCall, VersionSpan
from tokentape.volatile import Superseded


def recorded() -> Recorder:
    """t1 → t2, t3 with everything that a row can hold."""
    recorder = Recorder()
    first = said("\n\nlook 😀", call(arguments='{"q": "Łódź"}'), reasoning="hm")
    recorder.run(
        [Message("system", "s"), user("u")], first, TOOLS, sampling=Sampling(temperature=0.0, stop=("x",))
    )
    messages = [Message("system", "s"), user("u"), first]
    recorder.run(
        [*messages, result("x\0y")],
        said("b"),
        TOOLS,
        neutralised=("<|im_end|>",),
        superseded=(Superseded("date", "1", "2"),),
        origin=Origin("chat", "d", "t2", ignored=("user",), noted={"a": 1}),
    )
    recorder.run([*messages, result("z")], said(None), TOOLS, finish_reason="length")
    return recorder


def batch(recorder: Recorder | None = None, **changes: Any) -> pa.RecordBatch:
    return samples(record(**changes), (recorder or recorded()).tree.tapes())


async def stream(batches: Sequence[pa.RecordBatch | Exception]) -> AsyncIterator[pa.RecordBatch]:
    for one in batches:
        if isinstance(one, Exception):
            raise one
        yield one


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -- what a row says


def test_a_row_to_the_letter() -> None:
    rows = recorded().rows(metadata={"task": "t"}, reward=0.0)
    assert check_samples(rows) == []
    assert [row["sample_id"] for row in rows] == ["t2", "t3"]
    row = rows[1]
    assert {k: v for k, v in row.items() if k not in ("messages", "tools", "sampling", "metadata")} == {
        "session_id": "s",
        "sample_id": "t3",
        "group_id": None,
        "sampling_logprobs": None,
        "support": None,
        "routed_experts": None,
        "branch_reason": "forked",
        "label": "main",
        "label_by": "inferred",
        "token_ids": [100, 101, 102, 103, 104, 110, 111, 112, 113, 114],
        "loss_mask": [0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
        "logprobs": [None] * 8 + [0.0, -0.125],
        "weight_versions": [{"version": "v1", "start": 8, "end": 10}],
        "num_prompt_tokens": 3,
        "turns": [
            {
                "turn_id": "t1",
                "start": 3,
                "end": 5,
                "finish_reason": "stop",
                "trained": False,
                "parse_status": "ok",
                "label": "main",
                "logprob_basis": "sampled",
                "reward": None,
            },
            {
                "turn_id": "t3",
                "start": 8,
                "end": 10,
                "finish_reason": "length",
                "trained": True,
                "parse_status": "ok",
                "label": "main",
                "logprob_basis": "sampled",
                "reward": None,
            },
        ],
        "reward": 0.0,
        "truncated": True,
    }
    assert json.loads(row["messages"]) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {
            "role": "assistant",
            "content": "\n\nlook 😀",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"q": "Łódź"}'}}
            ],
        },
        {"role": "tool", "content": "z", "tool_call_id": "c1"},
        {"role": "assistant", "content": None},
    ]
    assert json.loads(row["tools"]) == list(TOOLS)
    assert json.loads(row["sampling"]) == [{"temperature": 0.0, "stop": ["x"]}, {}]
    assert json.loads(row["metadata"]) == {"task": "t"}
    assert json.loads(rows[0]["metadata"]) == {
        "task": "t",
        "tokentape": {
            "superseded": {"t2": [{"rule": "date", "recorded": "1", "asked": "2"}]},
            "ignored": {"t2": ["user"]},
            "neutralised": {"t2": ["<|im_end|>"]},
        },
    }


def test_truncated_is_what_the_last_turn_was() -> None:
    recorder = Recorder()
    recorder.run([user("u")], said("cut"), finish_reason="length")
    assert batch(recorder).column("truncated").to_pylist() == [True]
    recorder.run([user("u"), said("cut"), user("go on")], said("b"))
    assert batch(recorder).column("truncated").to_pylist() == [False]


@pytest.mark.parametrize("reward", [None, 0.0, -1.5])
def test_no_reward_is_not_zero(reward: float | None) -> None:
    one = batch(reward=reward)
    assert one.column("reward").to_pylist() == [reward, reward]
    assert [row["reward"] for row in json.loads(to_json_rows(one))] == [reward, reward]


def test_a_sampled_token_of_probability_one_is_not_null() -> None:
    """0.0 is a log-probability; what was not sampled is null."""
    recorder = Recorder()
    recorder.run([user("u")], said("a"), logprobs=array("f", [0.0, -0.0]))
    [logprobs] = batch(recorder).column("logprobs").to_pylist()
    assert logprobs == [None, None, None, 0.0, 0.0]
    assert math.copysign(1, logprobs[-1]) == -1


def test_a_message_as_chat_completions_writes_it() -> None:
    assert chat_message(Message("assistant", "", "")) == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "",
    }
    assert chat_message(Message("tool", None, tool_call_id="", name="")) == {
        "role": "tool", "content": None, "tool_call_id": "", "name": "",
    }  # fmt: skip
    made = chat_message(Message("assistant", None, None, (ToolCall("i", "n", "{"),)))
    assert made["tool_calls"] == [
        {"id": "i", "type": "function", "function": {"name": "n", "arguments": "{"}}
    ]


# -- the forms agree


def test_arrow_holds_the_schema_and_valid_memory() -> None:
    one = batch()
    one.validate(full=True)
    assert one.schema.equals(SAMPLES, check_metadata=True)
    with pa.ipc.open_stream(to_arrow_stream(one)) as reader:
        assert reader.schema.equals(SAMPLES, check_metadata=True)
        assert reader.read_all().to_batches()[0].equals(one)


def test_nothing_recorded_is_an_empty_batch() -> None:
    one = batch(Recorder())
    one.validate(full=True)
    assert (one.num_rows, one.schema, to_json_rows(one)) == (0, SAMPLES, b"[]")
    with pa.ipc.open_stream(to_arrow_stream(one)) as reader:
        assert reader.read_all().num_rows == 0


SHAPES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), min_size=1, max_size=4)


@settings(deadline=None)
@given(st.lists(SHAPES, max_size=4), st.randoms(use_true_random=False))
def test_json_and_arrow_say_what_the_tapes_say(shapes: list[list[tuple[int, int, bool]]], rng: Any) -> None:
    """Tapes of every shape, empty ones too, with hard float32 values, beside the plainest reading."""
    tapes: list[Tape] = []
    for number, shape in enumerate(shapes):
        path = [
            turn(
                f"{number}-{index}",
                prompt=[rng.randrange(2**31) for _ in range(num_prompt)],
                completion=[rng.randrange(2**31) for _ in range(num_sampled)],
                logprobs=array(
                    "f", [-rng.random() * 10.0 ** rng.randint(-40, 30) for _ in range(num_sampled)]
                ),
            )
            for index, (num_prompt, num_sampled, _) in enumerate(shape)
        ]
        tapes.append(
            lay_out(
                path,
                {t.turn_id for t, (*_, trained) in zip(path, shape, strict=True) if trained},
                labels(path),
            )
        )
    one = samples(record(), tapes)
    one.validate(full=True)
    rows = one.to_pylist()
    for tape, row in zip(tapes, rows, strict=True):
        assert row["token_ids"] == list(tape.token_ids)
        assert row["loss_mask"] == list(tape.loss_mask)
        assert row["logprobs"] == [
            p if m else None for m, p in zip(tape.loss_mask, tape.logprobs, strict=True)
        ]
    decoded = msgspec.json.decode(to_json_rows(one))
    assert decoded == rows
    for a, b in zip(rows, decoded, strict=True):  # the float32 survives JSON to the last bit
        assert packed(a["logprobs"]) == packed(b["logprobs"])


def packed(values: list[float | None]) -> list[bytes | None]:
    return [None if v is None else struct.pack("f", v) for v in values]


def test_a_tape_whose_arrays_disagree_is_not_exported() -> None:
    [tape, _] = recorded().tree.tapes()
    for name in ("token_ids", "loss_mask", "logprobs"):
        broken = replace(tape, **{name: getattr(tape, name)[:-1]})
        with pytest.raises(InternalError, match="tape t2: arrays of different lengths"):
            samples(record(), [broken])


def test_the_control_a_tape_that_lies_is_seen_in_its_row() -> None:
    [tape, other] = recorded().tree.tapes()
    mask = array("b", tape.loss_mask)
    mask[0] = 1
    rows = samples(record(), [replace(tape, loss_mask=mask), other]).to_pylist()
    assert check_samples(rows) == ["sample t2: token 0: mask 1 outside every turn's completion"]


# -- staleness


@pytest.fixture
async def store_of_three(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    """Sessions s1 to s3, each a step newer; s2 has tokens of both its steps."""
    store = SQLiteStore(tmp_path / "s.sqlite")
    for version in ("9", "10", "11"):
        await store.put_version(version, "engine")
    spans = {
        "s1": (VersionSpan("9", 0, 2),),
        "s2": (VersionSpan("10", 0, 1), VersionSpan("11", 1, 2)),
        "s3": (VersionSpan("11", 0, 2),),
    }
    for session_id, versions in spans.items():
        await store.put_session(record(session_id))
        await store.put_turns(session_id, [turn(f"t-{session_id}", versions=versions)])
    yield store
    await store.aclose()


@pytest.mark.parametrize(
    ("max_staleness", "at_version", "kept"),
    [
        (None, None, ["s1", "s2", "s3"]),
        (2, None, ["s1", "s2", "s3"]),
        (1, None, ["s2", "s3"]),
        (0, None, ["s3"]),
        (0, "10", ["s2", "s3"]),
        (0, "9", ["s1", "s2", "s3"]),
    ],
)
async def test_stale_sessions_are_left_out(
    store_of_three: SQLiteStore, max_staleness: int | None, at_version: str | None, kept: list[str]
) -> None:
    stale: list[str] = []
    batches = stored_samples(
        store_of_three, max_staleness=max_staleness, at_version=at_version, on_stale=stale.append
    )
    assert [row["session_id"] async for one in batches for row in one.to_pylist()] == kept
    assert sorted([*kept, *stale]) == ["s1", "s2", "s3"]


async def test_a_version_that_was_never_seen(store_of_three: SQLiteStore) -> None:
    with pytest.raises(ConfigError, match="oldest first: 9, 10, 11"):
        _ = [one async for one in stored_samples(store_of_three, max_staleness=1, at_version="12")]


def test_the_order_of_versions() -> None:
    assert list(version_order(["10", "9", "9", "11"])) == ["9", "10", "11"]
    assert list(version_order(["step-20", "step-4", "step-100"])) == ["step-4", "step-20", "step-100"]
    assert list(version_order(["e2-s1", "e1-s30", "e1-s4"])) == ["e1-s4", "e1-s30", "e2-s1"]
    assert version_order(["b", "a", "b", "10", "9"]) == {"b": 0, "a": 1, "10": 2, "9": 3}
    assert version_order([]) == {}


# -- Parquet


async def test_parquet_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.parquet"
    batches = [batch(session_id="s1"), batch(Recorder()), batch(session_id="s2", reward=1.0)]
    assert await write_parquet(path, stream(batches)) == 4
    table = pq.read_table(path)
    assert table.schema.equals(SAMPLES)  # Parquet calls the items of a list "element"
    assert table.schema.metadata == SAMPLES.metadata
    assert table.to_pylist() == [row for one in batches for row in one.to_pylist()]
    assert check_samples(table.to_pylist()) == []
    assert pq.ParquetFile(path).num_row_groups == 2
    assert names(path.parent) == ["rows.parquet"]


async def test_no_rows_are_a_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    assert await write_parquet(path, stream([])) == 0
    assert (pq.read_table(path).num_rows, pq.read_schema(path).names) == (0, SAMPLES.names)


@pytest.mark.parametrize("before", [None, b"an earlier export"])
async def test_a_source_that_fails_leaves_what_was_there(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "rows.parquet"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(StoreError, match="gone"):
        await write_parquet(path, stream([batch(), StoreError("gone")]))
    assert (path.read_bytes() if path.exists() else None) == before
    assert names(tmp_path) == ([] if before is None else ["rows.parquet"])


async def test_rows_of_another_schema_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schema"):
        await write_parquet(tmp_path / "rows.parquet", stream([batch().drop_columns(["reward"])]))
    assert names(tmp_path) == []


async def test_a_path_that_cannot_be_written_is_a_wrong_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "file" / "rows.parquet", tmp_path / "directory", Path("/proc/no/rows.parquet")):
        with pytest.raises(ConfigError, match="cannot write"):
            await write_parquet(path, stream([batch()]))
    assert names(tmp_path) == ["directory", "file"]
    assert names(tmp_path / "directory") == []


async def test_thousands_of_rows_are_written_as_they_come(tmp_path: Path) -> None:
    """One batch at a time: the source is asked for the next only when the one before is out of hands."""
    one, num_batches = batch(), 1500
    held: list[int] = []

    async def source() -> AsyncIterator[pa.RecordBatch]:
        base = pa.total_allocated_bytes()
        for _ in range(num_batches):
            held.append(pa.total_allocated_bytes() - base)
            yield one

    path = tmp_path / "rows.parquet"
    assert await write_parquet(path, source()) == 2 * num_batches
    file = pq.ParquetFile(path)
    assert (file.metadata.num_rows, file.num_row_groups) == (2 * num_batches, num_batches)
    assert file.read_row_group(num_batches - 1).to_pylist() == one.to_pylist()
    assert max(held[1000:]) < 2 * max(held[10:500]) + 2**20  # no row of the past is kept
