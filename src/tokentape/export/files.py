"""A trainer's rows in a file: Parquet or JSON lines, written without having all of them in memory."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast, overload

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import pyarrow as pa
import pyarrow.parquet as pq

from tokentape.errors import ConfigError
from tokentape.export.row import Row, read_rows
from tokentape.export.samples import appearing
from tokentape.types import Json

JSON_LINES = ".jsonl"
_JSON_COLUMNS = b"tokentape.json_columns"
_ROW_GROUP = 64


class FileSamples(Sequence[Row]):
    """The samples of a Parquet file, to be read as often as wanted; few are in memory at a time.

    A trainer's `rows` look at all samples, several times, and keep none: so that they number groups and see
    what only some samples have as they do for a list.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with pq.ParquetFile(path) as file:
            self._num_rows = file.metadata.num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[Row]:
        return read_rows(self._path)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return next(islice(self, at, None))


def write_rows(path: Path, make: Callable[[], Iterator[Json]]) -> int:
    """Write the rows that `make` gives, anew at each call, and return how many.

    JSON lines where the name ends in `.jsonl`, else Parquet. There a column in which any row has an object is
    JSON text, as in samples themselves (objects of one column differ in their keys, and Arrow would fill them
    up); which ones, the file's metadata says, and `read_exported` reads them. A name that only some rows have
    is null in the others. The file appears whole or not at all.

    Raises:
        ConfigError: as `make`; the file cannot be written; a value is no JSON; a column's values are of
            several types, which Parquet does not hold.
    """
    with appearing(path) as partial:
        if path.suffix == JSON_LINES:
            return _write_lines(partial, make())
        schema, num_rows = _schema(path, make()), 0
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for rows in _chunks(make()):
                texts = _texts(rows, _json_columns(schema))
                columns = [_array(path, f.name, [row.get(f.name) for row in texts], f.type) for f in schema]
                writer.write_table(pa.table(columns, schema=schema))
                num_rows += len(rows)
        return num_rows


def read_exported(path: str | Path) -> Iterator[Json]:
    """The rows of a file that `write_rows` wrote, of either kind.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if Path(path).suffix == JSON_LINES:
            with Path(path).open(encoding="ascii") as lines:
                for line in lines:
                    yield json.loads(line)
            return
        with pq.ParquetFile(path) as file:
            names = _json_columns(file.schema_arrow)
            for index in range(file.num_row_groups):
                for row in file.read_row_group(index).to_pylist():
                    yield {
                        name: json.loads(value) if name in names and value is not None else value
                        for name, value in row.items()
                    }
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are both
        raise ConfigError(f"{path} is no file of exported rows: {error}") from error


def _write_lines(path: Path, rows: Iterator[Json]) -> int:
    num_rows = 0
    with path.open("w", encoding="ascii") as file:
        for row in rows:
            file.write(_json(row) + "\n")
            num_rows += 1
    return num_rows


def _json(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a row holds what JSON does not: {error}") from error


def _chunks(rows: Iterator[Json]) -> Iterator[list[Json]]:
    while chunk := list(islice(rows, _ROW_GROUP)):
        yield chunk


def _schema(path: Path, rows: Iterator[Json]) -> pa.Schema:
    """The columns of all rows, in the order of their first appearance."""
    types: dict[str, pa.DataType] = {}
    with_objects: set[str] = set()
    for row in rows:
        for name, value in row.items():
            types.setdefault(name, pa.null())
            if _has_object(value):
                with_objects.add(name)
                continue
            found = _array(path, name, [value]).type
            try:
                types[name] = _joined(types[name], found)
            except pa.ArrowException as error:
                raise _unfit(path, name, error) from error
    fields = [pa.field(n, pa.string() if n in with_objects else type_) for n, type_ in types.items()]
    return pa.schema(fields, metadata={_JSON_COLUMNS: json.dumps(sorted(with_objects)).encode()})


def _array(path: Path, name: str, values: list[Any], type_: pa.DataType | None = None) -> Any:
    """Values of one column; `type_` None: the one that they have.

    Lone surrogates are a ValueError, integers beyond 64 bits an OverflowError.
    """
    try:
        return pa.array(values, type_)
    except (pa.ArrowException, OverflowError, ValueError) as error:
        raise _unfit(path, name, error) from error


def _joined(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """One type for both: nulls and empty lists are of any type, integers may be floats."""
    if first == second or pa.types.is_null(first):
        return second
    schemas = [pa.schema([("value", type_)]) for type_ in (first, second)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("value").type


def _unfit(path: Path, name: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"column {name} holds what Parquet does not, values of several types or out of its range "
        f"({' '.join(str(error).split())}): write JSON lines, --out {path.with_suffix(JSON_LINES)}"
    )


def _has_object(value: Any) -> bool:
    """Whether an object is in it; a list's first value speaks for numbers, where no list mixes the two."""
    if isinstance(value, list):
        values = cast("list[Any]", value)
        if values and isinstance(values[0], (int, float)):
            return False
        return any(map(_has_object, values))
    return isinstance(value, dict)


def _json_columns(schema: pa.Schema) -> frozenset[str]:
    metadata = cast("Mapping[bytes, bytes]", schema.metadata or {})
    return frozenset(json.loads(metadata.get(_JSON_COLUMNS, b"[]")))


def _texts(rows: Sequence[Json], names: frozenset[str]) -> list[Json]:
    return [
        {name: _json(value) if name in names and value is not None else value for name, value in row.items()}
        for row in rows
    ]
