"""`tokentape doctor`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import uvloop
from rich.console import Console

from tokentape.cli.options import PORT, STORE
from tokentape.doctor import Check
from tokentape.doctor.checks import Checks, is_well
from tokentape.doctor.engine import check_engine
from tokentape.doctor.machine import check_machine
from tokentape.doctor.model import Model, check_model
from tokentape.doctor.show import table
from tokentape.doctor.sqlite import check_sqlite
from tokentape.formatfile import read_formats
from tokentape.stores import is_shared


@click.command()
@click.option(
    "--model", help="Model directory or hub id, as `serve` would be given it; nothing is downloaded."
)
@click.option("--engine", "engines", multiple=True, metavar="URL", help="An engine's URL; may be repeated.")
@click.option("--store", type=STORE, help="The store: a SQLite file, there or not, or postgresql://…")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that would be listened on.")
@click.option("--port", type=PORT, default=8000, show_default=True, help="Port that would be listened on.")
@click.option(
    "--formats",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="TOML file of formats of your own; see docs/formats.md.",
)
@click.option("--engine-api-key", envvar="TOKENTAPE_ENGINE_API_KEY", help="The key that the engine asks for.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object instead of a table; see docs/doctor.md."
)
def doctor(
    model: str | None,
    engines: Sequence[str],
    store: Path | str | None,
    host: str,
    port: int,
    formats: Path | None,
    engine_api_key: str | None,
    as_json: bool,
) -> None:
    """Check machine, model, engine and store before a run, and say what to change.

    Give what `serve` would be given; what is not given is not checked. Nothing is changed: an engine samples
    four tokens, a store is only read. Exit code 0: nothing is wrong. 1: something is. 2: an option cannot be
    used.
    """
    own = () if formats is None else read_formats(formats)
    checks = check_machine(host, port)
    known: Model | None = None
    if model is not None:
        known, found = check_model(model, own)
        checks += found
    for url in engines:
        checks += uvloop.run(check_engine(url, known, engine_api_key))
    if store is not None:
        checks += _store(store, None if known is None else known.renderer.tokenizer.fingerprint)
    if as_json:
        click.echo(msgspec.json.encode({"ok": is_well(checks), "checks": checks}).decode())
    else:
        Console().print(table(checks), highlight=False)
    if not is_well(checks):
        sys.exit(1)


def _store(store: Path | str, fingerprint: str | None) -> list[Check]:
    if not is_shared(store):
        return check_sqlite(Path(store), fingerprint)
    try:
        from tokentape.doctor.postgres import check_postgres
    except ImportError as error:
        checks = Checks("store")
        checks.wrong("package", f"psycopg is not installed: {error}", "pip install 'tokentape[postgres]'")
        return checks.found
    return check_postgres(str(store), fingerprint)
