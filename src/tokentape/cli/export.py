"""`tokentape export`."""

import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import uvloop

from tokentape.cli.options import STORE_THERE
from tokentape.errors import ConfigError
from tokentape.export import (
    TRAINERS,
    FileSamples,
    Trainer,
    export_dataset,
    stored_samples,
    write_parquet,
    write_rows,
)
from tokentape.export.dataset import PARTITION_MB, Partition
from tokentape.stores import open_store
from tokentape.types import Json


@click.command()
@click.option(
    "--store",
    required=True,
    type=STORE_THERE,
    help="A gateway's store: its SQLite file, or postgresql://…",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write: Parquet, or JSON lines where it ends in .jsonl.",
)
@click.option(
    "--dataset",
    metavar="URI",
    help="In place of --out: a folder of Parquet files, local or s3://… or gs://…, that gets the finished "
    "sessions it has not yet; see docs/datasets.md.",
)
@click.option(
    "--partition-mb",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"With --dataset: begin a new file after so many MiB; {PARTITION_MB} if not given.",
)
@click.option(
    "--format",
    "trainer_name",
    metavar="NAME",
    help=f"A trainer's rows in place of tokentape's own samples: {', '.join(TRAINERS)}.",
)
@click.option(
    "--experts-per-token",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --format, where experts were captured: how many a token is sent to in each layer.",
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
    store: Path | str,
    out: Path | None,
    dataset: str | None,
    partition_mb: int | None,
    trainer_name: str | None,
    experts_per_token: int | None,
    session_ids: Sequence[str],
    max_staleness: int | None,
    at_version: str | None,
) -> None:
    """Write the tapes of a store to a file or to a dataset, one row a branch.

    To a file, sessions that are still open are exported as they are; a dataset takes finished ones only.

    With --format all samples make one batch: groups are compared and counted over the whole file. They go to
    a file beside --out first, which is removed; few of them are in memory at a time. In Parquet, columns with
    objects are JSON text; `tokentape.export.read_exported` reads both kinds of file.
    """
    if at_version is not None and max_staleness is None:
        raise ConfigError("--at-version needs --max-staleness: give both, or neither")
    _check_target(out, dataset, partition_mb, trainer_name)
    trainer, options = _trainer(trainer_name, experts_per_token)
    stale: list[str] = []
    chosen: dict[str, Any] = {
        "max_staleness": max_staleness,
        "at_version": at_version,
        "on_stale": stale.append,
    }

    async def run() -> str:
        source = open_store(store, readonly=True)
        try:
            if out is None:
                size = PARTITION_MB if partition_mb is None else partition_mb
                return _added(
                    await export_dataset(source, str(dataset), session_ids, partition_mb=size, **chosen)
                )
            batches = stored_samples(source, session_ids, **chosen)
            if trainer is None and out.suffix != ".jsonl":
                return f"{await write_parquet(out, batches)} samples in {out}"
            return f"{await _write_rows(out, batches, trainer, options)} samples in {out}"
        finally:
            await source.aclose()

    said = uvloop.run(run())
    left_out = f", {len(stale)} sessions left out: too stale" if stale else ""
    click.echo(f"{said}{left_out}")


def _check_target(
    out: Path | None, dataset: str | None, partition_mb: int | None, trainer_name: str | None
) -> None:
    if (out is None) == (dataset is None):
        raise ConfigError("say where to: either --out FILE or --dataset URI")
    if dataset is None and partition_mb is not None:
        raise ConfigError("--partition-mb needs --dataset: one file has no partitions, leave it out")
    if dataset is not None and trainer_name is not None:
        raise ConfigError("--format needs --out: a trainer's rows are of one batch, a dataset grows")


def _added(new: Sequence[Partition]) -> str:
    num_sessions, num_rows = sum(p.sessions for p in new), sum(p.rows for p in new)
    return f"{num_rows} samples of {num_sessions} sessions added in {len(new)} partitions"


def _trainer(name: str | None, experts_per_token: int | None) -> tuple[Trainer | None, dict[str, Any]]:
    if name is not None and name not in TRAINERS:
        raise ConfigError(f"--format {name}: no such trainer; there are {', '.join(TRAINERS)}")
    trainer = None if name is None else TRAINERS[name]
    if experts_per_token is None:
        return trainer, {}
    if trainer is None or not trainer.takes_experts:
        takers = ", ".join(t.name for t in TRAINERS.values() if t.takes_experts)
        raise ConfigError(f"--experts-per-token needs a --format that takes routed experts: {takers}")
    return trainer, {"experts_per_token": experts_per_token}


async def _write_rows(
    out: Path, batches: AsyncIterator[Any], trainer: Trainer | None, options: dict[str, Any]
) -> int:
    """Through a Parquet file of samples, which can be read as often as a trainer's rows look at them."""
    kept = _beside(out) / f".{out.name}.samples"
    try:
        await write_parquet(kept, batches)
        samples = FileSamples(kept)

        def make() -> Iterator[Json]:
            if trainer is None:
                return map(msgspec.to_builtins, samples)  # as the control API answers: bytes are base64
            return trainer.rows(samples, **options)

        return write_rows(out, make)
    finally:
        kept.unlink(missing_ok=True)


def _beside(out: Path) -> Path:
    """Where there is room for a file beside --out: nobody leaves one beside a device."""
    return Path(tempfile.gettempdir()) if out.exists() and not out.is_file() else out.parent
