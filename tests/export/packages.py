"""Trainers' own packages: `make trainers` installs them, elsewhere their tests are skipped with a reason."""

import importlib
import importlib.util
import warnings
from typing import Any

import pytest


def own(module: str, reason: str = "make trainers") -> Any:
    """A trainer's own module. Only a package that is not installed is skipped: one that is must import."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: {reason}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a trainer's import warns of is not ours
        return importlib.import_module(module)
