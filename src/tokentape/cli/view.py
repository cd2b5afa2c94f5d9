"""`tokentape view`."""

import contextlib
import webbrowser
from collections.abc import AsyncGenerator
from pathlib import Path

import click
import uvloop

from tokentape.cli.options import PORT, STORE_THERE, address, until_stopped
from tokentape.cli.scoring import scoring, tokenizer_of
from tokentape.engines.server import serve
from tokentape.engines.sglang import SGLangConfig
from tokentape.errors import ConfigError
from tokentape.model import model_directory
from tokentape.stores import is_shared, open_store
from tokentape.viewer.app import make_app
from tokentape.viewer.desk import Desk
from tokentape.viewer.files import FileSource
from tokentape.viewer.source import Source
from tokentape.viewer.stored import StoreSource

_PARQUET = b"PAR1"


@click.command()
@click.argument("what", metavar="FILE_OR_STORE", type=STORE_THERE)
@click.option("--model", help="Model directory or hub id: its tokenizer gives tokens their text.")
@click.option(
    "--engine", "url", metavar="URL", help="An engine with the weights, to recompute log-probabilities."
)
@click.option("--engine-api-key", envvar="TOKENTAPE_ENGINE_API_KEY", help="The key that the engine asks for.")
@click.option("--api-key", envvar="TOKENTAPE_API_KEY", help="Require this key from the page.")
@click.option("--host", type=address, default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=PORT, default=8080, show_default=True, help="Port to listen on; 0 picks a free one."
)
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
def view(
    what: Path | str,
    model: str | None,
    url: str | None,
    engine_api_key: str | None,
    api_key: str | None,
    host: str,
    port: int,
    opens: bool,
) -> None:
    """Look at sessions, branches and tokens in a browser: of a Parquet file of samples, or of a store.

    A running gateway shows its own sessions at /ui. The page only reads, and needs no network but this
    address.
    """
    uvloop.run(until_stopped(_serving(what, model, url, engine_api_key, api_key, host, port, opens)))


@contextlib.asynccontextmanager
async def _serving(
    what: Path | str,
    model: str | None,
    url: str | None,
    engine_api_key: str | None,
    api_key: str | None,
    host: str,
    port: int,
    opens: bool,
) -> AsyncGenerator[str]:
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(_source(what))
        tokenizer = engine = None
        if url is not None:
            if model is None:
                raise ConfigError("--engine needs --model: no id may be sent that the model does not have")
            config = SGLangConfig(url, api_key=engine_api_key)
            found = await stack.enter_async_context(scoring(config, model))
            tokenizer, engine = found.tokenizer, found.engine
        elif model is not None:
            tokenizer = tokenizer_of(model_directory(model))
        app = make_app(Desk(source, tokenizer, engine), api_key)
        page = f"{await stack.enter_async_context(serve(app, host, port, drain_s=1.0))}/ui/"
        if opens:
            webbrowser.open(page)
        yield page


@contextlib.asynccontextmanager
async def _source(what: Path | str) -> AsyncGenerator[Source]:
    if not is_shared(what) and _is_parquet(Path(what)):
        yield FileSource(Path(what))
        return
    store = open_store(what, readonly=True)
    try:
        yield StoreSource(store, "PostgreSQL" if is_shared(what) else Path(what).name)
    finally:
        await store.aclose()


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_PARQUET)) == _PARQUET
