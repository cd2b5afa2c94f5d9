r"""What the manual's build adds to mkdocs: sources that pages link to, pictures in the page's own colours.

- A link to a file outside of docs/ (an example, a test) leads to a page `source/…` that shows the file. On a
  code host the same link leads to the file itself.
- An SVG of docs/images/ stands in the page as it is, so that its `currentColor` is the text's, light or dark.
- A pipe in a table's code is written `\|`, as code hosts want it, and shown as a pipe.
"""

import html
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)#\s]+)")
_PICTURE = re.compile(r'<p><img alt="([^"]*)" src="[^"]*?images/([a-z-]+\.svg)"\s*/?></p>')
_CELL = re.compile(r"<td>.*?</td>", re.DOTALL)
_LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "sh", ".yml": "yaml", ".yaml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside of docs/ that a page links to."""
    root = Path(config.docs_dir).parent
    targets = {
        target
        for file in files.documentation_pages()
        for link in _LINK.findall(file.content_string)
        if (target := _outside(file.src_uri, link)) is not None and (root / target).is_file()
    }
    for target in sorted(targets):
        language = _LANGUAGES.get(Path(target).suffix, "text")
        text = (root / target).read_text(encoding="utf-8")
        page = f"---\nsearch:\n  exclude: true\n---\n# {target}\n\n````{language}\n{text}````\n"
        files.append(File.generated(config, f"source/{target}.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files outside of docs/ to the pages that show them."""

    def turned(match: re.Match[str]) -> str:
        target = _outside(page.file.src_uri, match[1])
        shown = None if target is None else files.get_file_from_path(f"source/{target}.md")
        return match[1] if shown is None else os.path.relpath(shown.src_uri, page.file.src_uri + "/..")

    return _LINK.sub(turned, markdown)


def on_page_content(html_text: str, config: MkDocsConfig, **_: Any) -> str:
    """Put pictures into the page, and take the backslash from a table's pipes."""

    def inline(match: re.Match[str]) -> str:
        alt, name = match.groups()
        svg = (Path(config.docs_dir) / "images" / name).read_text(encoding="utf-8")
        svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
        return f'<figure class="picture">{svg}</figure>'

    pictured = _PICTURE.sub(inline, html_text)
    return _CELL.sub(lambda cell: cell[0].replace("\\|", "|"), pictured)


def _outside(page: str, link: str) -> str | None:
    """The path in the checkout of what a page of docs/ links to, None where it is in docs/ itself."""
    path = PurePosixPath(os.path.normpath(PurePosixPath("docs", page).parent / html.unescape(link)))
    return None if path.parts[:1] in (("docs",), ("..",)) else str(path)
