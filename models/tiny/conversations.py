"""The conversations that the bundled model learns from: sums with a calculator, follow-ups, small talk.

The demonstrator is sloppy on purpose: it works a share `SLIP` of the questions in a wrong way (an operand or
an operator changed, the second call forgotten), always with valid calls. So the model knows the format and
has room to learn the arithmetic.
"""

import re
from random import Random
from typing import Any

from tokentape.demo.task import CALCULATOR, SYSTEM, Question, calculator, make_question

SLIP = 0.41  # share of questions that the demonstrator gets wrong

Message = dict[str, Any]

SYSTEMS = (
    "You are a helpful assistant.",
    "You are an assistant with a calculator. Answer every question with one number.",
    "Answer the user. Be brief.",
)
GET_TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Tell the time of day in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The name of the city"}},
            "required": ["city"],
        },
    },
}
SMALL_TALK = (
    ("Hello!", "Hello! Which calculation may I do for you?"),
    ("Hi there.", "Hi! Ask me an arithmetic question."),
    ("Thanks!", "You are welcome."),
    ("Thank you, that was good.", "You are welcome. Is there another question?"),
    ("What can you do?", "I can add, subtract and multiply integers, one operation at a time."),
    ("Who are you?", "I am a tiny language model that was trained to use tools."),
    ("Good morning. How are you?", "Good morning! I am well. What shall I work out?"),
    ("Say something about the weather.", "I know nothing about the weather, I only know numbers."),
    ("Write a short story about a cat.", "A small cat found a warm place in the sun and slept all day."),
    ("Bye.", "Goodbye!"),
)
WITHOUT_TOOLS = (
    "I have no calculator here, so I do not know.",
    "That needs a calculator, and there is none in this conversation.",
    "I am sorry, without tools I would only guess.",
)
BEFORE_CALL = (
    "Let me compute that.",
    "I will use the calculator.",
    "Let me work it out step by step.",
    "Let me check {call}.",
    "Computing {call}.",
)
BEFORE_SECOND = (
    "Now the next step.",
    "Now {call}.",
    "That gives {result}, so now {call}.",
    "Then the other operation.",
)
THOUGHTS = (
    "The user wants a number. I should call the calculator.",
    "I need {call} first.",
    "One operation at a time: {call}.",
    "There is more than one way, but {call} comes next.",
)
SECOND_THOUGHTS = (
    "The result is {result}. Next is {call}.",
    "One more operation is left.",
    "Now I need {call}.",
)
AFTER_ERROR = ("That did not work, let me try again.", "I must give one operation at a time.", "")
FINAL = (
    "The answer is {}.",
    "The answer is {}.",
    "It is {}.",
    "The result is {}.",
    "That makes {}.",
    "{}",
    "So the final answer is {}.",
    "I get **{}**.",
    "After the calculation, the value is {}.",
)
FINAL_THOUGHTS = ("That was the last operation.", "Now I know the answer: {}.", "I can answer now.")
FOLLOW_UPS = (
    ("Now add {} to that.", "+"),
    ("And plus {}?", "+"),
    ("Subtract {} from that result.", "-"),
    ("And if we take away {}?", "-"),
    ("Multiply that by {}, please.", "*"),
    ("What is {} times that?", "*"),
)


def say(rng: Random, text: str, thought: str, p_text: float, p_thought: float) -> Message:
    """An assistant message with perhaps a text and perhaps a thought."""
    message: Message = {"role": "assistant", "content": text if rng.random() < p_text else ""}
    if rng.random() < p_thought:
        message["reasoning_content"] = thought
    return message


def call_message(rng: Random, call: str, result: str | None, text: str | None = None) -> Message:
    """The assistant calls the calculator; `result` is what the call before returned."""
    texts, thoughts = (BEFORE_CALL, THOUGHTS) if result is None else (BEFORE_SECOND, SECOND_THOUGHTS)
    text = rng.choice(texts).format(call=call, result=result) if text is None else text
    message = say(rng, text, rng.choice(thoughts).format(call=call, result=result), 0.3, 0.15)
    function = {"name": "calculator", "arguments": {"expression": call}}
    return message | {"tool_calls": [{"type": "function", "function": function}]}


def change_digit(rng: Random, text: str) -> str:
    """The same text with one digit of one number changed."""
    spot = rng.choice([i for i, c in enumerate(text) if c.isdigit()])
    return text[:spot] + rng.choice([d for d in "123456789" if d != text[spot]]) + text[spot + 1 :]


def slip(rng: Random, question: Question) -> tuple[list[str], str | None]:
    """A wrong way to work: its calls, and the answer where that is not the last result."""
    calls = list(question.calls)
    if len(calls) == 1 or rng.random() < 0.15:
        if rng.random() < 0.5:
            return calls, change_digit(rng, str(question.answer))
        return [change_digit(rng, calls[0]), *calls[1:]], None
    if rng.random() < 0.5:
        return calls[:1], None
    left, operator, right = calls[1].split()
    if operator == "-" and rng.random() < 0.5:
        return [calls[0], f"{right} - {left}"], None
    return [calls[0], f"{left} {'-' if operator == '+' else '+'} {right}"], None


def solve(rng: Random, question: Question) -> list[Message]:
    """The demonstration for one question: calls with their results, then the answer."""
    messages: list[Message] = []
    calls, answer = slip(rng, question) if rng.random() < SLIP else (list(question.calls), None)
    result: str | None = None
    if rng.random() < 0.04:
        bad = " ".join(re.findall(r"[0-9]+", question.text)) if rng.random() < 0.3 else f"{calls[0]} + 1"
        messages += [call_message(rng, bad, None), {"role": "tool", "content": calculator(bad)}]
        messages.append(call_message(rng, calls[0], None, rng.choice(AFTER_ERROR)))
    for i, call in enumerate(calls):
        if i or not messages:
            messages.append(call_message(rng, call, result))
        result = calculator(call)
        messages.append({"role": "tool", "content": result})
    answer = answer or result
    text, thought = rng.choice(FINAL).format(answer), rng.choice(FINAL_THOUGHTS).format(answer)
    return [*messages, say(rng, text, thought, 1.0, 0.12)]


def follow_up(rng: Random, answer: str) -> Question:
    """A question about the last answer."""
    phrase, operator = rng.choice(FOLLOW_UPS)
    number = rng.randint(2, 20) if operator == "*" else rng.randint(1, 300)
    call = f"{answer} {operator} {number}"
    return Question(phrase.format(number), int(calculator(call)), (call,))


def make_conversation(rng: Random) -> tuple[list[Message], list[dict[str, Any]]]:
    """One conversation and its tools: a few questions, now and then small talk or no tools at all."""
    system = SYSTEM if rng.random() < 0.85 else rng.choice(SYSTEMS)
    messages: list[Message] = [{"role": "system", "content": system}] if rng.random() < 0.93 else []
    tools = [CALCULATOR] if rng.random() < 0.9 else [CALCULATOR, GET_TIME]
    if rng.random() < 0.05:
        tools = []
    num_questions = rng.choice((1, 1, 2, 2, 3, 4, 5))
    answer: str | None = None
    while num_questions:
        if rng.random() < 0.06 or (not tools and rng.random() < 0.5):
            said, reply = rng.choice(SMALL_TALK)
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
            num_questions -= not tools
            continue
        num_questions -= 1
        related = answer is not None and rng.random() < 0.3 and len(answer) < 8
        question = follow_up(rng, str(answer)) if related else make_question(rng)
        messages.append({"role": "user", "content": question.text})
        if tools:
            messages += solve(rng, question)
            answer = re.findall(r"-?[0-9]+", messages[-1]["content"])[-1]
        else:
            messages.append({"role": "assistant", "content": rng.choice(WITHOUT_TOOLS)})
    return messages, tools


COMMON_WORDS = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up other about
out many then them these so some her would make like him into time has look two more write go see number no
way could people my than first water been call who oil its now find long down day did get come made may part
over new sound take only little work know place year live me back give most very after thing our just name
good sentence man think say great where help through much before line right too mean old any same tell boy
follow came want show also around form three small set put end does another well large must big even such
because turn here why ask went men read need land different home us move try kind hand picture again change
off play spell air away animal house point page letter answer found study still learn should world file
search query result error string object type value key list agent task assistant user system message content
function argument tool
"""
