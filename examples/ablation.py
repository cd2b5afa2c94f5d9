"""What exactness is worth: the run of grpo.py once more, by a trainer that keeps text instead of tokens.

As in frameworks that sample through a chat API and train on the conversation:

- each request renders and encodes the whole history anew (here: a session a turn);
- at the end the conversation is rendered once more with the chat template and encoded;
- the loss mask is guessed: from `<|im_start|>assistant` to `<|im_end|>`, found in the text;
- the "old" log-probabilities are computed by the trainer's own forward pass over those ids, since the
  recorded ones belong to other tokens.

The gateway records what was really sampled, so that the difference can be measured. Held-out questions are
asked token-exactly, as in grpo.py: one yardstick for both. After `make train-demo`, whose curves it needs:

    python examples/ablation.py --seeds 0 1 2
"""

import argparse
import asyncio
import json
import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from curves import Curves, plot
from grpo import Config, Group, Loop, Row, Service, logprobs_of, run_all
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

from tokentape.demo.agent import solve
from tokentape.demo.task import CALCULATOR, Question, reward
from tokentape.model import TINY_MODEL

ASSISTANT = re.compile(r"(?s)<\|im_start\|>assistant\n(.*?<\|im_end\|>)")


class NewSessions:
    """A client as the agent uses it; every request is a session of its own, so nothing is extended."""

    def __init__(self, service: Service, group_id: str) -> None:
        self.chat = self.completions = self
        self.session_ids = list[str]()
        self.messages: Any = []
        self._service, self._group_id = service, group_id

    async def create(self, **fields: Any) -> Any:
        """A chat completion."""
        session = await self._service.call("POST", "/sessions", {"group_id": self._group_id})
        self.session_ids.append(session["session_id"])
        self.messages = fields["messages"]  # the agent's own list: it grows until the episode ends
        return await self._service.openai.with_options(base_url=session["base_url"]).chat.completions.create(
            **fields
        )


@dataclass(slots=True)
class Findings:
    """What re-encoding did, counted over a run, against what was really sampled.

    `aligned` are |recorded - recomputed| (nats) by position, in turns of as many tokens as were sampled;
    `per_turn` the same of the sums over a turn, which have a meaning whatever the tokens are.
    """

    episodes: int = 0
    drifted_episodes: int = 0
    turns: int = 0
    drifted_turns: int = 0
    sampled: int = 0  # tokens that the engine sampled
    missing: int = 0  # of those, not in what is trained on: no mask is over them
    trained: int = 0  # tokens under the guessed mask
    foreign: int = 0  # of those, never sampled
    aligned: list[float] = field(default_factory=list)
    per_turn: list[float] = field(default_factory=list)


def spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each run of ones."""
    edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def guess(tokenizer: Any, messages: Sequence[Any]) -> tuple[list[int], list[int]]:
    """int[N] ids and mask of a conversation, from its text alone."""
    text = tokenizer.apply_chat_template(messages, tools=[CALCULATOR], tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found = [match.span(1) for match in ASSISTANT.finditer(text)]
    mask = [int(any(a <= start < b for a, b in found)) for start, _ in encoded["offset_mapping"]]
    last = len(mask) - mask[::-1].index(1)  # nothing is learned from what follows the last answer
    return encoded["input_ids"][:last], mask[:last]


class TextLoop(Loop):
    """The loop with text in the place of tapes."""

    def __init__(self, config: Config, service: Service, directory: Path) -> None:
        super().__init__(config, service, directory)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(TINY_MODEL)
        self.found = Findings()

    async def play(self, question: Question, group_id: str, seed: int) -> Row:
        """One episode, from its text; `sample` has the turns as they were really sampled."""
        if group_id == "held out":
            return await super().play(question, group_id, seed)
        async with self.slots:
            client: Any = NewSessions(self.service, group_id)
            episode = await solve(client, question, seed=seed)
            paths = [f"/sessions/{session_id}/samples" for session_id in client.session_ids]
            turns = [(await self.service.call("GET", path))["samples"][0] for path in paths]
        ids, mask = guess(self.tokenizer, client.messages)
        return Row(
            token_ids=ids,
            num_prompt_tokens=mask.index(1),
            mask=mask,
            logprobs=[None] * len(ids),
            versions={span["version"] for turn in turns for span in turn["weight_versions"]},
            reward=reward(question, episode.answer),
            sample={"turns": turns},
        )

    def old_logprobs(self, groups: list[Group]) -> list[Tensor]:
        """The trainer's own, computed again before the first update; what it costs in truth is counted."""
        with torch.no_grad():
            old = [logprobs_of(self.model, group) for group in groups]
        for group, logprobs in zip(groups, old, strict=True):
            for row, part in zip(group, logprobs.split([sum(row.mask) for row in group]), strict=True):
                compare(self.found, row, part.tolist())
        return old

    def learn(self, groups: list[Group]) -> Tensor:
        """All updates of a step; float[T] |recorded - recomputed| (nats), where tokens can be compared."""
        before = len(self.found.aligned)
        super().learn(groups)
        return torch.tensor(self.found.aligned[before:])


def compare(found: Findings, row: Row, logprobs: Sequence[float]) -> None:
    """Count what became of an episode; `logprobs` float[T] nats of the tokens under its mask."""
    turns = [turn_of(sample) for sample in row.sample["turns"]]
    guessed, at = list[tuple[list[int], Sequence[float]]](), 0
    for start, end in spans(row.mask):
        guessed.append((row.token_ids[start:end], logprobs[at : at + end - start]))
        at += end - start
    if len(guessed) != len(turns):
        raise SystemExit(f"{len(turns)} turns were sampled, {len(guessed)} are found in the text")
    drifted = 0
    for (ids, recorded), (others, again) in zip(turns, guessed, strict=True):
        blocks = SequenceMatcher(None, ids, others, autojunk=False).get_matching_blocks()
        same = sum(block.size for block in blocks)
        drifted += ids != others
        found.sampled += len(ids)
        found.missing += len(ids) - same
        found.trained += len(others)
        found.foreign += len(others) - same
        found.per_turn.append(abs(sum(recorded) - sum(again)))
        if len(ids) == len(others):
            found.aligned += [abs(a - b) for a, b in zip(recorded, again, strict=True)]
    found.turns += len(turns)
    found.drifted_turns += drifted
    found.episodes += 1
    found.drifted_episodes += drifted > 0


def turn_of(sample: Any) -> tuple[list[int], list[float]]:
    """The sampled ids and log-probabilities of a session of one turn."""
    [(start, end)] = spans(sample["loss_mask"])
    return sample["token_ids"][start:end], sample["logprobs"][start:end]


def table(
    exact: Sequence[Curves], text: Sequence[Curves], found: Sequence[Findings]
) -> list[tuple[str, str, str]]:
    """Rows of a table: what, token-exact, re-encoded; all seeds together."""
    every = Findings()
    for name in asdict(every):
        for each in found:
            setattr(every, name, getattr(every, name) + getattr(each, name))

    def ends(runs: Sequence[Curves]) -> str:
        return ", ".join(f"{run.held_out[0][1]:.1%} to {run.held_out[-1][1]:.1%}" for run in runs)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    worst = max(max(run.mismatch_max) for run in exact)
    average = f"{mean([m for run in exact for m in run.mismatch_mean]):.1e}"
    return [
        ("held-out questions right", ends(exact), ends(text)),
        ("mean gain, points", *(f"{100 * mean([run.gain for run in runs]):+.1f}" for runs in (exact, text))),
        ("episodes whose ids drift", "0", f"{every.drifted_episodes / every.episodes:.1%}"),
        ("turns whose ids drift", "0", f"{every.drifted_turns / every.turns:.1%}"),
        ("sampled tokens under no mask", "0", f"{every.missing / every.sampled:.2%}"),
        ("trained tokens never sampled", "0", f"{every.foreign / every.trained:.2%}"),
        ("|difference| of log-probabilities, mean", average, f"{mean(every.aligned):.1e}"),
        ("the same, largest", f"{worst:.1e}", f"{max(every.aligned):.1e}"),
        (
            "tokens off by more than 1e-3",
            "0" if worst <= 1e-3 else "some",
            f"{mean([d > 1e-3 for d in every.aligned]):.2%}",
        ),
        ("turns whose sum is off by more than 1e-3", "-", f"{mean([d > 1e-3 for d in every.per_turn]):.1%}"),
        ("|difference| of a turn's sum, mean", "-", f"{mean(every.per_turn):.1e}"),
        ("the same, largest", "-", f"{max(every.per_turn):.1e}"),
    ]


def show(exact: Sequence[Curves], text: Sequence[Curves], found: Sequence[Findings], out: Path) -> None:
    """Write the picture and the figures; print the table."""
    rows = table(exact, text, found)
    (out / "ablation.json").write_text(
        json.dumps({"curves": [asdict(run) for run in text], "table": rows}, indent=1) + "\n"
    )
    arms = [("exact", exact), ("re-encoded", text)]

    def lines(name: str) -> dict[str, Any]:
        return {
            f"{arm}, seed {run.seed}": (range(len(run.rewards)), getattr(run, name))
            for arm, runs in arms
            for run in runs
        }

    held_out = {
        f"{arm}, seed {run.seed}": tuple(zip(*run.held_out, strict=True))
        for arm, runs in arms
        for run in runs
    }
    panels: Any = [
        ("held-out questions answered right", "linear", held_out),
        ("mean reward of the episodes trained on", "linear", lines("rewards")),
        ("mean |recorded - recomputed|, nats", "log", lines("mismatch_mean")),
    ]
    plot(out / "ablation.png", panels)
    shown = Table("", "token-exact", "re-encoded")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    Console().print(f"curves   {out / 'ablation.png'}")


def main() -> None:
    """Train on text, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Config().steps)
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="where grpo.py wrote its curves")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as at Ctrl-C: engine and gateway too
    if not (options.out / "curves.json").exists():
        raise SystemExit(f"{options.out}/curves.json is missing: run grpo.py first, to compare with")
    exact = [Curves(**each) for each in json.loads((options.out / "curves.json").read_text())]
    loops = list[TextLoop]()

    def make(config: Config, service: Service, directory: Path) -> TextLoop:
        loops.append(TextLoop(config, service, directory))
        return loops[-1]

    text = asyncio.run(run_all([Config(seed=seed, steps=options.steps) for seed in options.seeds], make))
    show(exact, text, [loop.found for loop in loops], options.out)


if __name__ == "__main__":
    main()
