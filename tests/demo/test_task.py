"""The demo's task: questions are solvable, the tool never raises, the reward reads the last number."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.demo.task import CALCULATOR, Question, calculator, make_question, reward

QUESTION = Question("What is 17 * 23 + 5?", 396, ("17 * 23", "391 + 5"))


@given(st.integers())
def test_the_calls_of_a_question_lead_to_its_answer(seed: int) -> None:
    question = make_question(Random(seed))
    results = [calculator(call) for call in question.calls]
    assert results[-1] == str(question.answer)
    assert len(results) == 1 or results[0] in question.calls[1].split()
    assert reward(question, f"The answer is {results[-1]}.") == 1.0


def test_a_seed_repeats_its_questions_and_phrasing_varies() -> None:
    def draw(seed: int) -> list[Question]:
        rng = Random(seed)
        return [make_question(rng) for _ in range(500)]

    questions = draw(1)
    assert questions == draw(1) != draw(2)
    assert 0.7 < sum(len(q.calls) == 2 for q in questions) / 500 < 0.9
    assert any(q.answer < 0 for q in questions)
    assert {q.text.split()[0] for q in questions} >= {"What", "Calculate", "Multiply", "Please"}
    assert all(any(sign in q.text for q in questions) for sign in ("(", "times", "= ?", "then", " * "))


def test_precedence_is_respected() -> None:
    rng = Random(0)
    plain = [q for q in (make_question(rng) for _ in range(2000)) if q.text.startswith("Calculate ")]
    symbolic = [q for q in plain if not any(w in q.text for w in ("plus", "minus", "times"))]
    assert len(symbolic) > 50
    for question in symbolic:
        formula = question.text.removeprefix("Calculate ").removesuffix(".")
        assert eval(formula) == question.answer


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("17 * 23", "391"),
        ("391+5", "396"),
        (" 5 - 391 ", "-386"),
        ("5 - -3", "8"),
        ("-12 + 3", "-9"),
        ("-2 * -4", "8"),
        ("0 * 7", "0"),
        ("17 * 23 + 5", "error: only one operation per call"),
        ("", "error: the expression is empty"),
        ("17 / 3", "error: cannot read '/'; write two integers and one of + - *"),
        ("__import__('os')", "error: cannot read '_'; write two integers and one of + - *"),
        ("17", "error: write two integers and one of + - *"),
        ("2 ** 9", "error: write two integers and one of + - *"),
        ("1234567890123 + 1", "error: a number has more than 12 digits"),
        ("٣ + 4", "error: cannot read '٣'; write two integers and one of + - *"),
    ],
)
def test_calculator(expression: str, result: str) -> None:
    assert calculator(expression) == result


@given(st.text())
def test_calculator_never_raises(expression: str) -> None:
    assert calculator(expression).removeprefix("-").isdigit() or calculator(expression).startswith("error: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 396.", 1.0),
        ("17 * 23 + 5 = 396", 1.0),
        ("17*23+5=396", 1.0),
        ("It is 396, not 391", 0.0),
        ("391", 0.0),
        ("-396", 0.0),
        ("396.5", 0.0),
        ("3960", 0.0),
        ("no idea", 0.0),
        ("", 0.0),
        (None, 0.0),
        ("9" * 5000, 0.0),
    ],
)
def test_reward(text: str | None, value: float) -> None:
    assert reward(QUESTION, text) == value


@pytest.mark.parametrize("text", ["-1,386", "\u22121386", "5 - 1391 = -1386.", "5-1391=-1386"])
def test_reward_reads_signs_and_separators(text: str) -> None:
    assert reward(Question("What is 5 - 1391?", -1386, ("5 - 1391",)), text) == 1.0


def test_the_schema_names_the_one_parameter() -> None:
    function = CALCULATOR["function"]
    assert function["name"] == calculator.__name__
    assert function["parameters"]["required"] == list(function["parameters"]["properties"]) == ["expression"]
