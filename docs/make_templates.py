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
which is then part of the bridge. So is a thought that was cut: first the thought is closed, then the turn.

The stand-in holds every transition between kinds of messages that the conversation had, with short texts, and each
turn's calls with all their results. Asking costs the same at turn 3 and at turn 300. Two kinds of templates need
more, and are told apart by asking them when the model is loaded, or by the marks in their answer:

- A template that numbers calls or rounds (Cohere, ChatGLM): the stand-in then has every message of the conversation,
  still with short texts.
- A template that repeats the tools or the system's text with each user (Mistral): it is asked again with the real
  ones. One that repeats other earlier messages behind the turn is not extended.

## Where there is none

With `--history template` (the default) a turn that the template would render otherwise than it was sampled is not
extended. A new branch starts with a full render, and carries the reason:

| reason | short | the template … |
|---|---|---|
| `history_rewritten` | history | renders messages before the turn differently once others follow, as when a user's message makes it drop the thoughts of all earlier turns |
| `generation_prompt_rewritten` | prompt | does not begin the turn as the prompt ended: the prompt opened a thought (`<think>`) that it does not render for this turn |
| `reasoning_dropped` | reasoning | does not render the turn's thought |
| `content_dropped` | text | does not render the turn's text, as some do beside a tool call, or moves it behind the results of its calls |
| `tool_calls_dropped` | calls | does not render the turn's tool calls, or not all of them |
| `end_of_turn_rewritten` | end | ends an earlier turn with another token than a model samples (gpt-oss: `<\\|end\\|>` for `<\\|return\\|>`), or never writes the one that was sampled |
| `template_refused` | refused | raises on this conversation; a full render then answers 400 with the template's words |

## `--history template` or `--history preserve`

Both are exact in the same sense: no sampled id is encoded again, every sampled token is trained once, and the bridge
is what the template writes. They differ in what the next turn is conditioned on.

**`template`**: every prompt is one that a server with this template sends when it is given the same messages. Where
the template forgets (thoughts of earlier turns, once a user speaks again), the next turn starts a new branch without
them.

- What is trained is what will be served: the policy learns to go on from a history without its old thoughts.
- A rollout may be several samples. What they have in common is trained in one of them, and is context (mask 0) in the
  others; a reward belongs to the session, so give it to each of its samples, or weigh them as your trainer does.
- Each branch encodes and prefills a whole prompt again.

**`preserve`**: the sampled ids stay, whatever the template would make of them. The model goes on seeing its earlier
thoughts, and a rollout is one tape, one sample.

- Cheapest to sample and to train: one prompt that only grows, which the engine has in its cache.
- The prompts are not what a server with this template sends from plain messages. Serve the trained model in the same
  way (through `tokentape serve --history preserve`, or with a template that keeps thoughts), or it will meet histories
  that it was not trained on.
- The context fills up with thoughts: long tasks reach the limit sooner.
- A stop token that the template does not write stays, as it was sampled; the turn is closed behind it.

Some templates have an argument that makes them keep thoughts by themselves (`clear_thinking=false`,
`preserve_thinking=true`, `truncate_history_thinking=false`): then the two agree, and `template` is the better choice.
`tokentape audit` tries them and says which one helps.

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
