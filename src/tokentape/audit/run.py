"""The audit: every part of it, the verdict, and what to do where it is negative."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokentape.audit.calls import read_back
from tokentape.audit.defects import find_defects
from tokentape.audit.oracle import Judge
from tokentape.audit.report import (
    GOOD,
    CaseResult,
    Defect,
    FormatFacts,
    Help,
    Outcome,
    Report,
    Severity,
    TemplateFacts,
    Thinking,
)
from tokentape.audit.tokens import examine
from tokentape.errors import ConfigError
from tokentape.formatfile import GRAMMARS
from tokentape.formats import FORMATS, Detected, Format, detect
from tokentape.model import model_sizes
from tokentape.parse import ThinkTags
from tokentape.render import History, Renderer
from tokentape.template import RESERVED, ChatTemplate

VERSION = 1
# Values to try where true and false are not the ones that a template looks for.
_VALUES: dict[str, tuple[Any, ...]] = {
    "reasoning_effort": ("low", "medium", "high", "none"),
    "thinking_mode": ("thinking", "chat", "on", "off", "enabled", "disabled"),
}


def audit(
    directory: Path,
    *,
    model: str | None = None,
    history: History = "template",
    tool_format: str = "auto",
    reasoning_format: str = "auto",
    formats: Sequence[Format] = (),
    arguments: Mapping[str, Any] | None = None,
) -> Report:
    """Audit the tokenizer and chat template of a model directory; `model` is what the report calls it.

    `formats` come before the known ones, `arguments` are template arguments that every request would have.

    Raises:
        ConfigError: a file is missing or broken, a format is not known, an argument may not be given.
    """
    given = dict(arguments or {})
    for name in given:
        if name in RESERVED:
            raise ConfigError(f"template argument {name}: the gateway sets it itself; leave it out")
    sizes = model_sizes(directory)
    renderer = Renderer.from_dir(directory, history=history, num_ids=sizes.vocab_size)
    detected = detect(renderer.template, tool_format, reasoning_format, formats=(*formats, *FORMATS))
    for name in given.keys() - renderer.template.variables:
        known = ", ".join(sorted(renderer.template.variables - RESERVED)) or "none"
        raise ConfigError(f"template argument {name!r}: the chat template does not read it; it reads {known}")
    eos_ids = sizes.eos_ids | renderer.eos_ids
    if any(not 0 <= eos < max(renderer.tokenizer.vocab_size, sizes.vocab_size or 0) for eos in eos_ids):
        raise ConfigError(
            f"{directory}: an eos_token_id is no id of the tokenizer: {sorted(eos_ids)}; "
            "correct generation_config.json, or take tokenizer.json of the same model"
        )
    auditor = _Auditor(renderer, detected, eos_ids, history)
    judge = auditor.judge(given)
    cases = judge.results()
    calls = read_back(judge, detected.format)
    tokenizer = examine(renderer.tokenizer, directory / "tokenizer.json")
    defects = find_defects(judge, detected, cases, calls, tokenizer)
    exact = auditor.is_exact(cases) and not any(d.severity is Severity.ERROR for d in defects)
    helps, preserved = auditor.helps(given, cases), auditor.preserve_holds(given)
    return Report(
        version=VERSION,
        model=model or str(directory),
        history=history,
        arguments=given,
        exact=exact,
        preserved=preserved,
        reasons=_reasons(cases, defects, auditor),
        advice=() if exact else auditor.advice(cases, helps, defects, preserved=preserved),
        format=_format_facts(detected),
        template=_template_facts(renderer.template, judge),
        cases=cases,
        calls=calls,
        helps=helps,
        defects=defects,
        tokenizer=tokenizer,
    )


class _Auditor:
    """Judges one model under other arguments and the other `--history`."""

    def __init__(
        self, renderer: Renderer, detected: Detected, eos_ids: frozenset[int], history: History
    ) -> None:
        self._renderer = renderer
        self._detected = detected
        self._eos_ids = eos_ids
        self._history: History = history

    def judge(self, arguments: Mapping[str, Any], *, preserve: bool | None = None) -> Judge:
        """A judge under these arguments; `preserve` None: as asked for."""
        renderer = self._renderer
        if preserve is not None:
            history: History = "preserve" if preserve else "template"
            renderer = Renderer(renderer.tokenizer, renderer.template, history=history)
        return Judge.of(
            renderer,
            arguments,
            self._detected.format.reasoning,
            preserve=self._history == "preserve" if preserve is None else preserve,
            eos_ids=self._eos_ids,
        )

    def is_good(self, case: CaseResult) -> bool:
        """Whether a case holds: exact, or kept where that is what was asked for."""
        return case.outcome in GOOD or (self._history == "preserve" and case.outcome is Outcome.KEPT)

    def is_exact(self, cases: Sequence[CaseResult]) -> bool:
        """Whether the cases of tool use that can happen hold."""
        counted = [case for case in cases if case.counted]
        return bool(counted) and all(map(self.is_good, counted))

    def helps(self, given: Mapping[str, Any], cases: Sequence[CaseResult]) -> tuple[Help, ...]:
        """Template arguments, one at a time, under which more cases hold; those for the verdict first."""
        good = {case.name for case in cases if self.is_good(case) and case.possible}
        if all(case.name in good for case in cases if case.possible):
            return ()
        was_exact, found = self.is_exact(cases), list[Help]()
        for name in sorted(self._renderer.template.variables - RESERVED - given.keys()):
            for value in _VALUES.get(name, (True, False)):
                judge = self.judge({**given, name: value})
                results = judge.results()
                possible = {case.name for case in results if case.possible}
                now = {case.name for case in results if self.is_good(case) and case.possible}
                # Where thoughts are off and nothing holds, an argument that turns them on may be the answer.
                gained = tuple(
                    c.name for c in cases if c.name in now - good and (c.possible or not was_exact)
                )
                lost = tuple(c.name for c in cases if c.name in (good & possible) - now)
                if gained:
                    exact = self.is_exact(results)
                    found.append(Help({name: value}, judge.thinking, gained, lost, exact))
        return tuple(sorted(found, key=lambda h: (not h.exact, len(h.lost) - len(h.gained))))

    def advice(
        self,
        cases: Sequence[CaseResult],
        helps: Sequence[Help],
        defects: Sequence[Defect],
        *,
        preserved: bool,
    ) -> tuple[str, ...]:
        """What to do where multi-turn tool use is not exact."""
        kinds, found = {defect.kind for defect in defects}, list[str]()
        if any(kind in kinds for kind in ("format_unknown", "calls_not_read", "format_contradicted")):
            found.append("name the format (--tool-format), or describe it in a TOML file (--formats)")
        found += [_pass_on(help_.argument) for help_ in helps if help_.exact][:2]
        parallel = {"parallel_calls_refused", "parallel_calls_dropped"} & kinds
        if parallel and all(c.name.endswith("two calls") for c in cases if c.counted and not self.is_good(c)):
            found.append('send "parallel_tool_calls": false: one call a turn is exact')
        if self._history == "template" and preserved:
            found.append(
                "--history preserve: what was sampled stays, and a rollout is one tape; its prompts are then "
                "not what the template alone would write"
            )
        found.append(
            "or a template that is fixed: put it as chat_template.jinja into a copy of the model's tokenizer "
            "files and give that directory to --model; the engine sees only ids"
        )
        return tuple(found)

    def preserve_holds(self, given: Mapping[str, Any]) -> bool:
        """Whether the cases of tool use that can happen are exact or kept with `--history preserve`."""
        results = [case for case in self.judge(given, preserve=True).results() if case.counted]
        return bool(results) and all(case.outcome in (*GOOD, Outcome.KEPT) for case in results)


def _reasons(cases: Sequence[CaseResult], defects: Sequence[Defect], auditor: _Auditor) -> tuple[str, ...]:
    """Why multi-turn tool use is not exact; empty where it is."""
    failed = [case for case in cases if case.counted and not auditor.is_good(case)]
    said = [f"{case.name}: {case.reason or case.outcome.value} ({case.detail})" for case in failed]
    return (*(f"{d.kind}: {d.detail}" for d in defects if d.severity is Severity.ERROR), *said)


def _pass_on(argument: Mapping[str, Any]) -> str:
    options = " ".join(f"--template-arg {name}={json.dumps(value)}" for name, value in argument.items())
    kwargs = json.dumps({"chat_template_kwargs": dict(argument)})
    return f"tokentape serve {options}; or {kwargs} in every request (the SDKs: extra_body={kwargs})"


def _format_facts(detected: Detected) -> FormatFacts:
    row = detected.format
    names = {kind: name for name, kind in GRAMMARS.items()}
    reasoning = None if row.reasoning is None else "harmony"
    if isinstance(row.reasoning, ThinkTags):
        reasoning = f"{row.reasoning.open}{row.reasoning.close}"
    return FormatFacts(
        name=row.name,
        grammars=tuple(names.get(type(grammar), type(grammar).__name__) for grammar in row.calls),
        reasoning=reasoning,
        why=detected.why,
        told=detected.told,
        contradicted=detected.contradicted,
    )


def _template_facts(template: ChatTemplate, judge: Judge) -> TemplateFacts:
    return TemplateFacts(
        arguments="text" if template.arguments_as_text else "object",
        empty_content=template.empty_content,
        call_ids="nine letters and digits" if template.short_call_ids else "any",
        variables=tuple(sorted(template.variables - RESERVED)),
        thinking=Thinking(judge.thinking),
        stop_text=judge.stops.text,
        stop_calls=judge.stops.calls,
    )
