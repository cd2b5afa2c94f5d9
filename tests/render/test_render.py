"""`render`: the whole conversation's prompt, as the reference tokenizer encodes the template's text."""

from pathlib import Path

import pytest
from render_golden import CASES, TOOLS, Models, reference_ids, text_of
from render_params import ALL

from tokentape.errors import ConfigError, RequestError, TemplateRefused
from tokentape.outline import Outline
from tokentape.render import Ended, Frame, NotExtendable, Renderer, Rewrite
from tokentape.template import ChatTemplate
from tokentape.testing import write_model_dir
from tokentape.types import Message, ToolCall

USER = Message(role="user", content="Hi")


@pytest.mark.parametrize("model", ALL)
def test_the_prompt_is_the_template_s_text(models: Models, model: str) -> None:
    """Encoded by `tokenizers`, with no special token added: BOS is where the template writes it, once."""
    renderer = models.renderer(model)
    for case in CASES.values():
        frame = Frame(TOOLS)
        rendered = renderer.render(frame, case.before)
        text = text_of(renderer, frame, case.before)
        assert list(rendered.run.ids) == reference_ids(renderer, text)
        assert text.endswith(rendered.tail)
        assert rendered.neutralised == ()


def test_template_arguments(tiny: Renderer) -> None:
    thinking = tiny.render(Frame(arguments={"enable_thinking": False}), [USER])
    assert thinking.tail.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tiny.render(Frame(), [USER]).tail.endswith("<|im_start|>assistant\n")


def test_a_refusal_to_render(tiny: Renderer) -> None:
    with pytest.raises(TemplateRefused):
        tiny.render(Frame(), [])
    broken = says_call("{")
    with pytest.raises(RequestError, match="are not JSON"):
        tiny.render(Frame(), [USER, broken])
    empty = Renderer(tiny.tokenizer, ChatTemplate("{{ '' }}", {}))
    with pytest.raises(TemplateRefused, match="renders this conversation as nothing"):
        empty.render(Frame(), [USER])


def says_call(arguments: str) -> Message:
    return Message(role="assistant", tool_calls=(ToolCall(id="c", name="f", arguments=arguments),))


def test_a_refusal_to_extend(tiny: Renderer) -> None:
    """The template's own words; a new call that no template can take is the caller's fault."""
    no = "{% if messages[-1].role == 'tool' %}{{ raise_exception('No!') }}{% endif %}"
    source = tiny.template.source + no
    renderer = Renderer(tiny.tokenizer, ChatTemplate(source, {}))
    stop_id = tiny.tokenizer.id_of("<|im_end|>")
    ended = Ended(says_call("{}"), stop_id)
    outline = renderer.outline(Outline(), [USER])
    result = Message(role="tool", content="r", tool_call_id="c")
    answer = renderer.extend(Frame(), outline, ended, [result])
    assert isinstance(answer, NotExtendable)
    assert answer.reason is Rewrite.REFUSED
    assert answer.detail.endswith("No!")
    with pytest.raises(RequestError, match="are not JSON"):
        tiny.extend(Frame(), outline, ended, [result, says_call("{"), result])


def test_what_the_model_said_may_be_malformed(tiny: Renderer) -> None:
    """A sampled call whose arguments are no JSON is data: the turn is extended all the same."""
    ended = Ended(says_call('{"a": '), tiny.tokenizer.id_of("<|im_end|>"))
    result = Message(role="tool", content="r", tool_call_id="c")
    good = Ended(says_call("{}"), ended.stop_id)
    outline = tiny.outline(Outline(), [USER, says_call("not JSON"), result])
    assert tiny.extend(Frame(), outline, ended, [result]) == tiny.extend(Frame(), outline, good, [result])


def test_sentinels_differ_between_renderers(tiny: Renderer) -> None:
    assert tiny._sentinel != Renderer(tiny.tokenizer, tiny.template)._sentinel


def test_a_directory_that_is_missing_or_incomplete(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory"):
        Renderer.from_dir(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja"):
        Renderer.from_dir(tmp_path)
    directory = write_model_dir(tmp_path / "tiny")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        Renderer.from_dir(directory)
