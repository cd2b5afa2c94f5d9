"""The manual: built without a warning, whole inside, nothing from elsewhere; its tutorial as written."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import tokentape.adapters.trl
import tokentape.errors
import tokentape.export
import tokentape.parse
import tokentape.rollout
import tokentape.scale
import tokentape.testing
from manualkit import DOCS, ENVIRONMENT, ROOT, free_port, walk


class Links(HTMLParser):
    """The ids of a page, what it links to, and what a browser loads for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") in (
            "stylesheet",
            "icon",
            "preload",
            "preconnect",
            "modulepreload",
        ):
            self.loaded.append(found["href"])
        if tag in ("script", "img", "iframe", "source", "video") and "src" in found:
            self.loaded.append(found["src"])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built manual."""
    target = tmp_path_factory.mktemp("manual")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return target


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def broken(pages: dict[Path, Links]) -> Iterator[str]:
    """Links of these pages that lead to no file or no place in one."""
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{path.name}: {link}: no such file"
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids:
                yield f"{path.name}: {link}: no such place"


def test_every_link_inside_leads_somewhere(site: Path, pages: dict[Path, Links]) -> None:
    assert len(pages) > 40
    assert [*broken(pages)] == []
    bad = site / "index.html"
    control = Links(
        '<a href="nowhere.html">a</a><a href="tapes.html#nowhere">b</a><a href="tapes.html#samples">c</a>'
    )
    assert len([*broken({**pages, bad: control})]) == 2, "the checker can fail"


def test_nothing_comes_from_elsewhere(site: Path, pages: dict[Path, Links]) -> None:
    loaded = {url for page in pages.values() for url in page.loaded}
    assert loaded
    assert [url for url in loaded if urlsplit(url).netloc] == []
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"""(?:url\(|@import\s+)["']?([^"')]+)""", sheet.read_text(encoding="utf-8"))
        assert [url for url in urls if urlsplit(url).netloc] == [], sheet.name


def test_every_page_is_in_the_navigation(site: Path) -> None:
    """Strict mode warns of one that is not; this says that the mode is on, and that all pages were built."""
    assert "omitted_files: warn" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file(), page


def test_pictures_say_what_they_show(pages: dict[Path, Links], site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    for picture in (DOCS / "images").iterdir():
        alts = re.findall(rf"!\[([^\]]*)\]\([^)]*images/{picture.name}\)", text)
        assert alts, f"{picture.name} is shown nowhere"
        assert all(len(alt) > 40 for alt in alts), picture.name
        if picture.suffix == ".svg":
            assert "style>" not in picture.read_text(encoding="utf-8"), "it would hold for the whole page"
    built = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html"))
    assert built.count('<figure class="picture"><svg role="img"') >= len([*(DOCS / "images").glob("*.svg")])


def test_tables_show_pipes(site: Path) -> None:
    assert "<code>&lt;|end|&gt;</code>" in (site / "templates.html").read_text(encoding="utf-8")


def test_the_reference_has_all_that_is_public(pages: dict[Path, Links], site: Path) -> None:
    ids = {name for path, page in pages.items() if path.parent == site / "reference" for name in page.ids}
    for module in (tokentape, tokentape.adapters.trl, tokentape.export, tokentape.parse, tokentape.rollout,
                   tokentape.scale, tokentape.testing):  # fmt: skip
        for name in getattr(module, "__all__", ()):
            found = getattr(module, name)
            where = getattr(found, "__module__", "")
            if where.startswith("tokentape"):  # plain values say not where they are
                assert f"{where}.{found.__qualname__}" in ids or f"{module.__name__}.{name}" in ids, name
    for name, found in vars(tokentape.errors).items():
        if isinstance(found, type) and found.__module__ == "tokentape.errors":
            assert f"tokentape.errors.{name}" in ids


def test_search_works_from_the_disk(site: Path) -> None:
    """Its index is a script, and the worker's stand-in is loaded before the theme's own script."""
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index")
    text = (site / "index.html").read_text(encoding="utf-8")
    assert text.index("iframe-worker.js") < text.index("assets/javascripts/bundle")


def test_every_extra_is_on_the_page_of_installing() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (DOCS / "start" / "install.md").read_text(encoding="utf-8")
    assert [name for name in project["optional-dependencies"] if f"\n| `{name}` |" not in page] == []


# -- the tutorial


async def test_the_tutorial_as_written(tmp_path: Path) -> None:
    """Only ports are others. That with a real SGLang is `tests/live/test_live_manual.py`."""
    ports = {"30000": free_port(), "8000": free_port()}
    said = await walk(DOCS / "start" / "tutorial.md", tmp_path, ports)
    assert len(re.findall(r" [01]\.0$", said, re.MULTILINE)) == 16, "episodes"
    assert "verified" in said
    assert re.search(r"reward [01]\.0, [1-9]\d* of \d+ tokens trained", said)
    assert re.search(r"[1-9]\d* of [1-9]\d* turns do not encode back", said)
    assert (tmp_path / "verl.parquet").is_file()


def test_make_manual_says_where(tmp_path: Path) -> None:
    assert shutil.which("make") is None or "site/index.html" in subprocess.run(
        ["make", "--dry-run", "manual"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
