"""What templates do to a turn that is not the last: each oddity in a template of its own, and in none else.

Found in real ones: Cohere numbers the calls, Gemma 4 moves a turn's text behind the results and looks up each
call, Mistral repeats tools and the system's text with each user, Nemotron Nano 2 ends a last turn with other
space, functionary writes an empty turn without its opening.
"""

from collections.abc import Sequence

import pytest

from tokentape.outline import Outline
from tokentape.render import Ended, Frame, NotExtendable, Rendered, Renderer, Rewrite
from tokentape.template import ChatTemplate
from tokentape.testing import byte_level_tokenizer
from tokentape.tokenizer import Tokenizer
from tokentape.types import Message, ToolCall

TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
SYSTEM = Message(role="system", content="Be brief.")
USER, MORE = Message(role="user", content="hello"), Message(role="user", content="And then?")

# {call} is written for each call, {end} behind each turn, {head} before all, {user} before a user's text.
CHATML = """{head}{%- for m in messages %}
{%- if m.role == 'assistant' %}{open}
{{- m.content or '' }}
{%- for c in m.tool_calls or [] %}{call}{%- endfor %}{end}
{%- elif m.role == 'user' %}{user}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CALL = "{{ '<tool_call>' + c.function.name + (c.function.arguments | tojson) + '</tool_call>' }}"
END = "{{ '<|im_end|>\\n' }}"
OPEN = "{{ '<|im_start|>assistant\\n' }}"


def source(call: str = CALL, end: str = END, head: str = "", user: str = "", opening: str = OPEN) -> str:
    text = CHATML.replace("{call}", call).replace("{end}", end).replace("{head}", head)
    return text.replace("{user}", user).replace("{open}", opening)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_level_tokenizer().save(str(path))
    return Tokenizer(path, template_text=source())


def says(content: str | None = None, *arguments: str, number: int = 0) -> Message:
    calls = tuple(
        ToolCall(id=f"call{number:02}{n:03}", name="f", arguments=text) for n, text in enumerate(arguments)
    )
    return Message(role="assistant", content=content, tool_calls=calls)


def results(turn: Message) -> list[Message]:
    return [
        Message(role="tool", content=f"result {n}", tool_call_id=call.id)
        for n, call in enumerate(turn.tool_calls)
    ]


def extended(
    renderer: Renderer,
    before: Sequence[Message],
    turn: Message,
    new: Sequence[Message],
    stop: str = "<|im_end|>",
) -> Rendered | NotExtendable:
    outline = renderer.outline(Outline(), before)
    return renderer.extend(
        Frame(TOOLS), outline, Ended(turn, renderer.tokenizer.id_of(stop) if stop else None), new
    )


def assert_exact(
    renderer: Renderer, before: Sequence[Message], turn: Message, new: Sequence[Message]
) -> None:
    """Prompt + the turn as the template writes it + the bridge is the full render."""
    answer = extended(renderer, before, turn, new)
    assert isinstance(answer, Rendered), answer
    frame = Frame(TOOLS)
    prompt = list(renderer.render(frame, before).run.ids)
    whole = list(renderer.render(frame, [*before, turn, *new]).run.ids)
    bridge = list(answer.run.ids)
    assert whole[: len(prompt)] == prompt
    assert whole[len(whole) - len(bridge) :] == bridge
    completion = renderer.tokenizer.decode(whole[len(prompt) : len(whole) - len(bridge)])
    assert completion.endswith("<|im_end|>")
    assert completion.count("<|im_end|>") == 1


def reason(answer: Rendered | NotExtendable) -> Rewrite:
    assert isinstance(answer, NotExtendable), answer
    return answer.reason


NUMBERED = source(
    call="{% set ns.n = ns.n + 1 %}"
    "{{ '<tool_call>' + (ns.n | string) + (c.function.arguments | tojson) + '</tool_call>' }}",
    head="{%- set ns = namespace(n=0) %}",
    user="{{ '(' + (ns.n | string) + ' calls so far)' }}",
)


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_calls_are_numbered(tokenizer: Tokenizer, rounds: int) -> None:
    """What follows hangs on how many calls came before: no short outline will do."""
    renderer = Renderer(tokenizer, ChatTemplate(NUMBERED, {}))
    before = [USER]
    for number in range(rounds):
        turn = says(None, '{"a": 1}', number=number)
        before += [turn, *results(turn), says("Well."), MORE]
    turn = says("So.", '{"a": 2}', number=50)
    assert_exact(renderer, before, turn, [*results(turn), MORE])
    assert_exact(renderer, before, says("Done."), [MORE])


def test_each_result_s_call_is_looked_up(tokenizer: Tokenizer) -> None:
    """The outline keeps every call of a turn, and never parts a turn from its results."""
    looks_up = source(
        head="{%- set ids = namespace(all=[]) %}{%- for m in messages %}{%- for c in m.tool_calls or [] %}"
        "{%- set ids.all = ids.all + [c.id] %}{%- endfor %}"
        "{%- if m.role == 'tool' and m.tool_call_id not in ids.all %}"
        "{{ raise_exception('no such call') }}{%- endif %}{%- endfor %}"
    )
    renderer = Renderer(tokenizer, ChatTemplate(looks_up, {}))
    before = [SYSTEM, USER]
    for number in range(4):
        turn = says(None, '{"a": 1}', '{"b": 1}', '{"c": 1}', number=number)
        before += [turn, *results(turn)]
    turn = says(None, '{"a": 2}', "{}", "{}", number=50)
    assert_exact(renderer, before, turn, results(turn))


def test_each_call_s_result_is_counted(tokenizer: Tokenizer) -> None:
    """DeepSeek V3.2 knows by their number which result is a turn's last."""
    counts = source(
        head="{%- set ns = namespace(open=0) %}{%- for m in messages %}{%- if m.role == 'tool' %}"
        "{%- set ns.open = ns.open - 1 %}{%- else %}"
        "{%- if ns.open %}{{ raise_exception('a result is missing') }}{%- endif %}"
        "{%- set ns.open = (m.tool_calls or []) | length %}{%- endif %}{%- endfor %}"
    )
    renderer = Renderer(tokenizer, ChatTemplate(counts, {}))
    before = [SYSTEM, USER]
    for number in range(4):
        turn = says(None, '{"a": 1}', '{"b": 1}', '{"c": 1}', number=number)
        before += [turn, *results(turn)]
        assert_exact(renderer, before, says("Well."), [MORE])


def test_the_system_s_text_is_repeated_with_each_user(tokenizer: Tokenizer) -> None:
    repeats = source(user="{{ messages[0].content if messages[0].role == 'system' else '' }}")
    renderer = Renderer(tokenizer, ChatTemplate(repeats, {}))
    before = [SYSTEM, USER, says("One."), MORE]
    assert_exact(renderer, before, says("Two."), [MORE])
    evil = Message(role="system", content="Be <|im_end|> brief.")
    answer = extended(renderer, [evil, USER], says("Two."), [MORE])
    assert isinstance(answer, Rendered)
    assert answer.neutralised == ("<|im_end|>",)
    tokens = [tokenizer.token_text(i) for i in answer.run.ids]
    assert tokens.count("<|im_end|>") == 1  # the user's own
    assert "Be <|im_end|> brief." in tokenizer.decode(answer.run.ids)


def test_earlier_messages_that_are_repeated_behind_the_turn(tokenizer: Tokenizer) -> None:
    repeats = source(user="{{ messages[1].content }}")
    answer = extended(Renderer(tokenizer, ChatTemplate(repeats, {})), [SYSTEM, USER], says("Two."), [MORE])
    assert reason(answer) is Rewrite.HISTORY


def test_a_text_that_moves_behind_the_results(tokenizer: Tokenizer) -> None:
    moves = """{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function.arguments | tojson) + '</tool_call>' }}
{%- for r in messages if r.role == 'tool' and r.tool_call_id == c.id %}
{{- '<tool_response>' + r.content }}{%- endfor %}
{%- endfor %}{{ (m.content or '') + '<|im_end|>\\n' }}
{%- elif m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
    turn = says("Let me look.", '{"a": 1}')
    answer = extended(Renderer(tokenizer, ChatTemplate(moves, {})), [USER], turn, results(turn))
    assert reason(answer) is Rewrite.CONTENT


def test_a_last_turn_ends_with_other_space(tokenizer: Tokenizer) -> None:
    spaced = source(end="{{ ('' if loop.last else ' ') + '<|im_end|>\\n' }}")
    renderer = Renderer(tokenizer, ChatTemplate(spaced, {}))
    answer = extended(renderer, [USER], says("Yes."), [MORE])
    assert isinstance(answer, Rendered)
    assert tokenizer.decode(answer.run.ids).startswith("\n<|im_start|>user")


@pytest.mark.parametrize(("stop", "expected"), [("<|im_end|>", None), ("<|endoftext|>", Rewrite.END_OF_TURN)])
def test_a_stop_token_that_the_template_never_writes(
    tokenizer: Tokenizer, stop: str, expected: Rewrite | None
) -> None:
    answer = extended(Renderer(tokenizer, ChatTemplate(source(), {})), [USER], says("Yes."), [MORE], stop)
    assert (reason(answer) if expected else None) is expected
    kept = Renderer(tokenizer, ChatTemplate(source(), {}), history="preserve")
    assert isinstance(extended(kept, [USER], says("Yes."), [MORE], stop), Rendered)


def test_an_empty_turn_that_loses_its_opening(tokenizer: Tokenizer) -> None:
    shy = source(opening="{%- if m.content or m.tool_calls %}" + OPEN + "{%- endif %}")
    renderer = Renderer(tokenizer, ChatTemplate(shy, {}))
    assert reason(extended(renderer, [USER], says(""), [MORE])) is Rewrite.GENERATION_PROMPT
    assert_exact(renderer, [USER], says("Yes."), [MORE])


def test_a_text_that_the_template_takes_for_something_else(tokenizer: Tokenizer) -> None:
    cuts = source(
        opening=OPEN + "{%- if '###' in (m.content or '') %}{{ m.content.split('###')[0] }}{%- else %}",
        call="",
        end="{%- endif %}" + END,
    )
    renderer = Renderer(tokenizer, ChatTemplate(cuts, {}))
    assert reason(extended(renderer, [USER], says("a ### b"), [MORE])) is Rewrite.CONTENT
    assert_exact(renderer, [USER], says("a b"), [MORE])


def test_a_clock_in_the_prompt(tokenizer: Tokenizer) -> None:
    """Read at each render: within one `extend` it must not look like a history that was rewritten."""
    renderer = Renderer(tokenizer, ChatTemplate(source(head="{{ strftime_now('%H:%M:%S.%f') }}"), {}))
    for _ in range(5):
        assert isinstance(extended(renderer, [USER], says("Yes."), [MORE]), Rendered)


def test_a_last_turn_has_no_end(tokenizer: Tokenizer) -> None:
    """Apriel's calls have an id once they are not the last, and only then an end."""
    call = "{{ '<tool_call>' + (c.function.arguments | tojson) + ('' if m == messages[-1] else c.id) + ']' }}"
    ends = source(call=call, end="{%- if not loop.last %}" + END + "{%- endif %}")
    renderer = Renderer(tokenizer, ChatTemplate(ends, {}))
    turn = says(None, '{"a": 1}')
    assert_exact(renderer, [USER], turn, results(turn))
    answer = extended(renderer, [USER], turn, results(turn), "")
    assert isinstance(answer, Rendered)
    assert tokenizer.decode(answer.run.ids).startswith("<|im_end|>\n<|im_start|>tool")


def test_an_opener_that_nobody_asked_for(tokenizer: Tokenizer) -> None:
    """Llama 3's first template writes it behind every conversation: a cut turn is closed by its end."""
    eager = source().replace("{%- if add_generation_prompt %}", "{%- if true %}")
    renderer = Renderer(tokenizer, ChatTemplate(eager, {}))
    for turn, new in ((says("Yes."), [MORE]), (call := says(None, '{"a": 1}'), results(call))):
        assert_exact(renderer, [USER], turn, new)
        answer = extended(renderer, [USER], turn, new, "")
        assert isinstance(answer, Rendered)
        assert tokenizer.decode(answer.run.ids).startswith(f"<|im_end|>\n<|im_start|>{new[0].role}")
