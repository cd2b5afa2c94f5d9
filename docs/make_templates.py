"""Write `templates.md`: what the tests' oracle finds for every reference model. Run from anywhere.

python docs/make_templates.py
"""

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "render"
sys.path.insert(0, str(TESTS))

from render_golden import CASES, STAND_IN, Models, every_template, judge  # noqa: E402

from tokentape.errors import TemplateRefused  # noqa: E402

PAGE = Path(__file__).with_name("templates.md")

_SHORT = {
    "history_rewritten": "history",
    "generation_prompt_rewritten": "prompt",
    "reasoning_dropped": "reasoning",
    "content_dropped": "text",
    "tool_calls_dropped": "calls",
    "end_of_turn_rewritten": "end",
    "template_refused": "refused",
    "no prompt": "-",
}

_PAGE = """\
<!-- Made by docs/make_templates.py; a test compares it. Change the script, not this page. -->
# Where a turn can be extended

A chat template turns messages into text. It was written for one prompt at a time, and nothing makes it render
the same beginning when messages are added. Training needs exactly that: the next prompt must be what the model
saw and sampled, and then what is new.

## What exact extension is

    prompt ids + completion ids + bridge ids = the next prompt

The first two are recorded, and never encoded again. The bridge is all that stands between the last sampled token
and the next one: the newline behind the end of turn (the model does not sample it), the tool results or the user's
text, the opening of the next turn. Its ids have mask 0.

The bridge is right when this holds: if the completion happens to be the text that the template itself would
write, then the sum equals the full render of the conversation, id by id.

## How the bridge is found

No table of models says what a bridge looks like. The template is asked, with a short stand-in for the conversation
in which the sampled turn carries marks that occur nowhere else:

1. The stand-in ends with the turn: the text behind the mark is how the template closes a last turn.
2. The new messages follow: the text behind the mark is how it closes the turn, and all that is new.
3. What both have in common is the end of turn. The stop token that the model sampled is found in it, or right behind
   it where the stop token is the next opener too (GLM). The bridge is what follows.

A completion without a stop token (cut by length, or by a stop string) is closed by the template's own end of turn,
which is then part of the bridge. So is a thought that was cut: first the thought is closed, then the turn. A stop
token that the template does not write stays, as it was sampled; the turn is closed behind it.

The stand-in holds every transition between kinds of messages that the conversation had, with short texts. Asking
costs the same at turn 3 and at turn 300.

## Where there is none

With `--history template` (the default) a turn that the template would render otherwise than it was sampled is not
extended. A new branch starts with a full render, and carries the reason:

| reason | short | the template … |
|---|---|---|
| `history_rewritten` | history | renders messages before the turn differently once others follow, as when a user's message makes it drop the thoughts of all earlier turns |
| `generation_prompt_rewritten` | prompt | does not begin the turn as the prompt ended: the prompt opened a thought (`<think>`) that it does not render for this turn |
| `reasoning_dropped` | reasoning | does not render the turn's thought |
| `content_dropped` | text | does not render the turn's text, as some do beside a tool call |
| `tool_calls_dropped` | calls | does not render the turn's tool calls, or not all of them |
| `end_of_turn_rewritten` | end | ends an earlier turn with another token than a model samples (gpt-oss: `<\\|end\\|>` for `<\\|return\\|>`) |
| `template_refused` | refused | raises on this conversation; a full render then answers 400 with the template's words |

## What `--history preserve` changes

The ids that were sampled stay, whatever the template would make of them; only the bridge is the template's. The
model goes on seeing its earlier thoughts, and a rollout is one tape. It is also a prompt that the model's own
template would not write: right for training on what was sampled, wrong where prompts must be what a server with
this template would send.

## The table

Each cell was found by rendering the whole conversation and comparing ids; the tests do the same with generated
conversations.

- **exact**: prompt + completion + bridge is the full render, id by id.
- **exact\\***: the text is the same, and the bridge's ids. Where the prompt ends and the completion begins the full
  render merges two tokens that the model saw as two (`\\n` and `\\n` in Qwen3.5's empty thought). The ids that the model
  saw are kept.
- **kept**: the template would render the turn otherwise (or, Llama with two calls, not at all); the sampled ids stay,
  and the bridge is the template's.
- **-**: the template has no prompt for this conversation to begin with (Hermes 3 without tools).
- a short reason from above: a branch.

{cases}

`--history template`

{template}

`--history preserve`

{preserve}

{stand_in} are here without their tokenizers: their
templates were paired with a byte-level tokenizer that has their control tokens, which shows what the template
does, and not how their own tokenizer would encode it.

Where a cell is a branch, a model that samples that turn gets a new prompt, its earlier turns stay on the tape that
they were sampled on, and every sampled token is still trained once.
"""  # noqa: E501


def outcomes(models: Models, model: str, history: str) -> list[str]:
    """One row of the table."""
    renderer, row = models.renderer(model, history), list[str]()
    for case in CASES.values():
        try:
            outcome = judge(renderer, model, case, preserve=history == "preserve")
        except TemplateRefused:
            outcome = "no prompt"
        row.append(_SHORT.get(outcome, outcome.replace("*", "\\*")))
    return row


def make_page(models: Models) -> str:
    """The whole page; the same for the same models."""
    letters = "abcdefghijklm"[: len(CASES)]
    head = [f"| model | {' | '.join(letters)} |", f"|---|{'---|' * len(letters)}"]

    def table(history: str) -> str:
        rows = [f"| {name} | {' | '.join(outcomes(models, name, history))} |" for name in every_template()]
        return "\n".join(head + rows)

    titles = [f"**{letter}** {case.title}" for letter, case in zip(letters, CASES.values(), strict=True)]
    *first, last = sorted(STAND_IN)
    return _PAGE.format(
        cases=" · ".join(titles),
        template=table("template"),
        preserve=table("preserve"),
        stand_in=f"{', '.join(first)} and {last}",
    )


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as directory:
        PAGE.write_text(make_page(Models(Path(directory))), encoding="utf-8")


if __name__ == "__main__":
    main()
