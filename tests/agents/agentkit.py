"""Real agents end to end: how one is run, what the model says to it, and the row that comes of it."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from gatewaykit import (
    TOKENIZER,
    Gateway,
    Seen,
    assert_samples_match,
    call,
    drifts,
    sampled,
    seen_by,
    turn_id_of,
)
from tokentape.invariants import check_samples
from tokentape.testing import FakeSGLang, Reply
from tokentape.testing.generation import ReceivedRequest

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
INSTALLED = Path(os.environ.get("TOKENTAPE_LIVE_DIR", Path.home() / ".cache/tokentape/live")) / "agents"
TIMEOUT_S = 120.0

Arguments: TypeAlias = Mapping[str, Any]


# -- an agent, and where it runs


@dataclass(frozen=True)
class Place:
    """Where one run happens: `task` is the agent's working directory, with the note that it must read."""

    task: Path
    home: Path
    root_url: str
    """The session's: an Anthropic SDK's base URL. OpenAI's ends in /v1."""
    secret: str

    @property
    def base_url(self) -> str:
        return self.root_url + "/v1"


@dataclass(frozen=True)
class Says:
    """One completion of the model: reasoning, text, calls of the agent's own tools; the label of its turn."""

    text: str = ""
    calls: Sequence[tuple[str, Arguments]] = ()
    reasoning: str = ""
    label: str = "main"


@dataclass(frozen=True)
class Case:
    """One agent: a row of the README.

    `command` starts it, `later` are commands that go on with what it saved. `script` is what the model says
    to it, turn by turn; `writes`: it makes the agent copy the note to answer.txt. `why_not` says why its main
    line is not exact, if so.
    """

    agent: str
    package: str
    protocol: str
    command: Callable[[Place], list[str]]
    script: Callable[[Place], list[Says]]
    environment: Callable[[Place], dict[str, str]] = lambda _place: {}
    setup: Callable[[Place], None] = lambda _place: None
    later: Sequence[Callable[[Place], list[str]]] = ()
    writes: bool = False
    why_not: str = ""

    @property
    def version(self) -> str:
        """Of the pins, which are what is installed."""
        npm = json.loads((HERE / "package.json").read_text())["dependencies"]
        if self.package in npm:
            return npm[self.package]
        pins = "\n".join(path.read_text() for path in HERE.glob("requirements*.txt"))
        found = re.search(rf"^{re.escape(self.package)}(?:\[.*\])?==(\S+)$", pins, re.MULTILINE)
        assert found, f"{self.package} is not pinned"
        return found[1]


def program(*parts: str) -> str:
    """An installed program; the test is skipped where the machine cannot have it."""
    path = INSTALLED.joinpath(*parts)
    if not (INSTALLED / "ready").exists():
        pytest.fail(f"{INSTALLED} is not ready: `make live` installs the agents")
    if parts[0] == "node" and not path.exists():
        pytest.skip("npm could not install it on this machine")
    return str(path)


async def run(case: Case, place: Place) -> str:
    """Run the agent's commands to their ends; what they printed."""
    case.setup(place)
    node = shutil.which("node")
    path = os.pathsep.join(
        ["/usr/local/bin", "/usr/bin", "/bin", *([str(Path(node).parent)] if node else [])]
    )
    environment = {"PATH": path, "HOME": str(place.home), "LANG": "C.UTF-8", "TERM": "dumb"}
    environment |= case.environment(place)
    return "".join(
        [await _run(command(place), place.task, environment) for command in (case.command, *case.later)]
    )


async def _run(command: Sequence[str], task: Path, environment: Mapping[str, str]) -> str:
    """One process without a terminal. It and its children are killed by their group."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=task,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            stdout, stderr = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    assert process.returncode == 0, f"{command} failed:\n{stdout.decode()}\n{stderr.decode()[-6000:]}"
    return stdout.decode()


# -- what the model says


@dataclass
class Model:
    """The scripted model behind the engine.

    The first prompt that offers the tools which the script calls opens the main line: it and all that begin
    with the same system message get the script's completions, in one of the splits that the tokenizer would
    not choose. Any other prompt is answered with `aside`: a title, a sub-agent, a summary. `surplus` are
    prompts of the main line that the script has no answer for.
    """

    script: Sequence[Says]
    aside: str
    main: list[ReceivedRequest] = field(default_factory=list[ReceivedRequest])
    prompts: list[str] = field(default_factory=list[str])
    surplus: list[str] = field(default_factory=list[str])
    system: str = ""

    @property
    def _names(self) -> set[str]:
        return {name for says in self.script for name, _ in says.calls}

    def __call__(self, received: ReceivedRequest) -> Reply:
        prompt = TOKENIZER.decode(received.input_ids, skip_special_tokens=False)
        system = re.sub(
            r"cc_version=\S+", "", prompt.partition("<|im_start|>user")[0]
        )  # of the first message
        if self._names <= offered(prompt) and not self.system:
            self.system = system
        if system != self.system:
            return sampled(self.aside, seed=len(prompt))
        if len(self.main) == len(self.script):
            self.surplus.append(prompt)
            return sampled(self.aside, seed=len(prompt))
        says = self.script[len(self.main)]
        self.main.append(received)
        self.prompts.append(prompt)
        parts = [f"<think>\n{says.reasoning}\n</think>\n\n"] if says.reasoning else []
        parts += ["\n".join([*([says.text] if says.text else []), *(call(*made) for made in says.calls)])]
        return sampled("".join(parts), seed=len(self.main))


def offered(prompt: str) -> set[str]:
    """The tools that a prompt offers, read where the template writes them."""
    found = re.search(r"<tools>\n(.*?)\n</tools>", prompt, re.DOTALL)
    return {json.loads(line)["function"]["name"] for line in found[1].splitlines()} if found else set()


# -- what came of it


@dataclass(frozen=True)
class Row:
    """What the README says of an agent."""

    agent: str
    version: str
    protocol: str
    turns: str
    branches: str
    exact: str

    def __str__(self) -> str:
        cells = (self.agent, self.version, self.protocol, self.turns, self.branches, self.exact)
        return f"| {' | '.join(cells)} |"


async def play(case: Case, fake: FakeSGLang, gateway: Gateway, tmp_path: Path) -> Row:
    """Run an agent in a session of its own, check everything that reached the engine, and say what it was."""
    session_id = await gateway.create()
    task, home = tmp_path / "task", tmp_path / "home"
    place = Place(task, home, f"{gateway.url}/sessions/{session_id}", f"secret-{secrets.token_hex(6)}")
    task.mkdir()
    home.mkdir()
    (task / "note.txt").write_text(place.secret + "\n")
    model = Model(case.script(place), f"hello world, the note of the user holds {place.secret}")
    fake.responder = model
    printed = await run(case, place)

    assert len(model.main) == len(model.script), "the agent stopped early"
    assert not model.surplus, f"the agent asked for more:\n{model.surplus[0][-2000:]}"
    assert place.secret in model.prompts[-1], "the tools did not really run"
    assert place.secret in printed, f"another answer: {printed!r}"
    if case.writes:
        assert place.secret in (task / "answer.txt").read_text()
    assert any(drifts(received.output_ids) for received in fake.requests), "nothing could have drifted"

    show = await gateway.show(session_id)
    assert not show["failures"], show
    samples = await gateway.samples(session_id)
    assert check_samples(samples) == []
    seen = seen_by(fake)
    assert_samples_match(seen, samples, num_turns=len(fake.requests))
    main = [turn_id_of(received.rid) for received in model.main]
    is_exact = extends(set(main), seen)
    assert is_exact == (not case.why_not), f"the main line is {'' if is_exact else 'not '}exact"
    lines = [[turn["turn_id"] for turn in sample["turns"]] for sample in samples]
    assert not is_exact or main in lines, "the main line is exact, but not one sample"
    labels = {turn["turn_id"]: turn["label"] for sample in samples for turn in sample["turns"]}
    assert [labels[turn_id] for turn_id in main] == [says.label for says in model.script]
    assert "main" not in [label for turn_id, label in labels.items() if turn_id not in main]
    return Row(
        agent=case.agent,
        version=case.version,
        protocol=case.protocol,
        turns=_counted(labels.values()),
        branches=_counted(sample["branch_reason"] for sample in samples),
        exact="yes" if is_exact else f"no: {case.why_not}",
    )


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(Counter(names).items()))


def extends(main: set[str], seen: Sequence[Seen]) -> bool:
    """Whether each prompt of the main line begins with all that the engine saw and sampled before it."""
    line = [one for one in seen if one.turn_id in main]
    befores = [before.input_ids + before.output_ids for before in line[:-1]]
    return all(now.input_ids[: len(ids)] == ids for ids, now in zip(befores, line[1:], strict=True))


# -- the README's table

TABLE_HEAD = [
    "| agent | version | protocol | turns | branches by reason | exact main line |",
    "|---|---|---|---|---|---|",
]


def row_in_readme(row: Row) -> str:
    """The line of the README that is about an agent."""
    start = f"| {row.agent} |"
    lines = [line for line in README.read_text().splitlines() if line.startswith(start)]
    return next((line for line in lines if f"| {row.protocol} |" in line), "")


def write_row(row: Row, order: Sequence[tuple[str, str]]) -> None:
    """Put a row into the README's table, in the order of the cases."""
    lines = README.read_text().splitlines()
    assert TABLE_HEAD[0] in lines, "the README has no table of agents"
    start = lines.index(TABLE_HEAD[0]) + len(TABLE_HEAD)
    end = next(at for at in range(start, len(lines)) if not lines[at].startswith("|"))
    rows = {_key(line): line for line in lines[start:end]}
    rows[row.agent, row.protocol] = str(row)
    lines[start:end] = [rows[key] for key in order if key in rows]
    README.write_text("\n".join(lines) + "\n")


def _key(line: str) -> tuple[str, str]:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells[0], cells[2]
