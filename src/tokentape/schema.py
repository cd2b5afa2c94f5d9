"""Every stored column, declared once: what SQL tables and Arrow schemas are made of.

Two shapes: `TURNS`, `SESSIONS`, `FAILURES` and `WEIGHTS` are what the store keeps (deltas, one row a turn);
`SAMPLES` is what a trainer reads (one row a branch).
"""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec
import pyarrow as pa

from tokentape.tape import Origin, Turn
from tokentape.types import Json, Message, RoutedExperts, Sampling, Support, TokenRun, VersionSpan
from tokentape.volatile import Superseded

SCHEMA_VERSION = 3
VERSION_KEY = "tokentape.schema_version"
"""Where a file of samples states it, in its metadata."""

T = TypeVar("T")
Kind = Literal["text", "int", "real", "bool", "ids", "floats", "packed", "json"]
_SQL: Mapping[Kind, str] = {
    "text": "TEXT",
    "int": "INTEGER",
    "real": "REAL",
    "bool": "INTEGER",
    "ids": "BLOB",  # little-endian int32
    "floats": "BLOB",  # little-endian float32
    "packed": "BLOB",  # msgpack
    "json": "TEXT",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the store: `nullable` ones may be NULL, `key` ones together are the primary key."""

    name: str
    kind: Kind
    nullable: bool = False
    key: bool = False


SESSIONS = (
    Column("session_id", "text", key=True),
    Column("state", "text"),
    Column("created_at", "real"),
    Column("metadata", "json"),
    Column("sampling", "json"),
    Column("max_turns", "int", nullable=True),
    Column("max_tokens", "int", nullable=True),
    Column("deadline", "real", nullable=True),
    Column("reward", "real", nullable=True),
    Column("group_id", "text", nullable=True),
    Column("turn_rewards", "json"),
    Column("branch_rewards", "json"),
)
TURNS = (
    Column("turn_id", "text", key=True),
    Column("session_id", "text"),
    Column("parent_id", "text", nullable=True),
    Column("branch_reason", "text", nullable=True),
    Column("prompt", "ids"),
    Column("completion", "ids"),
    Column("logprobs", "floats"),
    Column("versions", "json"),
    Column("logprob_basis", "text"),
    Column("support", "packed", nullable=True),
    Column("routed_experts", "packed", nullable=True),
    Column("finish_reason", "text"),
    Column("stop_id", "int", nullable=True),
    Column("messages", "json"),
    Column("reply", "json"),
    Column("in_reasoning", "bool"),
    Column("parse_status", "text"),
    Column("attempts", "json"),
    Column("tools", "json", nullable=True),  # with `arguments`: a root's; every other turn has its parent's
    Column("arguments", "json", nullable=True),
    Column("sampling", "json"),
    Column("neutralised", "json"),
    Column("superseded", "json"),
    Column("origin", "json"),
    Column("num_cached_tokens", "int", nullable=True),
    Column("created_at", "real"),
)
FAILURES = (
    Column("session_id", "text"),
    Column("kind", "text"),
    Column("message", "text"),
    Column("num_tokens", "int"),
    Column("created_at", "real"),
)
WEIGHTS = (  # every version ever seen, in the order in which they came last: the rows' own
    Column("version", "text", key=True),
    Column("first_seen_at", "real"),
    Column("said_by", "text"),  # "engine" or "caller"
)

SAMPLES = pa.schema(
    [
        pa.field("session_id", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("group_id", pa.string()),
        pa.field("branch_reason", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("label_by", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.int8()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field(
            "weight_versions",
            pa.list_(pa.struct([("version", pa.string()), ("start", pa.int32()), ("end", pa.int32())])),
            nullable=False,
        ),
        pa.field("sampling_logprobs", pa.list_(pa.float32())),
        pa.field("support", pa.list_(pa.list_(pa.int32()))),
        pa.field(
            "routed_experts",
            pa.struct([("data", pa.large_binary()), ("dtype", pa.string()), ("width", pa.int32())]),
        ),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field(
            "turns",
            pa.list_(
                pa.struct(
                    [
                        ("turn_id", pa.string()),
                        ("start", pa.int32()),
                        ("end", pa.int32()),
                        ("finish_reason", pa.string()),
                        ("trained", pa.bool_()),
                        ("parse_status", pa.string()),
                        ("label", pa.string()),
                        ("logprob_basis", pa.string()),
                        ("reward", pa.float64()),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("reward", pa.float64()),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("messages", pa.string(), nullable=False),
        pa.field("tools", pa.string(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)


def create_table(name: str, columns: tuple[Column, ...]) -> str:
    """The SQL statement that makes a table of these columns, if it is not there."""
    lines = [f"{c.name} {_SQL[c.kind]}{'' if c.nullable else ' NOT NULL'}" for c in columns]
    keys = ", ".join(c.name for c in columns if c.key)
    if keys:
        lines.append(f"PRIMARY KEY ({keys})")
    return f"CREATE TABLE IF NOT EXISTS {name} ({', '.join(lines)})"


def insert_into(name: str, columns: tuple[Column, ...]) -> str:
    """The SQL statement that inserts one row, its values by name."""
    names = [c.name for c in columns]
    return f"INSERT INTO {name} ({', '.join(names)}) VALUES (:{', :'.join(names)})"  # noqa: S608  # our names


def turn_to_row(session_id: str, turn: Turn) -> dict[str, Any]:
    """A turn as values of `TURNS`."""
    values: dict[str, Any] = {c.name: getattr(turn, c.name) for c in TURNS if c.name != "session_id"}
    values |= {
        "session_id": session_id,
        "prompt": turn.prompt.ids.tobytes(),
        "completion": turn.completion.ids.tobytes(),
        "logprobs": turn.logprobs.tobytes(),
    }
    values |= {c.name: to_json(values[c.name]) for c in TURNS if c.kind == "json"}
    values |= {c.name: _pack(values[c.name]) for c in TURNS if c.kind == "packed"}
    if turn.parent_id is not None:
        values["tools"] = values["arguments"] = None
    return values


def rows_to_turns(rows: Iterable[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """The turns of one session that `turn_to_row` stored, parents before their children."""
    turns: dict[str, Turn] = {}
    for row in rows:
        parent = turns[row["parent_id"]] if row["parent_id"] is not None else None
        turns[row["turn_id"]] = _turn(row, parent)
    return tuple(turns.values())


def _turn(row: Mapping[str, Any], parent: Turn | None) -> Turn:
    logprobs = array("f")
    logprobs.frombytes(row["logprobs"])
    return Turn(
        turn_id=row["turn_id"],
        parent_id=row["parent_id"],
        branch_reason=row["branch_reason"],
        prompt=_run(row["prompt"]),
        completion=_run(row["completion"]),
        logprobs=logprobs,
        versions=tuple(from_json(row["versions"], list[VersionSpan])),
        logprob_basis=row["logprob_basis"],
        support=_unpack(row["support"], Support),
        routed_experts=_unpack(row["routed_experts"], RoutedExperts),
        finish_reason=row["finish_reason"],
        stop_id=row["stop_id"],
        messages=tuple(from_json(row["messages"], list[Message])),
        reply=from_json(row["reply"], Message),
        in_reasoning=bool(row["in_reasoning"]),
        parse_status=row["parse_status"],
        attempts=tuple(from_json(row["attempts"], list[Json])),
        tools=parent.tools if parent is not None else tuple(from_json(row["tools"], list[Json])),
        arguments=parent.arguments if parent is not None else from_json(row["arguments"], Json),
        sampling=from_json(row["sampling"], Sampling),
        neutralised=tuple(from_json(row["neutralised"], list[str])),
        superseded=tuple(from_json(row["superseded"], list[Superseded])),
        origin=from_json(row["origin"], Origin),
        num_cached_tokens=row["num_cached_tokens"],
        created_at=row["created_at"],
    )


def to_json(value: object) -> str:
    """JSON text of a value that a column holds."""
    return msgspec.json.encode(value).decode()


def from_json(text: str, type_: Any) -> Any:
    """The value back, as `type_`."""
    return msgspec.json.decode(text, type=type_)


def _pack(value: object) -> bytes | None:
    return None if value is None else msgspec.msgpack.encode(value)


def _unpack(blob: bytes | None, type_: type[T]) -> T | None:
    return None if blob is None else msgspec.msgpack.decode(blob, type=type_)


def _run(blob: bytes) -> TokenRun:
    ids: array[int] = array("i")
    ids.frombytes(blob)
    return TokenRun(ids)
