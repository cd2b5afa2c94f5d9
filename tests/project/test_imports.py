"""The import rule: data flows one way. Checked on the syntax tree, so that lazy imports count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "tokentape"

# module → what it may import of the package. A name stands for itself and everything below it.
CORE = {"errors", "types"}
TEXT = {*CORE, "outline", "template", "tokenizer", "untrusted"}
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "addresses": set(),
    "metrics": set(),
    "invariants": set(),
    "model": {"errors"},
    "parse": {*CORE, "parse"},
    "tokenizer": CORE,
    "template": CORE,
    "outline": CORE,
    "untrusted": {*CORE, "tokenizer"},
    "probe": {*CORE, "template"},
    "render": {*TEXT, "probe"},
    "formats": {*CORE, "parse", "template"},
    "formatfile": {*CORE, "formats", "parse"},
    "audit": {*TEXT, "audit", "formatfile", "formats", "model", "parse", "render"},
    "volatile": CORE,
    "tape": {*CORE, "volatile"},
    "labels": {*CORE, "tape"},
    "conversation": {*CORE, "volatile"},
    "tree": {*CORE, "conversation", "labels", "outline", "tape", "volatile"},
    "schema": {*CORE, "tape", "tree", "volatile"},
    "constrain": {*CORE, "formats", "parse"},
    "store": {*CORE, "tape", "schema"},
    "shared": {*CORE, "store"},
    "postgres_sql": {*CORE, "schema"},
    "postgres_connections": {*CORE, "postgres_sql"},
    "postgres_dsn": CORE,
    "postgres": {
        *CORE, "postgres_connections", "postgres_dsn", "postgres_sql", "tape", "schema", "shared", "store",
    },
    "stores": {*CORE, "postgres", "store"},
    "export": {*CORE, "export", "tape", "tree", "schema", "store"},
    "verify": {*CORE, "engines.sglang_score", "export", "invariants", "shown", "tape", "tokenizer", "verify"},
    "shown": set(),
    "report": {*CORE, "addresses", "export", "report", "schema", "shown", "tape", "tokenizer", "verify"},
    "doctor": {
        *TEXT, "audit", "doctor", "engines", "formats", "model", "postgres_dsn", "render", "schema", "shown",
    },
    "viewer": {
        *CORE, "engines.sglang_score", "export", "schema", "store", "tape", "tokenizer", "tree",
        "verify.turns", "viewer",
    },
    "engines": {*CORE, "addresses", "engines"},
    "testing": {*CORE, "engines.base", "testing"},
    "gateway": {
        *TEXT, "constrain", "conversation", "engines", "export", "formats", "gateway", "metrics", "model",
        "parse", "render", "schema", "shared", "store", "stores", "tape", "tree", "viewer", "volatile", "",
    },
    "scale": {*CORE, "engines.server", "gateway", "scale", "shared", "stores"},
    "demo": {*CORE, "demo", "engines.local.forward", "model", "tokenizer"},
    "cli": {
        *CORE, "addresses", "audit", "cli", "demo", "doctor", "engines", "export", "formatfile", "formats",
        "gateway", "model", "report", "scale", "shown", "stores", "tokenizer", "verify", "viewer",
        "volatile", "",
    },
    "clients": {*CORE, "gateway"},
    "inprocess": {
        *CORE, "clients", "engines", "export", "formats", "gateway", "render", "store", "stores", "tape",
    },
    "adapters": {*CORE, "", "adapters", "engines.sglang", "export", "model"},
    "rollout": {*CORE, "rollout", "schema"},
    "__main__": {"cli"},
    "": {"inprocess", "rollout"},
}  # fmt: skip
# Outside the package: who alone may import it.
ONLY: dict[str, tuple[str, ...]] = {
    "torch": ("engines.local", "export"),
    "transformers": ("engines.local",),
    "tinker": ("export.tinker",),
    "verifiers": ("export.verifiers",),
    "openrlhf": ("export.openrlhf",),
    "datasets": ("export.huggingface",),
    "aiohttp.web": (
        "gateway.app",
        "gateway.passing",
        "gateway.pinned",
        "gateway.processes",
        "gateway.replicas",
        "engines.server",
        "scale.front",
        "testing",
        "viewer.app",
    ),
    "ray": ("scale.ray", "rollout.onray"),
    "openai": ("demo", "clients", "inprocess"),
    "anthropic": ("clients", "inprocess"),
    "httpx2": ("clients",),
    "sqlite3": ("store", "doctor.sqlite"),
    "psycopg": ("postgres", "postgres_connections", "postgres_dsn", "postgres_sql", "doctor.postgres"),
    "psycopg_pool": ("postgres", "postgres_connections"),
    "jinja2": ("template",),
    "pyarrow": ("schema", "export", "report", "cli", "demo", "rollout", "viewer.files"),
    "rich": ("audit.show", "verify.show", "report.show", "doctor.show", "cli", "demo", "rollout.progress"),
    "click": ("cli",),
}
PURE = (
    "types",
    "errors",
    "outline",
    "tape",
    "labels",
    "volatile",
    "conversation",
    "tree",
    "parse",
    "invariants",
)
IMPURE = {"asyncio", "aiohttp", "socket", "http", "sqlite3", "transformers", "torch"}


def imports(source: str) -> Iterator[str]:
    """Every module that a source imports, wherever the statement stands; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def under(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def problems(module: str, source: str) -> list[str]:
    """What `module` imports and may not."""
    found: list[str] = []
    layer = next(name for name in (module, *(module.rsplit(".", n)[0] for n in (1, 2)), "") if name in LAYERS)
    modules = {module_name(path) for path in PACKAGE.rglob("*.py")}
    for name in set(imports(source)):
        if under(name, "tokentape"):
            target = name.removeprefix("tokentape").removeprefix(".")
            while target and target not in modules:  # a name inside a module
                target = target.rpartition(".")[0]
            allowed = any(under(target, a) if a else target == "" for a in LAYERS[layer]) or target == module
            if not allowed:
                found.append(f"{module} imports {name}")
        for outside, owners in ONLY.items():
            if under(name, outside) and not any(under(module, owner) for owner in owners):
                found.append(f"{module} imports {name}")
        if module in PURE and name.split(".")[0] in IMPURE:
            found.append(f"{module} is pure and imports {name}")
    return sorted(found)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_import_rule(path: Path) -> None:
    assert problems(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("types", "from tokentape import tree"),
        ("tree", "def f():\n    from tokentape.render import Renderer"),
        ("tape", "import asyncio"),
        ("engines.sglang", "from aiohttp import web"),
        ("engines.sglang", "import torch"),
        ("gateway.turn", "import aiohttp.web"),
        ("gateway.turn", "import tokentape.cli"),
        ("render", "from tokentape.formats import Format"),
        ("cli", "from transformers import AutoTokenizer"),
    ],
)
def test_a_broken_rule_is_seen(module: str, source: str) -> None:
    assert problems(module, source)
