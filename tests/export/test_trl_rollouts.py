"""`adapters.trl.rollout_func` with a recorder in this process: what TRL's trainer would get, call by call."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from episodes import forked, single

import tokentape
from tokentape.adapters.trl import Ask, rollout_func
from tokentape.errors import ConfigError, EngineFailed
from tokentape.export.row import Row
from tokentape.testing import FakeEngine, Reply, byte_level_tokenizer, write_model_dir

TOKENIZER = byte_level_tokenizer()
END = TOKENIZER.token_to_id("<|im_end|>")


def trainer(step: int = 0, *, size: int = 2, training: bool = True, process: int = 0) -> Any:
    """The names that are read of TRL's trainer; test_trl.py gives the real one."""
    return SimpleNamespace(
        num_generations=size,
        num_generations_eval=1,
        model=SimpleNamespace(training=training),
        state=SimpleNamespace(global_step=step),
        accelerator=SimpleNamespace(process_index=process),
    )


@dataclass
class Policy:
    """An engine whose weights have a name, an agent of two turns on it, and what was asked of both."""

    tape: tokentape.Recorder
    engine: FakeEngine
    version: str = "of before"
    delay_s: float = 0.0
    pushed: list[str] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    playing: int = 0
    most: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.engine.responder = self.reply

    def reply(self, _: Any) -> Reply:
        self.asked.set()
        ids = [*TOKENIZER.encode("hello").ids, END]
        return Reply(ids, versions=[(self.version, 0, len(ids))], delay_s=self.delay_s)

    async def push(self, _: Any, version: str) -> None:
        self.pushed.append(version)
        self.version = version

    async def play(self, ask: Ask) -> Sequence[Row]:
        self.asks.append(ask)
        self.playing += 1
        self.most = max(self.most, self.playing)
        try:
            session = self.tape.session(f"s{len(self.asks)}", group_id=ask.group_id)
            messages = [{"role": "user", "content": ask.prompt}]
            for text in ("Again.", None):
                reply = await session.chat(messages)
                messages += [reply.message, {"role": "user", "content": text}]
            await session.finish(reward=ask.index / 2)
            return await session.samples()
        finally:
            self.playing -= 1


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def policy(runner: asyncio.Runner, tmp_path: Path) -> Iterator[Policy]:
    stack, engine = contextlib.AsyncExitStack(), FakeEngine()
    opened = tokentape.open(model=write_model_dir(tmp_path / "model"), engine=engine)
    yield Policy(runner.run(stack.enter_async_context(opened)), engine)
    runner.run(stack.aclose())


def test_an_episode_for_each_completion(policy: Policy, runner: asyncio.Runner) -> None:
    rollout = rollout_func(policy.play, push=policy.push, run=runner.run)
    made = rollout(["a", "a", "b", "b"], trainer())
    assert [(ask.prompt, ask.index, ask.version) for ask in policy.asks] == [
        ("a", 0, "step-0"), ("a", 1, "step-0"), ("b", 0, "step-0"), ("b", 1, "step-0"),
    ]  # fmt: skip
    assert made["group_id"] == [ask.group_id for ask in policy.asks]
    assert made["session_id"] == ["s1", "s2", "s3", "s4"]
    assert made["reward"] == [0.0, 0.5, 0.0, 0.5]
    num_sampled = 2 * len(policy.reply(None).ids)
    for prompt, ids, mask in zip("aabb", made["prompt_ids"], made["env_mask"], strict=True):
        assert TOKENIZER.decode(ids).count(prompt) > 0
        assert sum(mask) == num_sampled < len(mask)


def test_groups_are_named_apart(policy: Policy, runner: asyncio.Runner) -> None:
    """Also of equal prompts next to each other, of several calls at one step, and of other processes."""
    rollout = rollout_func(policy.play, push=policy.push, run=runner.run)
    for _ in range(2):
        rollout(["a", "a", "a", "a"], trainer())
    other = rollout_func(policy.play, push=policy.push, run=runner.run)
    other(["a", "a"], trainer(process=1))
    names = [ask.group_id for ask in policy.asks]
    assert names[::2] == names[1::2]
    assert len({*names}) == 5


def test_weights_are_pushed_once_a_step(policy: Policy, runner: asyncio.Runner) -> None:
    """An evaluation between has the same, and asks for as many completions as TRL evaluates with."""
    rollout = rollout_func(policy.play, push=policy.push, run=runner.run)
    rollout(["a", "a"], trainer(0))
    rollout(["a", "b", "c"], trainer(0, training=False))
    made = rollout(["a", "a"], trainer(4))
    assert policy.pushed == ["step-0", "step-4"]
    assert {span["version"] for spans in made["weight_versions"] for span in spans} == {"step-4"}
    assert [ask.index for ask in policy.asks[2:5]] == [0, 0, 0]


def test_a_push_that_failed_is_tried_again(policy: Policy, runner: asyncio.Runner) -> None:
    failures = [OSError("disk full")]

    async def push(of: Any, version: str) -> None:
        if failures:
            raise failures.pop()
        await policy.push(of, version)

    rollout = rollout_func(policy.play, push=push, run=runner.run)
    with pytest.raises(OSError, match="disk full"):
        rollout(["a", "a"], trainer())
    assert policy.asks == []
    rollout(["a", "a"], trainer())
    assert policy.pushed == ["step-0"]


def test_other_weights_than_those_pushed_are_an_error(policy: Policy, runner: asyncio.Runner) -> None:
    async def forgotten(_: Any, __: str) -> None:
        pass

    rollout = rollout_func(policy.play, push=forgotten, run=runner.run)
    with pytest.raises(ConfigError, match=r"pushed step-0, but session s1 was sampled by \['of before'\]"):
        rollout(["a", "a"], trainer())


@pytest.mark.parametrize("prompts", [["a", "b"], ["a", "b", "a", "b"], ["a", "a", "b"], ["a"]])
def test_prompts_that_are_not_whole_groups_are_an_error(
    policy: Policy, runner: asyncio.Runner, prompts: list[str]
) -> None:
    """As TRL's docstring describes them, interleaved, cut: advantages would compare other questions."""
    rollout = rollout_func(policy.play, push=policy.push, run=runner.run)
    with pytest.raises(ConfigError, match=f"{len(prompts)} completions that are not groups of 2"):
        rollout(prompts, trainer())
    assert (policy.pushed, policy.asks) == ([], [])


def test_an_episode_that_fails_ends_the_others(policy: Policy, runner: asyncio.Runner) -> None:
    """Nothing goes on being sampled behind the trainer's back, and the next call is as any."""
    policy.delay_s = 0.02

    async def play(ask: Ask) -> Sequence[Row]:
        if ask.index:
            await policy.asked.wait()
            raise EngineFailed("out of memory")
        return await policy.play(ask)

    rollout = rollout_func(play, push=policy.push, run=runner.run)
    with pytest.raises(EngineFailed, match="out of memory"):
        rollout(["a", "a"], trainer())
    assert policy.playing == 0
    assert len(policy.engine.aborted) == 1
    again = rollout_func(policy.play, push=policy.push, run=runner.run)
    assert len(again(["a", "a"], trainer())["reward"]) == 2


@pytest.mark.parametrize(("concurrency", "most"), [(None, 6), (2, 2), (100, 6)])
def test_so_many_at_a_time(
    policy: Policy, runner: asyncio.Runner, concurrency: int | None, most: int
) -> None:
    policy.delay_s = 0.001
    rollout = rollout_func(policy.play, push=policy.push, run=runner.run, concurrency=concurrency)
    rollout(["a"] * 6, trainer())
    assert policy.most == most


def test_without_a_loop_of_one_s_own() -> None:
    """Each call has a new one: what limits episodes must not stick to the first."""

    async def push(_: Any, __: str) -> None:
        pass

    async def play(ask: Ask) -> Sequence[Row]:
        await asyncio.sleep(0.001)
        rows = single(ask.group_id)
        for span in rows[0]["weight_versions"]:
            span["version"] = ask.version
        return rows

    rollout = rollout_func(play, push=push, concurrency=1)
    for step in range(2):
        assert len(rollout(["a"] * 4, trainer(step))["reward"]) == 4


def test_a_label_chooses_among_several_samples() -> None:
    async def push(_: Any, __: str) -> None:
        pass

    async def play(ask: Ask) -> Sequence[Row]:
        first, second = forked()
        spans = [{**span, "version": ask.version} for span in second["weight_versions"]]
        return [{**first, "label": "subagent"}, {**second, "label": "main", "weight_versions": spans}]

    assert rollout_func(play, push=push, label="main")(["a"] * 2, trainer())["sample_id"] == ["t4", "t4"]
    with pytest.raises(ConfigError, match="has 2 samples"):
        rollout_func(play, push=push)(["a"] * 2, trainer())
