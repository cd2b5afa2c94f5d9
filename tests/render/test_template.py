"""Chat templates: the same text as transformers, in a sandbox, with errors that say what to do."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from render_golden import CASES, SHARED, STAND_IN_NAMES, TOOLS, Case, says
from render_params import ALL
from render_strategies import conversations

from tokentape.errors import ConfigError, RequestError, TemplateRefused
from tokentape.template import ChatTemplate, one_moment
from tokentape.testing import byte_level_tokenizer, write_model_dir
from tokentape.types import Json, Message, ToolCall

USER: list[Json] = [{"role": "user", "content": "Hi"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {})


def render(source: str, messages: list[Json] | None = None, **arguments: Any) -> str:
    return template(source).render(messages or USER, None, arguments, add_generation_prompt=True)


# -- the same as transformers


def ours_and_theirs(model: str) -> tuple[ChatTemplate, Any]:
    """The model's template in both; a light tokenizer with the model's own special tokens' names."""
    transformers = pytest.importorskip("transformers")
    directory = SHARED / model
    if (directory / "tokenizer_config.json").exists():
        ours = ChatTemplate.from_dir(directory)
    else:
        source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        ours = ChatTemplate(source, STAND_IN_NAMES.get(model, {}))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), chat_template=ours.source, **ours.special_tokens
    )
    return ours, theirs


def same_text(ours: ChatTemplate, theirs: Any, messages: list[Json], tools: list[Json] | None) -> bool:
    """Compare; whether the template renders it at all. transformers drops `None` values: so do we for it."""
    for go_on in (True, False):
        try:
            text = ours.render(messages, tools, {}, add_generation_prompt=go_on)
        except TemplateRefused:
            text = None
        try:
            expected = theirs.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=go_on
            )
        except Exception:  # a template raises whatever it likes
            expected = None
        if expected is None and any(m["content"] is None for m in messages):
            continue  # transformers drops the key of a content that is None; DeepSeek's template reads it
        assert text == expected
        if text is None:
            return False
        if not go_on:
            return True
    return False


@pytest.mark.parametrize("model", ALL)
def test_the_same_text_as_transformers(model: str) -> None:
    ours, theirs = ours_and_theirs(model)
    rendered = 0
    for case in CASES.values():
        messages = [ours.to_json(m) for m in (*case.before, case.reply, *case.new)]
        for tools in (None, list(TOOLS)):
            for end in (len(case.before), len(case.before) + 1, len(messages)):
                rendered += same_text(ours, theirs, messages[:end], tools)
    assert rendered > 15

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(conversations())
    def run(case: Case) -> None:
        messages = [ours.to_json(m) for m in (*case.before, case.reply, *case.new)]
        same_text(ours, theirs, messages, list(case.tools) or None)

    run()


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}\n  {{ m.content }}\n{% endfor %}",
        "  {% if true %}\n  x\n  {% endif %}\n y",
        "a{% generation %}b{% endgeneration %}c",
        "{{ bos_token }}{{ eos_token }}{{ nothing }}{{ tools is none }}{{ documents is none }}",
        "{{ strftime_now('%Y') }}{{ dict(a=1) }}{% set ns = namespace(a=1) %}{{ ns.a }}",
        "{{ messages[0]['content'][::-1] }}{{ messages[0].get('x', 'y') }}{{ messages | length }}",
        "{{ {'b': 1, 'a': 'é<>&\\'\"'} | tojson }}",
    ],
)
def test_the_same_environment_as_transformers(source: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), chat_template=source, eos_token="<|im_end|>"
    )
    ours = ChatTemplate(source, {"eos_token": "<|im_end|>"})
    messages: list[Json] = [*USER, {"role": "assistant", "content": "Yes"}]
    text = ours.render(messages, None, {}, add_generation_prompt=False)
    assert text == theirs.apply_chat_template(messages, tokenize=False)


# -- the sandbox


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'content': 'changed'}) }}",
        "{{ messages[0].pop('content') }}",
        "{{ messages.clear() }}",
        "{{ '%s' | format(messages) and ''.format.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_escapes_are_refused(source: str) -> None:
    """Refused, or undefined and so nothing."""
    messages: list[Json] = [{"role": "user", "content": "Hi"}]
    with contextlib.suppress(TemplateRefused):
        assert render(source, messages) == ""
    assert messages == [{"role": "user", "content": "Hi"}]


# -- errors


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('Only users may speak') }}", "refuses this conversation: Only users may speak"),
        ("{{ messages[0].content + 1 }}", "fails on this conversation"),
        ("{{ messages[7].content }}", "refuses this conversation"),
        ("{{ 1 // 0 }}", "fails on this conversation"),
        ("{{ nothing.at.all }}", "refuses this conversation"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on this conversation"),
    ],
)
def test_a_template_that_raises(source: str, words: str) -> None:
    with pytest.raises(TemplateRefused, match=words) as error:
        render(source)
    assert error.value.status == 400


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        template("{% for %}")


def test_arguments_reach_the_template_and_cannot_replace_the_messages() -> None:
    source = "{{ thinking }}{{ messages | length }}{{ tools is none }}{{ add_generation_prompt }}"
    assert render(source, thinking="on", messages=[], tools=[1], add_generation_prompt=False) == "on1TrueTrue"


# -- files


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        ChatTemplate.from_dir(tmp_path)
    assert str(tmp_path / "chat_template.jinja") in str(error.value)
    assert str(tmp_path / "tokenizer_config.json") in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=str(path)):
        ChatTemplate.from_dir(tmp_path)


def write_config(directory: Path, **config: Any) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def test_the_file_comes_before_the_configuration(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template="old", eos_token={"content": "</s>"}, bos_token=None)
    assert ChatTemplate.from_dir(tmp_path).source == "old"
    (tmp_path / "chat_template.jinja").write_text("new{{ eos_token }}{{ bos_token }}", encoding="utf-8")
    new = ChatTemplate.from_dir(tmp_path)
    assert new.render(USER, None, {}, add_generation_prompt=True) == "new</s>"


def test_named_templates(tmp_path: Path) -> None:
    """The default one; for requests with tools `tool_use` where there is one, as transformers chooses."""
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    both = ChatTemplate.from_dir(
        write_config(tmp_path, chat_template=[*named, {"name": "rag", "template": "R"}])
    )
    assert both.render(USER, None, {}, add_generation_prompt=True) == "D"
    assert both.render(USER, [], {}, add_generation_prompt=True) == "D"
    assert both.render(USER, TOOLS, {}, add_generation_prompt=True) == "T"
    assert both.source == "D\nT"
    one = ChatTemplate.from_dir(write_config(tmp_path, chat_template=named[:1]))
    assert one.render(USER, TOOLS, {}, add_generation_prompt=True) == "D"
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate.from_dir(write_config(tmp_path, chat_template=named[1:]))


def test_more_places_of_a_template(tmp_path: Path) -> None:
    """A processor's file comes last; a second file beside the first is for requests with tools."""
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "P"}), encoding="utf-8")
    assert ChatTemplate.from_dir(tmp_path).source == "P"
    assert ChatTemplate.from_dir(write_config(tmp_path, chat_template="C")).source == "C"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T", encoding="utf-8")
    assert ChatTemplate.from_dir(tmp_path).source == "C"
    (tmp_path / "chat_template.jinja").write_text("F", encoding="utf-8")
    both = ChatTemplate.from_dir(tmp_path)
    assert both.render(USER, None, {}, add_generation_prompt=True) == "F"
    assert both.render(USER, TOOLS, {}, add_generation_prompt=True) == "T"


def test_tokens_that_an_older_model_names_elsewhere(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template="{{ bos_token }}{{ eos_token }}", eos_token="new")
    names = {"bos_token": {"content": "<s>"}, "eos_token": "old"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    assert ChatTemplate.from_dir(tmp_path).render(USER, None, {}, add_generation_prompt=True) == "<s>new"


# -- the clock


def test_one_moment() -> None:
    """A render that reads the clock is the same within a moment, and another one outside it."""
    clock = "{{ strftime_now('%H:%M:%S.%f') }}"
    with one_moment():
        first = render(clock)
        assert {render(clock) for _ in range(20)} == {first}
    assert render(clock) != first


# -- conventions


PARTS = "{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
EITHER = "{% set c = messages[0].content %}{{ c if c is string else c[0].text }}"


@pytest.mark.parametrize(
    ("source", "as_parts"),
    [
        (PARTS, True),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        (EITHER, False),
        ("nothing", False),
    ],
)
def test_templates_that_read_content_as_parts(source: str, as_parts: bool) -> None:
    ours = template(source)
    assert ours.content_as_parts == as_parts
    message = ours.to_json(Message(role="user", content="Hi"))
    assert message["content"] == ([{"type": "text", "text": "Hi"}] if as_parts else "Hi")
    if source != "nothing":
        assert "Hi" in ours.render([message], None, {}, add_generation_prompt=True)


@pytest.mark.parametrize("model", ALL)
def test_the_type_of_arguments_that_a_template_needs(model: str) -> None:
    ours, _ = ours_and_theirs(model)
    assert ours.arguments_as_text == model.startswith("deepseek")


@pytest.mark.parametrize("arguments", ["{", "[1]", '"text"', "null", "3"])
def test_arguments_that_are_no_object(tmp_path: Path, arguments: str) -> None:
    ours = ChatTemplate.from_dir(write_model_dir(tmp_path))
    message = says(calls=[ToolCall(id="c", name="f", arguments=arguments)])
    with pytest.raises(RequestError, match="'c': arguments") as error:
        ours.to_json(message)
    assert error.value.param == "messages.tool_calls.function.arguments"
    as_text = template("{% for m in messages %}{{ m.tool_calls[0].function.arguments + '' }}{% endfor %}")
    as_text.arguments_as_text = True
    assert as_text.to_json(message)["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_message_as_the_template_sees_it(tmp_path: Path) -> None:
    ours = ChatTemplate.from_dir(write_model_dir(tmp_path))
    assert ours.to_json(says("Hi", "Hm")) == {
        "role": "assistant",
        "content": "Hi",
        "reasoning_content": "Hm",
        "thinking": "Hm",
    }
    assert ours.to_json(says()) == {"role": "assistant", "content": ""}
    assert ours.to_json(Message(role="tool", content="r", tool_call_id="c", name="f")) == {
        "role": "tool",
        "content": "r",
        "tool_call_id": "c",
        "name": "f",
    }
    call = ours.to_json(says(calls=[ToolCall(id="c", name="f", arguments="")]))
    assert call["tool_calls"] == [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}]


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """The negative control: another template on one side."""
    transformers = pytest.importorskip("transformers")
    ours = ChatTemplate.from_dir(write_model_dir(tmp_path))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), chat_template=ours.source.replace("user", "User")
    )
    with pytest.raises(AssertionError):
        same_text(ours, theirs, USER, None)
