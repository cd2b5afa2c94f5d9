"""`tokentape demo`."""

import sys
from pathlib import Path

import click
import uvloop

from tokentape.errors import ConfigError


@click.command()
@click.option(
    "--episodes", type=click.IntRange(min=1), default=32, show_default=True, help="How many episodes."
)
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=8, show_default=True, help="How many at a time."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Directory for the store and rollouts.parquet.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of questions and sampling.")
def demo(episodes: int, concurrency: int, out: Path, seed: int) -> None:
    """Run the whole loop on the embedded engine, without a network.

    A small arithmetic agent, written with the openai SDK, talks to a gateway that talks to the bundled model.
    The exact tapes end up in OUT/rollouts.parquet; a summary says what happened.
    """
    try:
        from tokentape.demo.run import run_demo
    except ImportError as error:
        raise ConfigError(f"the demo needs its extra: pip install 'tokentape[demo]' ({error})") from error
    ok = uvloop.run(run_demo(episodes=episodes, concurrency=concurrency, out=out, seed=seed))
    if not ok:
        sys.exit(1)
