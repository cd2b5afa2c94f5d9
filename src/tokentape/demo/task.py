"""The demo's task: integer arithmetic with a calculator that does one operation at a time. No I/O.

Training of the bundled model (`models/tiny/train.py`), the demo and later reinforcement learning share this
file: what is asked, what the tool answers, and what an episode earns. A question with two operations, such as
"What is 17 * 23 + 5?", needs two dependent calls: `17 * 23`, then `391 + 5`.
"""

import re
from dataclasses import dataclass
from random import Random
from typing import Final

from tokentape.types import Json

SYSTEM: Final = "You solve arithmetic questions. Use the calculator, one operation per call."
"""The system prompt of an episode."""

CALCULATOR: Final[Json] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate one operation (+, - or *) on two integers.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {"type": "string", "description": "One operation, for example 17 * 23"}
            },
            "required": ["expression"],
        },
    },
}
"""The tool as an OpenAI schema: one string parameter `expression`, evaluated by `calculator`."""

MAX_DIGITS: Final = 12
"""The longest operand that `calculator` takes, in digits."""

_OPERATION: Final = re.compile(r"(-?[0-9]+)\s*([-+*])\s*(-?[0-9]+)")
_SEVERAL: Final = re.compile(r"-?[0-9]+(\s*[-+*]\s*-?[0-9]+){2,}")
_NUMBER: Final = re.compile(r"(?:(?<![0-9])-)?[0-9]+(?:\.[0-9]+)?")

_OPERATORS: Final = ("+", "-", "*")
_WORDS: Final = {"+": "plus", "-": "minus", "*": "times"}
_PHRASES: Final = (
    "What is {}?",
    "What is {}?",
    "What's {}?",
    "Calculate {}.",
    "Compute {}.",
    "How much is {}?",
    "Please work out {}.",
    "Can you tell me what {} is?",
    "{} = ?",
    "I need the value of {}.",
)
_FIRST: Final = {"+": "Add {0} and {1}", "-": "Subtract {1} from {0}", "*": "Multiply {0} by {1}"}
_THEN: Final = {"+": "add {}", "-": "subtract {}", "*": "multiply by {}"}


@dataclass(frozen=True, slots=True)
class Question:
    """One question and its solution.

    `text` is what the user asks, `answer` the right number. `calls` are the calculator expressions that a
    perfect agent evaluates, in order: one or two, where the second uses the result of the first.
    """

    text: str
    answer: int
    calls: tuple[str, ...]


def make_question(rng: Random) -> Question:
    """Draw a question: one operation in a fifth of the cases, else two.

    The usual precedence holds; some have parentheses. Operands are positive, results may be negative. The
    same state of `rng` gives the same question.
    """
    operators = [rng.choice(_OPERATORS) for _ in range(1 if rng.random() < 0.2 else 2)]
    numbers = _operands(rng, operators)
    grouped = len(operators) == 2 and operators[1] == "*" != operators[0] and rng.random() < 0.25
    if len(operators) == 1 or grouped or operators[1] != "*" or operators[0] == "*":
        calls, answer = _solve_left(numbers, operators)
        if rng.random() < 0.15:
            return Question(_instruction(numbers, operators), answer, calls)
    else:
        calls, answer = _solve_right(numbers, operators)
    words = not grouped and rng.random() < 0.2
    return Question(rng.choice(_PHRASES).format(_formula(numbers, operators, grouped, words)), answer, calls)


def calculator(expression: str) -> str:
    """Evaluate one operation on two integers, such as `17 * 23`, and return the result as text.

    Never raises: anything else returns a line that starts with `error: ` and says what is wrong, for the
    model to read. Operands may be negative and have up to `MAX_DIGITS` digits.
    """
    text = expression.strip()
    match = _OPERATION.fullmatch(text)
    if match is None:
        return f"error: {_complaint(text)}"
    left, operator, right = match.groups()
    if max(len(left.lstrip("-")), len(right.lstrip("-"))) > MAX_DIGITS:
        return f"error: a number has more than {MAX_DIGITS} digits"
    return str(_apply(int(left), operator, int(right)))


def reward(question: Question, final_text: str | None) -> float:
    """What an episode earns: 1.0 if the last number in its final text is the right answer, else 0.0.

    `final_text` is the text of the last assistant turn; None or a text without a number earns nothing.
    Thousands separators and the minus sign U+2212 are understood; `396.5` is not 396.
    """
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", (final_text or "").replace("\u2212", "-"))
    numbers = _NUMBER.findall(text)
    return 1.0 if numbers and numbers[-1] == str(question.answer) else 0.0


def _complaint(text: str) -> str:
    """What is wrong with an expression that is not one operation."""
    if not text:
        return "the expression is empty"
    if _SEVERAL.fullmatch(text):
        return "only one operation per call"
    if unknown := re.search(r"[^-+*0-9\s]", text):
        return f"cannot read {unknown.group()!r}; write two integers and one of + - *"
    return "write two integers and one of + - *"


def _apply(left: int, operator: str, right: int) -> int:
    if operator == "*":
        return left * right
    return left + right if operator == "+" else left - right


def _operands(rng: Random, operators: list[str]) -> list[int]:
    """Positive operands: small where they are multiplied, so that results have at most five digits."""
    factors = {side for i, operator in enumerate(operators) if operator == "*" for side in (i, i + 1)}
    limit = 20 if len(factors) == 3 else 40
    return [rng.randint(2, limit) if i in factors else rng.randint(1, 300) for i in range(len(operators) + 1)]


def _solve_left(numbers: list[int], operators: list[str]) -> tuple[tuple[str, ...], int]:
    """Calls and result when the operations are done from left to right."""
    result, calls = numbers[0], list[str]()
    for operator, number in zip(operators, numbers[1:], strict=True):
        calls.append(f"{result} {operator} {number}")
        result = _apply(result, operator, number)
    return tuple(calls), result


def _solve_right(numbers: list[int], operators: list[str]) -> tuple[tuple[str, ...], int]:
    """Calls and result when the second of two operations binds tighter."""
    first, second, third = numbers
    inner = _apply(second, operators[1], third)
    calls = (f"{second} {operators[1]} {third}", f"{first} {operators[0]} {inner}")
    return calls, _apply(first, operators[0], inner)


def _formula(numbers: list[int], operators: list[str], grouped: bool, words: bool) -> str:
    """`17 * 23 + 5`, `(3 + 4) * 5` or `17 times 23 plus 5`."""
    parts = [str(numbers[0])]
    for operator, number in zip(operators, numbers[1:], strict=True):
        parts += [_WORDS[operator] if words else operator, str(number)]
    if grouped:
        return f"({' '.join(parts[:3])}) {' '.join(parts[3:])}"
    return " ".join(parts)


def _instruction(numbers: list[int], operators: list[str]) -> str:
    """`Multiply 17 by 23, then add 5.`: done in the order of reading."""
    text = _FIRST[operators[0]].format(numbers[0], numbers[1])
    if len(operators) == 2:
        text += f", then {_THEN[operators[1]].format(numbers[2])}"
    return f"{text}."
