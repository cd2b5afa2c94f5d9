"""The table in the manual is what the oracle finds."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from render_golden import SHARED, Models

from tokentape.render import Rewrite

DOCS = Path(__file__).resolve().parents[2] / "docs"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_templates", DOCS / "make_templates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no reference models at {SHARED}")
def test_the_page_is_what_the_script_makes(models: Models) -> None:
    script = load_script()
    assert script.make_page(models) == script.PAGE.read_text(encoding="utf-8"), "run docs/make_templates.py"


def test_every_reason_is_explained() -> None:
    page = (DOCS / "templates.md").read_text(encoding="utf-8")
    assert [reason for reason in Rewrite if f"| `{reason.value}` |" not in page] == []
