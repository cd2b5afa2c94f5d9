"""Gateways and pages for the viewer's tests. One world is shared; what a test changes, it makes itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from viewerkit import Beside, Page, World, populate, real_model, world

from gatewayfixtures import fake as fake
from gatewayfixtures import gateway as gateway
from gatewayfixtures import model_dir as model_dir
from gatewayfixtures import store as store

_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="session")
def beside() -> Iterator[Beside]:
    beside = Beside()
    yield beside
    beside.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_model(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session")
def shared(beside: Beside, model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A gateway with sessions of all kinds; nobody changes those of other tests."""
    made: World = beside.enter(world(model, tmp_path_factory.mktemp("world") / "store.sqlite"))
    beside.run(populate(made))
    return made


@pytest.fixture(scope="module")  # while it lives, no other event loop runs in this thread
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=[*_ARGUMENTS])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A page whose console must stay empty, and that must ask nobody but its own server."""
    yield from watched(browser)


@pytest.fixture
def dark(browser: Any) -> Iterator[Page]:
    yield from watched(browser, color_scheme="dark")


def watched(browser: Any, **options: Any) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1360, "height": 820}, **options)
    own = context.new_page()
    problems: list[str] = []
    asked: set[str] = set()
    own.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    own.on("pageerror", lambda error: problems.append(str(error)))
    own.on("request", lambda request: asked.add(request.url.split("/")[2]))
    page = Page(own, problems)
    yield page
    context.close()
    assert problems == []
    assert len(asked) <= 1, asked
