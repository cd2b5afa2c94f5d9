"""The loop that learns: its mathematics exactly, and two steps of it with real processes."""

import json
import math
import signal
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import ablation
import grpo
import pytest
import pytest_asyncio
import torch
from ablation import Findings, TextLoop, compare, guess, spans
from curves import Curves, report
from grpo import (
    Config,
    Group,
    Loop,
    Row,
    Service,
    clipped_loss,
    group_advantages,
    logprobs_of,
    recorded_logprobs,
    serving,
)
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokentape.demo.task import CALCULATOR
from tokentape.engines.local.forward import Forward
from tokentape.invariants import check_samples
from tokentape.model import TINY_MODEL

SMALL = Config(steps=2, questions=2, group=3, updates=2, warm_up=1, held_out=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the example sets it: on busy cores threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row(ids: list[int], mask: list[int], *, prompt: int = 3, reward: float = 0.0) -> Row:
    logprobs = [-0.5 if m else None for m in mask]
    return Row(ids, prompt, mask, logprobs, {"step-0"}, reward, {})


# --- the mathematics


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([1.0, 0.0, 0.0, 1.0], [1.0, -1.0, -1.0, 1.0]),
        ([1.0, 0.0, 0.0, 0.0], [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]),
        ([1.0, 1.0], [0.0, 0.0]),
        ([0.0], [0.0]),
    ],
)
def test_advantages_are_within_the_group(rewards: list[float], advantages: list[float]) -> None:
    assert group_advantages(rewards) == pytest.approx(advantages)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # nothing to correct: the plain policy gradient
        (1.1, 1.0, -1.1, -1.1),
        (2.0, 1.0, -1.28, 0.0),  # likelier than it was, and good: enough
        (0.5, -1.0, 0.8, 0.0),  # less likely, and bad: enough
        (2.0, -1.0, 2.0, 2.0),  # likelier, and bad: never clipped
        (0.5, 1.0, -0.5, -0.5),
    ],
)
def test_the_loss_is_clipped_on_the_side_that_has_gone_far_enough(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    old = torch.tensor([-1.5])
    new = (old + math.log(ratio)).requires_grad_()
    value = clipped_loss(new, old, torch.tensor([advantage]), 0.2, 0.28)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(slope)


def test_the_loss_is_a_sum_over_tokens() -> None:
    zeros = torch.zeros(3)
    assert clipped_loss(zeros, zeros, torch.tensor([1.0, 2.0, -0.5]), 0.2, 0.28).item() == pytest.approx(-2.5)


def test_a_shared_prompt_changes_no_log_probability_and_no_gradient() -> None:
    """Against one plain forward pass an episode; the episodes differ in length and in what is sampled."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    group = [
        row([5, 6, 7, 20, 21, 22, 23, 24, 25], [0, 0, 0, 1, 1, 0, 0, 1, 1]),
        row([5, 6, 7, 30, 31], [0, 0, 0, 1, 1]),
        row([5, 6, 7, 40, 41, 42], [0, 0, 0, 1, 1, 1]),
    ]
    shared = logprobs_of(model, group)
    forward = Forward(TINY_MODEL)
    plain = [
        again[i - 1]
        for each in group
        for again in [forward.logprobs(each.token_ids)]
        for i, sampled in enumerate(each.mask)
        if sampled
    ]
    assert shared.tolist() == pytest.approx(plain, abs=1e-4)
    weight = model.model.layers[0].self_attn.k_proj.weight
    (shared_gradient,) = torch.autograd.grad(shared.sum(), weight)
    alone = sum(logprobs_of(model, [each]).sum() for each in group)
    (plain_gradient,) = torch.autograd.grad(alone, weight)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(shared_gradient, plain_gradient, rtol=1e-3, atol=1e-4)


def test_recorded_are_those_under_the_mask() -> None:
    group = [row([1, 2, 3, 4, 5], [0, 0, 0, 1, 0]), row([1, 2, 3, 4], [0, 0, 0, 1])]
    assert recorded_logprobs(group).tolist() == [-0.5, -0.5]
    assert logprobs_of(AutoModelForCausalLM.from_pretrained(TINY_MODEL), group).shape == (2,)


# --- two steps


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Service]:
    """One engine and one gateway for all."""
    async with serving(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.mark.asyncio(loop_scope="module")
async def test_two_steps(service: Service, tmp_path: Path) -> None:
    loop = Loop(SMALL, service, tmp_path)
    before = {name: weight.clone() for name, weight in loop.model.state_dict().items()}
    for step in range(SMALL.steps):
        await loop.push(f"step-{step}")
        groups = await loop.rollouts()
        assert [len(group) for group in groups] == [SMALL.group] * SMALL.questions
        for each in (each for group in groups for each in group):
            assert each.versions == {f"step-{step}"}
            assert each.reward in {0.0, 1.0}
            assert check_samples([each.sample]) == []
            sampled = [range(turn["start"], turn["end"]) for turn in each.sample["turns"]]
            assert [i for i, m in enumerate(each.mask) if m] == [i for span in sampled for i in span]
        assert largest_deviation(loop, groups) < 1e-3
        groups[0] = [opposite(groups[0]), *groups[0][1:]]  # whatever was earned: there is something to learn
        mismatch = loop.learn(groups)
        assert len(mismatch) > 0
        assert mismatch.max() < 1e-3
        assert largest_deviation(loop, groups) > 1e-3  # the weights have moved on, and the check sees it
    after = loop.model.state_dict()
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert all(not torch.equal(weight, before[name]) for name, weight in after.items())
    assert 0.0 <= await loop.evaluate() <= 1.0  # by the weights of step 1: they were not pushed


@pytest.mark.asyncio(loop_scope="module")
async def test_tokens_of_other_weights_are_refused(service: Service, tmp_path: Path) -> None:
    loop = Loop(SMALL, service, tmp_path)
    await loop.push("step-0")
    loop.version = "step-1"
    with pytest.raises(RuntimeError, match=r"pushed step-1, but the tapes say \['step-0'\]"):
        await loop.rollouts()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_step_on_text(service: Service, tmp_path: Path) -> None:
    loop = TextLoop(SMALL, service, tmp_path)
    await loop.push("step-0")
    groups = await loop.rollouts()
    groups = [[opposite(group), *group[1:]] for group in groups]
    mismatch = loop.learn(groups)
    assert torch.isfinite(mismatch).all()
    found = loop.found
    assert found.episodes == sum(map(len, groups))
    assert found.turns == sum(len(each.sample["turns"]) for group in groups for each in group)
    assert found.trained == sum(sum(each.mask) for group in groups for each in group)
    # Where a turn has not drifted, text is as exact as tokens: what is measured is drift alone.
    assert sum(each < 1e-3 for each in found.per_turn) >= found.turns - found.drifted_turns > 0


def largest_deviation(loop: Loop, groups: list[Group]) -> float:
    """How far an importance ratio is from 1."""
    with torch.no_grad():
        ratios = [(logprobs_of(loop.model, group) - recorded_logprobs(group)).exp() for group in groups]
    return max(float((ratio - 1).abs().max()) for ratio in ratios)


def opposite(group: Group) -> Row:
    """The group's first episode, with the reward that its second has not."""
    first = group[0]
    arrays = first.token_ids, first.num_prompt_tokens, first.mask, first.logprobs, first.versions
    return Row(*arrays, 1.0 - group[1].reward, first.sample)


# --- the ablation's parts


def test_spans() -> None:
    assert spans([0, 1, 1, 0, 0, 1]) == [(1, 3), (5, 6)]
    assert spans([1]) == [(0, 1)]
    assert spans([0, 0]) == []


def test_guessed_masks_are_what_the_text_shows() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    arguments = json.dumps({"expression": "3 * 4"})
    call = {"id": "1", "type": "function", "function": {"name": "calculator", "arguments": arguments}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "What is 3 * 4?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "12"},
        {"role": "assistant", "content": "It is 12."},
    ]
    ids, mask = guess(tokenizer, messages)
    shown = [tokenizer.decode(ids[start:end]) for start, end in spans(mask)]
    body = json.dumps({"name": "calculator", "arguments": json.loads(arguments)})
    assert shown == [f"<tool_call>\n{body}\n</tool_call><|im_end|>", "It is 12.<|im_end|>"]
    assert json.dumps(CALCULATOR)[:20] in tokenizer.decode(ids)
    assert mask[-1] == 1


def test_what_re_encoding_costs_is_counted() -> None:
    """Two turns: one as it was sampled, and one in which two tokens became one."""

    def turn(ids: list[int], logprobs: list[float]) -> dict[str, object]:
        return {
            "token_ids": [1, 2, *ids],
            "loss_mask": [0, 0, *[1] * len(ids)],
            "logprobs": [None, None, *logprobs],
        }

    sampled = [turn([7, 8], [-1.0, -2.0]), turn([3, 4, 9], [-1.0, -1.0, -0.5])]
    text = Row([1, 2, 7, 8, 5, 6, 9], 2, [0, 0, 1, 1, 0, 1, 1], [None] * 7, set(), 1.0, {"turns": sampled})
    found = Findings()
    compare(found, text, [-1.0, -2.25, -4.0, -0.5])
    assert (found.episodes, found.drifted_episodes, found.turns, found.drifted_turns) == (1, 1, 2, 1)
    assert (found.sampled, found.missing, found.trained, found.foreign) == (5, 2, 4, 1)
    assert found.aligned == [0.0, 0.25]
    assert found.per_turn == [0.25, 2.0]


# --- the report


@pytest.mark.parametrize(
    ("end", "seconds", "reached"), [(0.81, 90, True), (0.79, 90, False), (0.9, 601, False)]
)
def test_the_report_says_whether_the_goal_is_reached(
    tmp_path: Path, end: float, seconds: float, reached: bool
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'tokentape[train]'")
    run = Curves(3, [(0, 0.5), (2, end)], [0.5, 0.6], [1e-6, 2e-6], [1e-7, 1e-7], seconds)
    assert report([run], tmp_path, Console(quiet=True)) is reached
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert Curves(**json.loads((tmp_path / "curves.json").read_text())[0]).seconds == seconds
    assert (
        f"seed 3: 50.0% of the held-out questions right at the start, {end:.1%}"
        in (tmp_path / "summary.txt").read_text()
    )


@pytest.mark.parametrize(("end", "code"), [(0.9, 0), (0.6, 1)])
def test_the_command_runs_every_seed_and_exits_by_the_goal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: float, code: int
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'tokentape[train]'")
    asked = list[Config]()

    async def run_all(configs: list[Config]) -> list[Curves]:
        asked.extend(configs)
        return [Curves(config.seed, [(0, 0.5), (12, end)], [0.5], [1e-6], [1e-7], 1.0) for config in configs]

    monkeypatch.setattr(grpo, "run_all", run_all)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exited:
        grpo.main()
    assert exited.value.code == code
    assert asked == [Config(seed=seed) for seed in (0, 1, 2)]


def test_the_ablation_needs_what_grpo_wrote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--out", str(tmp_path)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"run grpo\.py first"):
        ablation.main()


def test_the_ablation_is_shown(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'tokentape[train]'")
    run = Curves(0, [(0, 0.5), (12, 0.9)], [0.5], [1e-6], [1e-7], 1.0)
    found = Findings(2, 1, 4, 1, 10, 2, 8, 1, [0.0, 0.25], [0.0, 0.0, 0.0, 2.0])
    ablation.show([run], [run], [found, found], tmp_path)
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    rows = {row[0]: row[1:] for row in json.loads((tmp_path / "ablation.json").read_text())["table"]}
    assert rows["held-out questions right"] == ["50.0% to 90.0%", "50.0% to 90.0%"]
    assert rows["turns whose ids drift"] == ["0", "25.0%"]
    assert rows["sampled tokens under no mask"] == ["0", "20.00%"]
    assert rows["trained tokens never sampled"] == ["0", "12.50%"]
    assert rows["tokens off by more than 1e-3"] == ["0", "50.00%"]
    assert rows["turns whose sum is off by more than 1e-3"] == ["-", "25.0%"]
