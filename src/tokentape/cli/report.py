"""`tokentape report`."""

import random
from pathlib import Path

import click
import msgspec
import uvloop
from rich.console import Console

from tokentape.cli.scoring import scoring, tokenizer_of
from tokentape.cli.verify import TOLERANCES
from tokentape.engines.sglang import SGLangConfig
from tokentape.errors import ConfigError
from tokentape.export.files import appearing
from tokentape.export.row import sessions_in
from tokentape.model import model_directory
from tokentape.report import report as make_report
from tokentape.report.figures import Mismatch
from tokentape.report.links import DEFAULT_VIEWER, checked_viewer
from tokentape.report.page import page
from tokentape.report.show import summary
from tokentape.tokenizer import Tokenizer
from tokentape.verify import verify


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="HTML",
    help="The page to write. Default: report.html; with --json none.",
)
@click.option("--model", help="Model directory or hub id: its tokenizer says which turns would drift.")
@click.option(
    "--engine", "url", metavar="URL", help="An engine with the weights: recompute log-probabilities."
)
@click.option(
    "--engine-sessions",
    "num_sessions",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Sessions that the engine recomputes, drawn by chance.",
)
@click.option("--engine-api-key", envvar="TOKENTAPE_ENGINE_API_KEY", help="The key that the engine asks for.")
@click.option(
    "--viewer",
    default=DEFAULT_VIEWER,
    show_default=True,
    metavar="URL",
    help="Where the viewer is: a gateway's /ui/. Links to samples begin with it.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="The same figures as one JSON object; see docs/report.md."
)
def report(
    file: Path,
    out: Path | None,
    model: str | None,
    url: str | None,
    num_sessions: int,
    engine_api_key: str | None,
    viewer: str,
    as_json: bool,
) -> None:
    """Look at a Parquet file of samples: rewards, lengths, branches, staleness, what is odd.

    One self-contained page, and a summary here. Exit code 0 whatever the figures say; 2: file, engine or an
    option cannot be used.
    """
    checked_viewer(viewer)
    mismatch = tokenizer = None
    if url is not None:
        mismatch, tokenizer = uvloop.run(_mismatch(file, url, model, num_sessions, engine_api_key))
    elif model is not None:
        tokenizer = tokenizer_of(model_directory(model))
    found = make_report(file, tokenizer=tokenizer, mismatch=mismatch, viewer=viewer)
    if out is None and not as_json:
        out = Path("report.html")
    if out is not None:
        with appearing(out) as partial:
            partial.write_text(page(found), encoding="utf-8")
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    Console().print(summary(found), highlight=False, soft_wrap=True)
    click.echo(f"written to {out}")


async def _mismatch(
    file: Path, url: str, model: str | None, num_sessions: int, api_key: str | None
) -> tuple[Mismatch, Tokenizer]:
    """What an engine makes of some sessions, and the tokenizer of its model."""
    async with scoring(SGLangConfig(url, api_key=api_key), model) as found:
        engine = found.engine
        if found.info.differs:
            raise ConfigError(
                f"{url} is a router whose servers have different weights: give one server's URL"
            )
        names = sorted(sessions_in(file))
        drawn = random.Random(0).sample(names, min(num_sessions, len(names)))  # noqa: S311  # not secret: the same each time
        tolerance, max_share = TOLERANCES["float32" if await engine.dtype() == "float32" else "other"]
        verified = await verify(
            file,
            engine,
            engine_version=found.info.weight_version,
            vocab_size=engine.vocab_size,
            tolerance=tolerance,
            max_share=max_share,
            sessions=frozenset(drawn),
        )
    problems = tuple(verified.problems)
    return Mismatch(num_sessions=len(drawn), problems=problems, verified=verified), found.tokenizer
