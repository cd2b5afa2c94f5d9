"""Samples that an older tokentape wrote, read as today's: what each schema version lacked, and what it means.

    version        lacked                                               read as
    1, 2           group_id, sampling_logprobs, support,                null: there were none
                   routed_experts, a turn's reward
    1, 2           a turn's logprob_basis                               what follows from `sampling`
    1, 2 at first  label, label_by, a turn's label                      null: nobody knows

Nothing is invented: what the file neither has nor implies is null, also where a column has no nulls today.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import msgspec
import pyarrow as pa

from tokentape.errors import ConfigError
from tokentape.schema import SAMPLES, SCHEMA_VERSION, VERSION_KEY, from_json
from tokentape.tape import LogprobBasis
from tokentape.types import Sampling

Row: TypeAlias = Mapping[str, Any]

_LATER = frozenset(
    ("group_id", "label", "label_by", "sampling_logprobs", "support", "routed_experts")
)  # the columns that version 1 had not
_LATER_IN_TURNS = frozenset(("label", "logprob_basis", "reward"))


def schema_version(name: str, schema: pa.Schema) -> int | None:
    """The schema version that a file states; None where it states none: another program wrote it anew.

    Raises:
        ConfigError: it is none, or a newer one than this tokentape knows. `name` is the file's.
    """
    text = (schema.metadata or {}).get(VERSION_KEY.encode())
    if text is None:
        return None
    if not text.isdigit():
        raise ConfigError(f"{name}: its schema version is {text.decode(errors='replace')!r}")
    if int(text) > SCHEMA_VERSION:
        raise ConfigError(
            f"{name} has schema version {int(text)}, this tokentape knows {SCHEMA_VERSION}: "
            "use a newer tokentape"
        )
    return int(text)


def upgrade(name: str, schema: pa.Schema) -> Callable[[Row], Row]:
    """What makes a row of a file with this schema one of today's; rows of no stated version stay as they are.

    Raises:
        ConfigError: as `schema_version`; an older file lacks what its version had.
    """
    version = schema_version(name, schema)
    if version is None or version == SCHEMA_VERSION:
        return lambda row: row
    lacking = [field for field in SAMPLES.names if field not in schema.names and field not in _LATER]
    lacking += [f"turns.{field}" for field in _lacking_in_turns(schema)]
    if lacking:
        raise ConfigError(f"{name} states schema version {version}, but has no {', '.join(lacking)}")
    return _upgraded


def _lacking_in_turns(schema: pa.Schema) -> list[str]:
    """What every version has of a turn and this file has not."""
    today = {field.name for field in SAMPLES.field("turns").type.value_type}
    if "turns" not in schema.names:
        return []  # said already
    type_ = schema.field("turns").type
    if not (pa.types.is_list(type_) and pa.types.is_struct(type_.value_type)):
        return sorted(today - _LATER_IN_TURNS)
    return sorted(today - _LATER_IN_TURNS - {field.name for field in type_.value_type})


def _upgraded(row: Row) -> Row:
    turns = row["turns"]
    if any("logprob_basis" not in turn for turn in turns):
        bases = _bases(row["sampling"], len(turns))
        missing = {"label": None, "reward": None}
        turns = [missing | turn | {"logprob_basis": basis} for turn, basis in zip(turns, bases, strict=True)]
    return {name: row.get(name) for name in SAMPLES.names} | {"turns": turns}


def _bases(sampling: str, num_turns: int) -> list[str | None]:
    """What `logprob_basis` came from ever since: how each turn was sampled. Null where the row is unclear."""
    try:
        samplings = from_json(sampling, list[Sampling])
    except msgspec.DecodeError:
        return [None] * num_turns
    if len(samplings) != num_turns:
        return [None] * num_turns
    return [LogprobBasis.of(one).value for one in samplings]
