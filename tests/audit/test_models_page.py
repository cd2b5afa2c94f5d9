"""The page about the model families is what the audit finds."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT.parent / "shared" / "models"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "docs" / "make_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.shared
@pytest.mark.skipif(not MODELS.is_dir(), reason=f"no reference models at {MODELS}")
def test_the_page_is_what_the_script_makes(tmp_path: Path) -> None:
    script = load_script()
    assert script.make_page(tmp_path) == script.PAGE.read_text(encoding="utf-8"), "run docs/make_models.py"
