"""What every driver shares: its arguments, and two tools that really run."""

import sys
from pathlib import Path

MODE, BASE_URL, TASK = sys.argv[1:]
"""How to talk (a word of the driver's own), the session's base URL, the user's question."""

KEY = "not-needed"


def answer(text: object) -> None:
    """What the agent says in the end."""
    sys.stdout.write(f"{text}\n")


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


def read_file(path: str) -> str:
    """Read a text file of the working directory.

    Args:
        path: its name
    """
    return Path(path).read_text()


FUNCTIONS = {"add": add, "read_file": read_file}
_PARAMETERS = {
    "add": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "read_file": {"path": {"type": "string"}},
}
SCHEMAS = {
    name: {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }
    for name, fields in _PARAMETERS.items()
}
