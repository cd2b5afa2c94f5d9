"""Trainers' own packages: `make trainers` installs them, elsewhere their tests are skipped with a reason."""

import importlib
import importlib.util
from typing import Any

import pytest


def own(module: str, reason: str = "make trainers") -> Any:
    """A trainer's own module. Only a package that is not installed is skipped: one that is must import."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: {reason}")
    return importlib.import_module(module)
