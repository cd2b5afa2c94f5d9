"""What is wrong with a template, or with it and this tokenizer together, and what that means."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokentape.audit.cases import CASES, MORE, NOON, SUNNY, SYSTEM, THOUGHT, TOOLS, USER, WEATHER, says
from tokentape.audit.oracle import Judge, behind, text_of
from tokentape.audit.report import CaseResult, Defect, Outcome, ReadBack, Severity, Thinking, TokenizerFacts
from tokentape.errors import TemplateRefused
from tokentape.formats import Detected
from tokentape.render import Frame
from tokentape.types import Message

_SHOWN = 600  # characters of a detail
ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
# Texts that are certainly meant as one token: <|this|>, DeepSeek's with bars of its own, MiniMax's ]~b].
_TOKEN = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>|\]~!b\[|\]~b\]|\[e~\[")  # noqa: RUF001


def find_defects(
    judge: Judge,
    detected: Detected,
    cases: Sequence[CaseResult],
    calls: Sequence[ReadBack],
    tokenizer: TokenizerFacts,
) -> tuple[Defect, ...]:
    """Every defect, the worst first."""
    found = [
        *_calls(judge, detected, calls),
        *_results(judge),
        *_roles(judge),
        *_thoughts(judge, detected),
        *_drift(cases),
        *_tokens(judge),
        *_bos(judge, tokenizer),
        *_stops(judge),
        *_conventions(judge),
    ]
    order = list(Severity)
    return tuple(sorted(found, key=lambda defect: order.index(defect.severity)))


def _text(judge: Judge, messages: Sequence[Message], *, tools: bool = True, go_on: bool = True) -> str | None:
    """The text of a conversation; None where the template raises."""
    try:
        return text_of(judge.renderer, Frame(TOOLS if tools else (), judge.arguments), messages, go_on=go_on)
    except TemplateRefused:
        return None


def _start(judge: Judge) -> tuple[Message, ...]:
    """How a conversation may start: without a system message where the template refuses one."""
    start = (SYSTEM, USER)
    refused = _text(judge, start, tools=False) is None and _text(judge, start) is None
    return (USER,) if refused else start


def _calls(judge: Judge, detected: Detected, calls: Sequence[ReadBack]) -> Iterator[Defect]:
    yield from _format(detected)
    start = _start(judge)
    one, two = (next(case.reply for case in CASES if case.name == name) for name in ("call", "two calls"))
    text, both = _text(judge, [*start, one, SUNNY]), _text(judge, [*start, two, SUNNY, NOON])
    dropped = WARNING if judge.preserve else ERROR  # the sampled calls stay, whatever the template writes
    if text is None:
        yield Defect("calls_refused", ERROR, "the template raises on a tool call: it has no tool use")
        return
    if "Paris" not in text:
        yield Defect(
            "calls_dropped",
            dropped,
            "the template does not write the assistant's tool calls: whatever is rendered again, the model "
            "does not see what it asked for",
        )
        return
    if both is None:
        yield Defect(
            "parallel_calls_refused",
            WARNING,
            "the template raises on two calls in one turn; such a turn can be kept, and never rendered again",
        )
    elif "Paris" not in both or "Europe" not in both:
        yield Defect(
            "parallel_calls_dropped", dropped, "the template writes only one of two calls made in one turn"
        )
    if detected.told:
        yield from _read_back(detected.format.name, calls, parallel=both is not None)


def _format(detected: Detected) -> Iterator[Defect]:
    name = detected.format.name
    if detected.contradicted:
        yield Defect(
            "format_contradicted",
            ERROR,
            f"the template writes calls as {detected.contradicted} reads them; {name}, which was asked for, "
            "does not",
        )
    if not detected.told:
        yield Defect(
            "format_unknown",
            ERROR,
            "the template does not tell how this model writes calls: they reach the agent as text. Name a "
            "format (--tool-format), or describe one (--formats)",
        )


def _read_back(name: str, calls: Sequence[ReadBack], *, parallel: bool) -> Iterator[Defect]:
    wrong = [call for call in calls if not call.ok and (parallel or call.name != "two calls")]
    if len(wrong) >= len(calls) - 1:
        yield Defect("calls_not_read", ERROR, f"{name} reads none of the calls that the template writes")
        return
    refused = ", ".join(call.name for call in wrong if call.wrote is None)
    misread = ", ".join(call.name for call in wrong if call.wrote is not None)
    if refused:
        yield Defect(
            "arguments_refused",
            WARNING,
            f"the template raises on a call of this kind, or on the schema of its tool: {refused}",
        )
    if misread:
        yield Defect(
            "arguments_not_read",
            WARNING,
            f"what the template writes is not what {name} reads back: {misread}. Where history is rendered, "
            "the model sees such an argument otherwise than it was",
        )


def _results(judge: Judge) -> Iterator[Defect]:
    start = _start(judge)
    text = _text(judge, [*start, says(None, WEATHER), SUNNY])
    if text is not None and (SUNNY.content or "") not in text:
        yield Defect(
            "results_dropped", ERROR, "the template does not write tool results: the model never sees them"
        )
    prompt = _text(judge, start)
    if prompt is not None and TOOLS[0]["function"]["name"] not in prompt:
        yield Defect(
            "tools_not_shown",
            WARNING,
            "the template does not write the tools' definitions: say in messages of your own what there is",
        )
    user_after = _text(judge, [*start, says(None, WEATHER), SUNNY, MORE])
    if text is not None and user_after is None:
        yield Defect(
            "user_after_result_refused",
            WARNING,
            "the template raises on a user's message after a tool result",
        )


def _roles(judge: Judge) -> Iterator[Defect]:
    with_system = _text(judge, [SYSTEM, USER], tools=False)
    without = _text(judge, [USER], tools=False)
    if without is None and _text(judge, [USER]) is None:
        yield Defect("text_refused", ERROR, "the template raises on a single message of a user")
        return
    if without is not None:
        if with_system is None:
            yield Defect(
                "system_refused",
                WARNING,
                "the template raises on a system message: such requests are answered 400",
            )
        elif (SYSTEM.content or "") not in with_system:
            yield Defect("system_dropped", WARNING, "the template does not write the system message")
    if without is not None and _text(judge, [USER, MORE], tools=False) is None:
        yield Defect(
            "alternation_enforced",
            WARNING,
            "the template raises unless user and assistant take turns: two messages of a user in a row are "
            "answered 400",
        )
    yield from _lists(judge)


def _lists(judge: Judge) -> Iterator[Defect]:
    """Content as a list of parts. No request of ours has it, so this is for other users of the template."""
    user: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "word1q"}]}
    try:
        text = judge.renderer.template.render([user], None, judge.arguments, add_generation_prompt=True)
    except TemplateRefused:
        text = None
    if text is None or "word1q" not in text:
        what = "raises on" if text is None else "ignores"
        kind = "list_content_refused" if text is None else "list_content_ignored"
    elif "'type'" in text or '"type"' in text:
        what, kind = "prints the data of", "list_content_printed"
    else:
        return
    yield Defect(
        kind, INFO, f"the template {what} content that is a list of parts; tokentape joins text parts"
    )


def _thoughts(judge: Judge, detected: Detected) -> Iterator[Defect]:
    if judge.thinking in (Thinking.CLOSED, Thinking.NEVER):
        if detected.format.reasoning is None:
            yield Defect(
                "thoughts_unknown",
                INFO,
                "the template knows no tags for thoughts: what a model thinks is part of its text",
            )
        return
    start = _start(judge)
    turns = (says("It is sunny.", thought=THOUGHT), says(None, WEATHER, thought=THOUGHT))
    texts = [
        _text(judge, [*start, turn], tools=tools, go_on=False) for turn in turns for tools in (False, True)
    ]
    if any(texts) and not any(THOUGHT in text for text in texts if text):
        yield Defect(
            "thoughts_dropped",
            WARNING,
            "the template never writes a turn's thought, not even the last one's: every turn that thinks is "
            "followed by a branch (or kept, with --history preserve)",
        )


def _drift(cases: Sequence[CaseResult]) -> Iterator[Defect]:
    for case in cases:
        if case.outcome is Outcome.DRIFT:
            yield Defect(
                "drift",
                ERROR if case.counted else WARNING,
                f"case {case.name!r}: extension and template contradict each other. This is a bug of "
                f"tokentape: please report it, with this template. {(case.detail or '')[:_SHOWN]}",
            )


def _tokens(judge: Judge) -> Iterator[Defect]:
    tokenizer, written = judge.renderer.tokenizer, dict[str, int]()
    for case in CASES:
        text = _text(judge, [*case.before, case.reply, *case.new], tools=bool(case.tools)) or ""
        for token in _TOKEN.findall(text):
            written[token] = written.get(token) or len(tokenizer.encode(token))
    for case in (case for case in CASES if case.name in ("text", "call")):
        last = _text(judge, [*case.before, case.reply], tools=bool(case.tools), go_on=False) or ""
        ends = _TOKEN.findall(behind(last, case) or "")
        stop = judge.stops.calls if case.reply.tool_calls else judge.stops.text
        known = stop is not None and tokenizer.id_of(stop) in judge.eos_ids
        if ends and tokenizer.id_of(ends[-1]) is None and not known:
            yield Defect(
                "stop_split",
                ERROR,
                f"the template ends a turn with {ends[-1]}, which is no token of this tokenizer: no model "
                "samples it as one",
            )
            break
    split = [f"{token} ({num} ids)" for token, num in written.items() if num != 1]
    if split:
        yield Defect(
            "tokens_split",
            WARNING,
            f"the template writes tokens that this tokenizer does not have: {', '.join(split)}. Is it the "
            "tokenizer of this template's model?",
        )


def _bos(judge: Judge, tokenizer: TokenizerFacts) -> Iterator[Defect]:
    text = _text(judge, _start(judge), tools=False) or _text(judge, _start(judge)) or ""
    adds = "".join(tokenizer.adds)
    if not adds or not text:
        return
    if text.startswith(adds):
        yield Defect(
            "double_bos",
            WARNING,
            f"both the template and the tokenizer begin with {adds}: whoever encodes the rendered text by "
            "the tokenizer's defaults has it twice. tokentape has it once",
        )
    else:
        yield Defect(
            "bos_not_written",
            INFO,
            f"the tokenizer puts {adds} before a text by default, and the template does not write it: "
            "prompts of tokentape, as of chat servers, are without it",
        )


def _stops(judge: Judge) -> Iterator[Defect]:
    tokenizer, stops = judge.renderer.tokenizer, judge.stops
    eos = sorted(tokenizer.token_text(i) for i in judge.eos_ids)
    known = {stop for stop in (stops.text, stops.calls) if stop}
    if not known:
        yield Defect(
            "stop_not_written",
            WARNING,
            "the template ends a turn with no token: the sampled one stays on the tape, and the prompt that "
            "follows is not what the template writes",
        )
    elif eos and not known & set(eos):
        yield Defect(
            "stop_unknown",
            WARNING,
            f"the template ends a turn with {' or '.join(sorted(known))}; the model's files name only "
            f"{', '.join(eos)}. Does the engine stop there (generation_config.json, stop_token_ids)?",
        )


def _conventions(judge: Judge) -> Iterator[Defect]:
    template = judge.renderer.template
    if template.short_call_ids:
        yield Defect(
            "call_ids_fixed",
            INFO,
            "ids of tool calls must be nine letters and digits: tokentape makes such ids; an agent that "
            "makes its own is answered 400",
        )
    if "strftime_now" in template.source:
        names = sorted(name for name in template.variables if "date" in name)
        pin = f" (pin it with the template argument {names[0]})" if names else ""
        yield Defect(
            "date_dependent",
            WARNING,
            f"the template may write today's date: the same conversation has other ids tomorrow{pin}. A turn "
            "that was recorded stays as it is",
        )
