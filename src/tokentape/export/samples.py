"""Tapes → samples: the rows that trainers read, as Arrow, Parquet or JSON."""

import contextlib
import shutil
import tempfile
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (pyarrow's stubs leave the element types of arrays open)
import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokentape.errors import ConfigError, InternalError
from tokentape.schema import SAMPLES, to_json
from tokentape.store import SessionRecord, Store
from tokentape.tape import Tape, Turn, TurnSpan, version_order
from tokentape.tree import Tree
from tokentape.types import Json, Message, RoutedExperts, Support, ToolCall


def samples(record: SessionRecord, tapes: Sequence[Tape]) -> pa.RecordBatch:
    """One row a tape, columns `schema.SAMPLES`. Arrays go over as they are: no Python object per token.

    Raises:
        InternalError: a tape's arrays are not of one length.
    """
    for tape in tapes:
        if not len(tape.token_ids) == len(tape.loss_mask) == len(tape.logprobs):
            raise InternalError(f"tape {tape.turns[-1].turn.turn_id}: arrays of different lengths")
    rows = [_scalars(record, tape) for tape in tapes]
    columns: list[Any] = []
    for field in SAMPLES:
        match field.name:
            case "token_ids":
                columns.append(_lists([tape.token_ids for tape in tapes], pa.int32()))
            case "loss_mask":
                columns.append(_lists([tape.loss_mask for tape in tapes], pa.int8()))
            case "logprobs":
                columns.append(
                    _lists([t.logprobs for t in tapes], pa.float32(), [t.loss_mask for t in tapes])
                )
            case name:
                columns.append(pa.array([row[name] for row in rows], field.type))
    return pa.RecordBatch.from_arrays(columns, schema=SAMPLES)


async def stored_samples(
    store: Store,
    session_ids: Sequence[str] = (),
    *,
    finished: bool = False,
    without: Container[str] = (),
    max_staleness: int | None = None,
    at_version: str | None = None,
    on_stale: Callable[[str], None] = lambda _: None,
) -> AsyncGenerator[pa.RecordBatch]:
    """The samples of these sessions, or of all in the store; one session is in memory at a time.

    `finished`: only of sessions that no longer change. Those `without` are left out.
    With `max_staleness` a session is left out whole, and `on_stale` is told its id, where weights that
    sampled in it are more than so many versions older than `at_version` (None: the newest in the store).

    Raises:
        ConfigError: the store has no such session, or no such version; it is to be finished, and is not.
    """
    after = ""
    fresh = (
        frozenset[str]() if max_staleness is None else await _fresh_versions(store, max_staleness, at_version)
    )
    while True:
        state = "finished" if finished else None
        ids = session_ids or [
            record.session_id for record in await store.list_sessions(state=state, after=after, limit=200)
        ]
        for session_id in ids:
            if session_id in without:
                continue
            stored = await store.read(session_id)
            if stored is None and not session_ids:
                continue  # a gateway beside us has deleted it
            if stored is None:
                raise ConfigError(
                    f"session {session_id}: the store has no such session; GET /sessions lists them"
                )
            if finished and stored.record.state != "finished":
                raise ConfigError(
                    f"session {session_id} is {stored.record.state}: only finished ones are final"
                )
            sampled_by = {span.version for turn in stored.turns for span in turn.versions}
            if max_staleness is not None and not sampled_by <= fresh:
                on_stale(session_id)
                continue
            tree = Tree(())
            for turn in stored.turns:
                tree.commit(turn)
            yield samples(stored.record, tree.tapes())
        if session_ids or not ids:
            return
        after = ids[-1]


async def _fresh_versions(store: Store, max_staleness: int, at_version: str | None) -> frozenset[str]:
    """The versions that are at most so many older than `at_version`; newer ones are fresh."""
    order = version_order([version for version, _ in await store.versions()])
    if at_version is not None and at_version not in order:
        known = ", ".join(sorted(order, key=order.__getitem__)) or "none"
        raise ConfigError(f"version {at_version!r} was never seen; those in the store, oldest first: {known}")
    now = max(order.values(), default=0) if at_version is None else order[at_version]
    return frozenset(version for version, place in order.items() if place >= now - max_staleness)


def to_json_rows(batch: pa.RecordBatch) -> bytes:
    """The samples as a JSON list of objects, as `GET /sessions/{id}/samples` answers them."""
    return msgspec.json.encode(batch.to_pylist())


def to_arrow_stream(batch: pa.RecordBatch) -> bytes:
    """The samples as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SAMPLES) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


async def write_parquet(path: Path, batches: AsyncIterator[pa.RecordBatch]) -> int:
    """Write samples to a Parquet file, one row group a batch, and return how many.

    The file appears whole or not at all: it is written under another name and moved.

    Raises:
        ConfigError: the file cannot be written.
    """
    num_rows = 0
    with appearing(path) as partial, pq.ParquetWriter(partial, SAMPLES, compression="zstd") as writer:
        async for batch in batches:
            if batch.num_rows:
                writer.write_batch(batch)
                num_rows += batch.num_rows
    return num_rows


@contextlib.contextmanager
def appearing(path: Path) -> Generator[Path]:
    """Another name to write under; the file gets its own when all went well.

    A link stays one, what it leads to appears. A device or a pipe is written to: a file in its place would
    be the whole machine's.

    Raises:
        ConfigError: the file cannot be written.
    """
    partial = None
    try:
        if path.exists() and not path.is_file():
            with tempfile.TemporaryDirectory() as folder:
                yield (made := Path(folder) / path.name)  # Parquet cannot be written where nobody can seek
                with made.open("rb") as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out)
            return
        target = path.resolve()
        partial = target.with_name(f".{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):  # a path that cannot be: nothing is there
                partial.unlink(missing_ok=True)


def chat_message(message: Message) -> Json:
    """A message as OpenAI Chat Completions writes it."""
    out: Json = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        out["reasoning_content"] = message.reasoning
    if message.tool_calls:
        out["tool_calls"] = [chat_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        out["name"] = message.name
    return out


def chat_call(call: ToolCall) -> Json:
    """A tool call as OpenAI Chat Completions writes it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _scalars(record: SessionRecord, tape: Tape) -> Json:
    """Everything of a sample that is not per token."""
    path = [span.turn for span in tape.turns]
    leaf = path[-1]
    metadata = dict(record.metadata)
    if notes := _notes(path):
        metadata["tokentape"] = notes
    conversation = [chat_message(m) for turn in path for m in (*turn.messages, turn.reply)]
    return {
        "session_id": record.session_id,
        "sample_id": leaf.turn_id,
        "group_id": record.group_id,
        "branch_reason": tape.branch_reason,
        "label": tape.label.name,
        "label_by": tape.label.by,
        "weight_versions": [{"version": v.version, "start": v.start, "end": v.end} for v in tape.versions],
        "sampling_logprobs": _sampling_logprobs(tape),
        "support": _support(tape),
        "routed_experts": _routed_experts(path),
        "num_prompt_tokens": tape.num_prompt_tokens,
        "turns": [
            {
                "turn_id": span.turn.turn_id,
                "start": span.start,
                "end": span.end,
                "finish_reason": span.turn.finish_reason,
                "trained": span.trained,
                "parse_status": span.turn.parse_status,
                "label": span.label.name,
                "logprob_basis": span.turn.logprob_basis,
                "reward": record.turn_rewards.get(span.turn.turn_id),
            }
            for span in tape.turns
        ],
        "reward": record.branch_rewards.get(leaf.turn_id, record.reward),
        "truncated": leaf.finish_reason == "length",
        "messages": to_json(conversation),
        "tools": to_json(leaf.tools),
        "sampling": to_json([turn.sampling for turn in path]),
        "metadata": to_json(metadata),
    }


def _captured(tape: Tape) -> list[tuple[TurnSpan, Support]]:
    """What truncation left, where this tape trains the turn and the engine was asked."""
    return [
        (span, span.turn.support) for span in tape.turns if span.trained and span.turn.support is not None
    ]


def _sampling_logprobs(tape: Tape) -> list[float | None] | None:
    captured = _captured(tape)
    if not captured:
        return None
    out: list[float | None] = [None] * len(tape)
    for span, support in captured:
        out[span.start : span.end] = array("f", support.logprobs)
    return out


def _support(tape: Tape) -> list[list[int] | None] | None:
    captured = _captured(tape)
    if not captured:
        return None
    out: list[list[int] | None] = [None] * len(tape)
    for span, support in captured:
        ids, end = array("i", support.ids).tolist(), 0
        for at, length in enumerate(array("i", support.lengths), start=span.start):
            out[at], end = ids[end : end + length], end + length
    return out


def _routed_experts(path: Sequence[Turn]) -> Json | None:
    """The rows of a path's turns, N-1 of them; None where a turn has none."""
    routed = RoutedExperts.joined([turn.routed_experts for turn in path])
    return None if routed is None else {"data": routed.data, "dtype": routed.dtype, "width": routed.width}


def _notes(path: Sequence[Turn]) -> Json:
    """What happened to the requests of a path, by the turn's id; nothing where nothing did.

    `superseded` texts were asked for where the prompt has other, recorded ones; `ignored` fields had no
    effect; `neutralised` control tokens are plain text.
    """
    notes: Json = {
        "superseded": {turn.turn_id: turn.superseded for turn in path if turn.superseded},
        "ignored": {turn.turn_id: turn.origin.ignored for turn in path if turn.origin.ignored},
        "neutralised": {turn.turn_id: turn.neutralised for turn in path if turn.neutralised},
    }
    return {name: note for name, note in notes.items() if note}


def _lists(
    runs: Sequence["array[Any]"], type_: pa.DataType, masks: Sequence["array[int]"] | None = None
) -> Any:
    """Arrays → one Arrow list column; where a mask is 0, null."""
    offsets = array("i", [0])
    for run in runs:
        offsets.append(offsets[-1] + len(run))
    values = pa.Array.from_buffers(type_, offsets[-1], [None, pa.py_buffer(_joined(runs))])
    if masks is not None:
        trained = pa.Array.from_buffers(pa.int8(), offsets[-1], [None, pa.py_buffer(_joined(masks))])
        values = pc.if_else(trained.cast(pa.bool_()), values, pa.scalar(None, type_))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _joined(runs: Iterable["array[Any]"]) -> bytes:
    return b"".join(run.tobytes() for run in runs)
