"""`tokentape export`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import uvloop

from tokentape.errors import ConfigError
from tokentape.export import (
    TRAINERS,
    FileSamples,
    read_rows,
    stored_samples,
    to_json_lines,
    write_parquet,
    write_rows,
)
from tokentape.store import SQLiteStore


@click.command()
@click.option(
    "--store",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A gateway's store.",
)
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The Parquet file to write."
)
@click.option(
    "--session", "session_ids", multiple=True, metavar="ID", help="Only this session; may be repeated."
)
@click.option(
    "--max-staleness",
    type=click.IntRange(min=0),
    metavar="N",
    help="Leave out sessions with tokens of weights more than N versions older than the newest.",
)
@click.option("--at-version", metavar="VERSION", help="Count --max-staleness from this version instead.")
def export(
    store: Path, out: Path, session_ids: Sequence[str], max_staleness: int | None, at_version: str | None
) -> None:
    """Write the tapes of a store to a Parquet file, one row a branch.

    Sessions that are still open are exported as they are.
    """
    if at_version is not None and max_staleness is None:
        raise ConfigError("--at-version needs --max-staleness")
    stale: list[str] = []

    async def run() -> int:
        source = SQLiteStore(store, readonly=True)
        try:
            batches = stored_samples(
                source,
                session_ids,
                max_staleness=max_staleness,
                at_version=at_version,
                on_stale=stale.append,
            )
            return await write_parquet(out, batches)
        finally:
            await source.aclose()

    num_rows = uvloop.run(run())
    left_out = f", {len(stale)} sessions left out: too stale" if stale else ""
    click.echo(f"{num_rows} samples in {out}{left_out}")
