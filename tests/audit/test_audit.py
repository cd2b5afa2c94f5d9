"""The audit's verdicts on templates whose behaviour is known because they are written here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from auditkit import kinds, outcomes, template

from tokentape.audit import Report, audit
from tokentape.audit.cases import CASES
from tokentape.audit.oracle import Judge
from tokentape.audit.report import Outcome, Severity
from tokentape.errors import ConfigError
from tokentape.model import TINY_MODEL
from tokentape.render import NotExtendable, Rendered, Renderer, Rewrite
from tokentape.types import TokenRun

Audited = Callable[..., Report]
LATE_THOUGHTS = "and messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length == 0"


def test_the_bundled_model_is_exact() -> None:
    report = audit(TINY_MODEL)
    assert report.exact
    assert (report.reasons, report.advice, report.helps) == ((), (), ())
    assert {name for name, outcome in outcomes(report).items() if outcome != "exact"} <= {"cut thought"}
    assert all(call.ok for call in report.calls)
    assert (report.format.name, report.template.stop_calls) == ("qwen", "<|im_end|>")


def test_a_template_that_changes_nothing(audited: Audited) -> None:
    report = audited(template())
    assert report.exact
    assert set(outcomes(report).values()) <= {"exact", "exact*"}
    assert not [d for d in report.defects if d.severity is not Severity.INFO]


def test_dropped_calls(audited: Audited) -> None:
    report = audited(template(calls="[:0]"))
    assert not report.exact
    assert "calls_dropped" in kinds(report)
    assert outcomes(report)["call"] == "tool_calls_dropped"
    assert outcomes(report)["text"] == "exact"
    assert any(reason.startswith("calls_dropped: ") for reason in report.reasons)
    assert report.preserved


def test_dropped_calls_can_be_kept(audited: Audited) -> None:
    report = audited(template(calls="[:0]"), history="preserve")
    assert report.exact
    assert outcomes(report)["call"] == "kept"
    assert "calls_dropped" in kinds(report)


def test_what_cannot_be_kept(audited: Audited) -> None:
    refuse = "{%- if messages[-1].role == 'tool' %}{{- raise_exception('no results') }}{%- endif %}"
    report = audited(template(begin=refuse))
    assert not report.exact
    assert not report.preserved
    assert not any("preserve" in each for each in report.advice)


def test_the_second_call_dropped(audited: Audited) -> None:
    report = audited(template(calls="[:1]"))
    assert {"parallel_calls_dropped"} <= kinds(report)
    assert outcomes(report)["two calls"] == "tool_calls_dropped"
    assert outcomes(report)["call again"] == "exact"
    assert any("parallel_tool_calls" in each for each in report.advice)
    assert not report.exact


def test_thoughts_dropped_by_a_user(audited: Audited) -> None:
    report = audited(template(keep=LATE_THOUGHTS))
    assert report.exact  # a result does not rewrite anything
    assert outcomes(report)["thought+call again"] == "exact"
    assert outcomes(report)["thought+text"] == "reasoning_dropped"
    assert outcomes(report)["thought+text after call"] == "history_rewritten"


def test_history_rewritten_by_a_result(audited: Audited) -> None:
    report = audited(template(keep="and loop.last"))
    assert not report.exact
    assert outcomes(report)["call"] == "exact"
    assert outcomes(report)["thought+call"] == "reasoning_dropped"
    assert any(reason.startswith("thought+call: ") for reason in report.reasons)
    assert any(each.startswith("--history preserve") for each in report.advice)
    assert "thoughts_dropped" not in kinds(report)  # the last turn's is there


def test_preserve_keeps_what_the_template_would_rewrite(audited: Audited) -> None:
    report = audited(template(keep="and loop.last"), history="preserve")
    assert report.exact
    assert outcomes(report)["thought+call"] == "kept"
    assert outcomes(report)["call"] == "exact"


def test_an_argument_that_helps_is_found_whatever_its_name(audited: Audited) -> None:
    report = audited(template(keep="and (loop.last or some_odd_switch == true)"))
    assert not report.exact
    best = report.helps[0]
    assert (best.argument, best.exact, best.lost) == ({"some_odd_switch": True}, True, ())
    assert {"thought+call", "thought+text"} <= set(best.gained)
    assert any('"some_odd_switch": true' in each for each in report.advice)


def test_an_argument_that_turns_thoughts_on_is_found(audited: Audited) -> None:
    closing = "<think>\\n' + ('' if think_first else '\\n</think>\\n\\n') + '"
    report = audited(template(opening=closing))
    assert (report.template.thinking, report.exact) == ("closed", False)
    assert (report.helps[0].argument, report.helps[0].thinking) == ({"think_first": True}, "opened")
    assert report.helps[0].exact


def test_an_argument_that_is_given_is_used(audited: Audited) -> None:
    source = template(keep="and (loop.last or some_odd_switch == true)")
    report = audited(source, arguments={"some_odd_switch": True})
    assert report.exact
    assert report.helps == ()


def test_a_prompt_that_opens_a_thought(audited: Audited) -> None:
    report = audited(template(opening="<think>\\n"))
    assert report.template.thinking == "opened"
    counted = {case.name for case in report.cases if case.counted}
    assert counted == {"thought+call", "thought+two calls", "thought+call again"}
    assert report.exact
    assert outcomes(report)["call"] == "generation_prompt_rewritten"  # and cannot happen


def test_a_prompt_that_closes_a_thought(audited: Audited) -> None:
    report = audited(template(opening="<think>\\n\\n</think>\\n\\n"))
    assert report.template.thinking == "closed"
    assert {case.name for case in report.cases if case.counted} == {"call", "two calls", "call again"}
    assert not report.exact
    assert outcomes(report)["call"] == "generation_prompt_rewritten"


def test_results_dropped(audited: Audited) -> None:
    report = audited(template().replace("+ message.content + '\\n</tool_response>", "+ '\\n</tool_response>"))
    assert "results_dropped" in kinds(report)
    assert not report.exact


def test_python_instead_of_json(audited: Audited) -> None:
    python = "(call.function.arguments | tojson | replace('true', 'True') | replace('null', 'None'))"
    report = audited(template().replace("(call.function.arguments | tojson)", python))
    wrong = {call.name: call for call in report.calls if not call.ok}
    assert set(wrong) == {"boolean", "null", "object", "text like true", "text like JSON"}
    assert "True" in (wrong["boolean"].wrote or "")
    assert "arguments_not_read" in kinds(report)
    assert report.exact  # the ids are; what is lost is what a full render shows


def test_a_grammar_that_nobody_knows(audited: Audited) -> None:
    source = (
        template()
        .replace("<tool_call>", "!!call ")
        .replace("</tool_call>", " llac!!")
        .replace('{"name": "', "name ")
    )
    report = audited(source)
    assert (report.format.name, report.format.told) == ("plain", False)
    assert "format_unknown" in kinds(report)
    assert not report.exact
    assert "--tool-format" in report.advice[0]


def test_a_wrong_format(audited: Audited) -> None:
    report = audited(template(), tool_format="glm")
    assert report.format.contradicted == "qwen" or report.format.contradicted == "hermes"
    assert {"format_contradicted", "calls_not_read"} <= kinds(report)
    assert not report.exact


def test_refusals(audited: Audited) -> None:
    no_system = "{%- if messages[0].role == 'system' %}{{- raise_exception('no system') }}{%- endif %}"
    report = audited(template(begin=no_system))
    assert "system_refused" in kinds(report)
    assert outcomes(report)["no system"] == "exact"
    assert outcomes(report)["call"] == "refused"
    turns = (
        "{%- for m in messages %}{%- if not loop.first and m.role == 'user' and "
        "messages[loop.index0 - 1].role in ('user', 'tool') %}{{- raise_exception('turns') }}{%- endif %}"
        "{%- endfor %}"
    )
    report = audited(template(begin=turns))
    assert {"alternation_enforced", "user_after_result_refused"} <= kinds(report)
    assert outcomes(report)["call, user"] == "template_refused"
    assert report.exact


def test_bos_twice_and_a_date(model_dir: Callable[[str], Path]) -> None:
    directory = model_dir(template(begin="<|im_start|>{{ strftime_now('%Y') }}"))
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|im_start|>": {
                "id": "<|im_start|>",
                "ids": [t["id"] for t in spec["added_tokens"] if t["content"] == "<|im_start|>"],
                "tokens": ["<|im_start|>"],
            }
        },
    }
    path.write_text(json.dumps(spec))
    assert {"double_bos", "date_dependent"} <= kinds(audit(directory))


def test_tokens_that_the_tokenizer_does_not_have(audited: Audited) -> None:
    assert "tokens_split" not in kinds(audited(template()))
    report = audited(template().replace("im_end", "eot_id"))
    assert {"tokens_split", "stop_split"} <= kinds(report)
    assert not report.exact


def test_content_as_a_list(audited: Audited) -> None:
    assert kinds(audited(template())) & {"list_content_printed"}


def test_a_cut_turn_goes_on_without_what_a_whole_one_ends_with(audited: Audited) -> None:
    report = audited(
        template().replace(
            "{{- '<|im_end|>\\n' }}\n    {%- endif %}", "{{- '\\n<|im_end|>\\n' }}\n    {%- endif %}"
        )
    )
    case = next(case for case in report.cases if case.name == "cut text")
    assert case.outcome is Outcome.KEPT
    assert repr("\n") in (case.detail or "")
    assert outcomes(report)["text"] == "exact"
    assert report.exact


def test_an_unknown_format_or_argument_is_an_error(model_dir: Callable[[str], Path]) -> None:
    directory = model_dir(template())
    with pytest.raises(ConfigError, match="tool-format"):
        audit(directory, tool_format="nope")
    with pytest.raises(ConfigError, match="messages"):
        audit(directory, arguments={"messages": []})


# -- negative controls: an `extend` that lies is caught


def judge_with(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Rendered], object]) -> dict[str, Outcome]:
    renderer = Renderer.from_dir(TINY_MODEL)
    judge = Judge.of(renderer, {}, None, preserve=False, eos_ids=renderer.eos_ids)
    real = Renderer.extend

    def lie(*args: object) -> object:
        bridge = real(*args)  # type: ignore[arg-type]
        assert isinstance(bridge, Rendered)
        return answer(bridge)

    monkeypatch.setattr(Renderer, "extend", lie)
    return {case.name: judge.result(case).outcome for case in CASES if not case.cut}


def test_a_bridge_with_a_token_too_few_or_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for spoil in (lambda ids: ids[1:], lambda ids: ids[:-1], lambda ids: [ids[0], *ids], lambda ids: []):
        with monkeypatch.context() as patch:
            found = judge_with(
                patch,
                lambda bridge, spoil=spoil: Rendered(TokenRun(spoil(bridge.run.ids.tolist())), bridge.tail),
            )
        assert set(found.values()) == {Outcome.DRIFT}


def test_a_refusal_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judge_with(monkeypatch, lambda _: NotExtendable(Rewrite.HISTORY, "because"))
    assert set(found.values()) == {Outcome.BRANCH}
