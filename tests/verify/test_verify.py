"""`tokentape verify`: a good file passes, every kind of damage is found and named."""

import asyncio
import contextlib
import copy
import gc
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tokentape
from routerkit import routing
from tokentape.engines.local import LocalEngine
from tokentape.engines.server import make_app, serve
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.engines.sglang_score import Scores
from tokentape.errors import ConfigError, EngineFailed
from tokentape.model import TINY_MODEL
from tokentape.schema import SAMPLES
from tokentape.testing import FakeSGLang, byte_level_tokenizer
from tokentape.tokenizer import Tokenizer
from tokentape.verify import Report, verify

Rows = list[dict[str, Any]]
VOCAB = 1024
TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate one operation (+, - or *) on two integers.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    local = LocalEngine(TINY_MODEL)
    yield local
    local.close()


@pytest.fixture(scope="module")
def recorded(engine: LocalEngine) -> Rows:
    return asyncio.run(record(engine))


@pytest.fixture
async def client(engine: LocalEngine) -> AsyncIterator[SGLangEngine]:
    async with serve(make_app(engine)) as url, contextlib.aclosing(client_of(url)) as client:
        yield client


def client_of(url: str) -> SGLangEngine:
    return SGLangEngine(SGLangConfig(url), vocab_size=VOCAB)


async def record(engine: LocalEngine) -> Rows:
    """Two sessions: two branches of two turns; then temperatures 0.7 and 0, and a penalty."""
    question: Any = {"role": "user", "content": "What is 17 * 23 + 5?"}
    async with serve(make_app(engine)) as url, tokentape.open(model=TINY_MODEL, engine=url) as tape:
        session = tape.session("a")
        first = await session.chat([question], tools=[TOOL], max_tokens=40, seed=1)
        for seed, answer in enumerate(("391", "forty")):
            result = {"role": "tool", "tool_call_id": first.message["tool_calls"][0]["id"], "content": answer}
            await session.chat([question, first.message, result], tools=[TOOL], max_tokens=30, seed=seed)
        other = tape.session("b")
        for sampling in ({"temperature": 0.7}, {"temperature": 0}, {"frequency_penalty": 0.5}):
            await other.chat([question], tools=[TOOL], max_tokens=20, seed=5, **sampling)
        return [*await session.samples(), *await other.samples()]


def written(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLES), path, row_group_size=2)
    return path


async def checked(client: SGLangEngine, path: Path, **options: Any) -> Report:
    fields = {"engine_version": "default", "vocab_size": VOCAB, "tolerance": 1e-3, "max_share": 0.0}
    return await verify(path, client, **{**fields, **options})


async def test_a_good_file(client: SGLangEngine, recorded: Rows, tmp_path: Path) -> None:
    tokenizer, done = Tokenizer(TINY_MODEL / "tokenizer.json"), list[None]()
    report = await checked(
        client,
        written(tmp_path / "f.parquet", recorded),
        tokenizer=tokenizer,
        on_sample=lambda: done.append(None),
    )
    assert report.problems == []
    trained = sum(sum(row["loss_mask"]) for row in recorded)
    penalised = sum(sum(row["loss_mask"]) for row in recorded if "penalty" in row["sampling"])
    assert penalised > 0
    assert (report.num_samples, report.num_trained, len(done)) == (len(recorded), trained, len(recorded))
    assert report.not_compared == {"sampled with penalties": penalised}
    (version,) = report.versions
    assert (version.version, version.judged, version.num_tokens) == ("default", True, trained - penalised)
    assert 0 < version.largest <= 1e-3
    assert version.mean <= version.largest
    assert 0 <= version.k3 < 1e-6
    assert sum(version.histogram) == version.num_tokens
    turns = [(row, t) for row in recorded for t in row["turns"] if t["trained"]]
    drifts = [
        tokenizer.encode(tokenizer.decode(ids)).tolist() != ids
        for row, t in turns
        if (ids := row["token_ids"][t["start"] : t["end"]])
    ]
    assert report.drift is not None
    assert (report.drift.num_turns, report.drift.num_drifted) == (len(turns), sum(drifts))


def _span(row: dict[str, Any], turn: int = -1) -> range:
    return range(row["turns"][turn]["start"], row["turns"][turn]["end"])


def shifted_mask(rows: Rows) -> None:
    rows[0]["loss_mask"] = [0, *rows[0]["loss_mask"][:-1]]


def swapped_ids(rows: Rows) -> None:
    ids = rows[0]["token_ids"]
    at = next(at for at in _span(rows[0])[:-1] if ids[at] != ids[at + 1])
    ids[at], ids[at + 1] = ids[at + 1], ids[at]


def missing_logprob(rows: Rows) -> None:
    rows[0]["logprobs"][_span(rows[0])[2]] = None


def shifted_logprobs(rows: Rows) -> None:
    span = _span(rows[0])
    values = [rows[0]["logprobs"][at] for at in span]
    for at, value in zip(span, [values[-1], *values[:-1]], strict=True):
        rows[0]["logprobs"][at] = value


def dropped_token(rows: Rows) -> None:
    for column in ("token_ids", "loss_mask", "logprobs"):
        del rows[0][column][_span(rows[0])[1]]


def dropped_prompt_token(rows: Rows) -> None:
    """With all that goes with it: nothing but the engine can see it."""
    row = rows[0]
    for column in ("token_ids", "loss_mask", "logprobs"):
        del row[column][5]
    row["num_prompt_tokens"] -= 1
    for span in (*row["turns"], *row["weight_versions"]):
        span["start"] -= 1
        span["end"] -= 1
    rows[1:2] = []  # the other branch would disagree about the shared turn


def wrong_version_span(rows: Rows) -> None:
    rows[0]["weight_versions"][-1]["end"] -= 1


def trained_twice(rows: Rows) -> None:
    rows.append(copy.deepcopy(rows[0]))


def unknown_id(rows: Rows) -> None:
    rows[0]["token_ids"][_span(rows[0])[0]] = VOCAB


def another_logprob(rows: Rows) -> None:
    at = min(_span(rows[0]), key=lambda at: -rows[0]["logprobs"][at])
    rows[0]["logprobs"][at] -= 0.5


def logprob_of_another_token(rows: Rows) -> None:
    span = _span(rows[0])
    values = rows[0]["logprobs"]
    values[span[0]] = min((values[at] for at in span), key=lambda x: -abs(x - values[span[0]]))


def wrong_version(rows: Rows) -> None:
    """Tokens of other weights under the engine's name."""
    for at in _span(rows[0]):
        rows[0]["logprobs"][at] -= 0.05


def sampling_of_fewer_turns(rows: Rows) -> None:
    """Nothing may be left out in silence."""
    rows[0]["sampling"] = "[]"


def sampling_of_another_type(rows: Rows) -> None:
    rows[0]["sampling"] = rows[0]["sampling"].replace("{", '{"temperature":"hot",')


def another_temperature(rows: Rows) -> None:
    row = next(row for row in rows if '"temperature":0.7' in row["sampling"])
    row["sampling"] = row["sampling"].replace("0.7", "0.9")


BY_RULES: dict[Callable[[Rows], None], str] = {
    shifted_mask: "mask",
    missing_logprob: "mask 1 without a log-probability",
    dropped_token: "is outside the tape",
    wrong_version_span: "mask 1 without a version",
    trained_twice: "is there twice",
    unknown_id: "outside the model's vocabulary of 1024 ids",
    sampling_of_fewer_turns: "sampling is of 0 turns, there are 2",
    sampling_of_another_type: "sampling is not what turns are sampled with",
}
BY_ENGINE = [
    *(swapped_ids, shifted_logprobs, dropped_prompt_token, another_logprob, logprob_of_another_token),
    *(wrong_version, another_temperature),
]


@pytest.mark.parametrize("corrupt", BY_RULES, ids=lambda c: c.__name__)
async def test_a_broken_rule(
    client: SGLangEngine, recorded: Rows, tmp_path: Path, corrupt: Callable[[Rows], None]
) -> None:
    rows = copy.deepcopy(recorded)
    corrupt(rows)
    report = await checked(
        client, written(tmp_path / "f.parquet", rows), tokenizer=Tokenizer(TINY_MODEL / "tokenizer.json")
    )
    assert report.num_violations >= 1
    assert report.num_trained == sum(sum(row["loss_mask"]) for row in rows)
    about_a_token = "token " in report.violations[0] or "its mask" in report.violations[0]
    assert ("⟦" in (report.violation_text or "")) is about_a_token
    assert any(BY_RULES[corrupt] in violation for violation in report.violations), report.violations
    assert report.problems
    assert (await client.info()).weight_version == "default"  # it is alive


@pytest.mark.parametrize("corrupt", BY_ENGINE, ids=lambda c: c.__name__)
async def test_what_only_the_engine_can_see(
    client: SGLangEngine, recorded: Rows, tmp_path: Path, corrupt: Callable[[Rows], None]
) -> None:
    rows = copy.deepcopy(recorded)
    corrupt(rows)
    tokenizer = Tokenizer(TINY_MODEL / "tokenizer.json")
    report = await checked(client, written(tmp_path / "f.parquet", rows), tokenizer=tokenizer)
    changed = next(
        row
        for row, before in zip(rows, recorded, strict=False)
        if row != before or corrupt is dropped_prompt_token
    )
    if corrupt is not dropped_prompt_token:
        assert report.num_violations == 0
    assert any("beyond" in p or "off" in p for p in report.problems), report.problems
    first = report.first_offence
    assert first is not None
    assert first.sample_id == changed["sample_id"]
    assert abs(first.recorded - first.recomputed) > 1e-3
    assert changed["token_ids"][first.token] == first.token_id
    assert changed["loss_mask"][first.token] == 1
    assert first.text is not None
    assert "⟦" in first.text


async def test_other_weights_are_shown_and_not_judged(
    client: SGLangEngine, recorded: Rows, tmp_path: Path
) -> None:
    rows = copy.deepcopy(recorded)
    for row in rows:
        for span in row["weight_versions"]:
            span["version"] = "older"
        row["logprobs"] = [None if x is None else x - 1 for x in row["logprobs"]]
    path = written(tmp_path / "f.parquet", rows)
    report = await checked(client, path)
    assert [(v.version, v.judged) for v in report.versions] == [("older", False)]
    (problem,) = report.problems
    assert problem.startswith(
        "no token could be judged: the engine has weights 'default', the tokens are of 'older'"
    )
    assert (await checked(client, path, judged=["older"])).versions[0].num_far > 0


async def test_half_precision_is_judged_by_the_share(
    client: SGLangEngine, recorded: Rows, tmp_path: Path
) -> None:
    """One token a little off may be; many may not, nor one by far."""
    rows = copy.deepcopy(recorded)
    at = _span(rows[0])[0]
    path = tmp_path / "f.parquet"
    for by, passes in ((0.4, True), (4.0, False)):
        rows[0]["logprobs"][at] = recorded[0]["logprobs"][at] - by
        report = await checked(client, written(path, rows), tolerance=0.3, max_share=0.05)
        assert (report.problems == []) is passes
    first, last = _span(rows[0])[0], _span(rows[0])[-1]
    rows[0]["logprobs"][first], rows[0]["logprobs"][last] = rows[0]["logprobs"][last] - 0.4, -9.0
    report = await checked(client, written(path, rows), tolerance=0.3, max_share=1.0)
    assert report.first_offence is not None
    assert report.first_offence.token == last, "what noise may be is named before what it may not be"


async def test_a_wrong_turn_is_not_lost_in_a_large_file(
    client: SGLangEngine, recorded: Rows, tmp_path: Path
) -> None:
    """Shifted by one, no token of a confident policy is off by far, and of many turns the share is small."""
    rows = copy.deepcopy(recorded)
    path, turn = tmp_path / "f.parquet", rows[0]["turns"][-1]
    assert len(_span(rows[0])) >= 10
    for at in _span(rows[0]):
        rows[0]["logprobs"][at] -= 0.2
    rows[0]["logprobs"][_span(rows[0])[3]] -= 0.05
    report = await checked(client, written(path, rows), tolerance=0.3, max_share=1.0)
    assert report.problems == ["version default: 1 turns are more than 0.15 off in the mean"]
    assert report.first_offence is not None
    assert (report.first_offence.turn_id, report.first_offence.token) == (turn["turn_id"], turn["start"] + 3)


async def test_a_tape_that_fills_the_context(recorded: Rows, tmp_path: Path) -> None:
    """No engine can be sent it whole; what can be is compared, the rest is counted."""
    rows = [row for row in recorded if row["session_id"] == "a"]
    longest = max(rows, key=lambda row: len(row["token_ids"]))
    local = LocalEngine(TINY_MODEL, context_length=len(longest["token_ids"]))
    try:
        async with serve(make_app(local)) as url, contextlib.aclosing(client_of(url)) as client:
            report = await checked(client, written(tmp_path / "f.parquet", rows))
    finally:
        local.close()
    full = sum(len(row["token_ids"]) == len(longest["token_ids"]) for row in rows)
    assert report.problems == []
    assert report.not_compared == {"beyond the engine's context": full}
    assert report.whole.num_tokens == report.num_trained - full


async def test_a_tape_far_longer_than_the_context(recorded: Rows, tmp_path: Path) -> None:
    local = LocalEngine(TINY_MODEL, context_length=8)
    try:
        async with serve(make_app(local)) as url, contextlib.aclosing(client_of(url)) as client:
            report = await checked(client, written(tmp_path / "f.parquet", recorded[:2]))
    finally:
        local.close()
    assert report.not_compared == {"beyond the engine's context": report.num_trained}
    assert report.problems == ["no token could be judged"]


async def test_weights_that_change_meanwhile_are_an_error(
    client: SGLangEngine, recorded: Rows, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="weights changed from '7' to 'default'"):
        await checked(client, written(tmp_path / "f.parquet", recorded), engine_version="7")


async def test_rows_of_a_session_may_lie_apart(client: SGLangEngine, recorded: Rows, tmp_path: Path) -> None:
    rows = [recorded[0], *recorded[2:], recorded[1]]
    assert {recorded[0]["session_id"], recorded[1]["session_id"]} == {"a"}
    assert (await checked(client, written(tmp_path / "f.parquet", rows))).problems == []


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
async def test_what_is_no_file_of_samples(
    client: SGLangEngine, recorded: Rows, tmp_path: Path, damage: str
) -> None:
    path = written(tmp_path / "f.parquet", recorded)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("hello")
    else:
        pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ConfigError, match="not a Parquet file of samples"):
        await checked(client, path)


async def test_an_engine_without_temperatures(recorded: Rows, tmp_path: Path) -> None:
    """SGLang scores at temperature 1: turns of another one are counted, not compared with something else."""
    rows = [row for row in recorded if row["session_id"] == "a" or '"temperature":0.7' in row["sampling"]]

    class Unscaled:
        async def score(self, ids: Any, start: int, temperature: float = 1.0) -> Any:
            row = next(row for row in rows if row["token_ids"] == list(ids))
            return Scores([x or 0.0 for x in row["logprobs"][start:]], 1.0, "default")

    path = written(tmp_path / "f.parquet", rows)
    report = await verify(
        path, Unscaled(), engine_version="default", vocab_size=VOCAB, tolerance=1e-3, max_share=0.0
    )
    assert report.problems == []
    assert report.not_compared == {"sampled at temperature 0.7": sum(rows[-1]["loss_mask"])}


@pytest.mark.parametrize(("recorded_as", "found"), [(-1.0, True), (-1.4, False)])
async def test_an_engine_that_never_scaled_is_found(
    recorded: Rows, tmp_path: Path, recorded_as: float, found: bool
) -> None:
    """`SGLANG_RETURN_ORIGINAL_LOGPROB`: sampled at temperature 0.5, log-probabilities of temperature 1."""
    rows = copy.deepcopy([row for row in recorded if row["session_id"] == "a"])
    for row in rows:
        row["sampling"] = json.dumps([{**turn, "temperature": 0.5} for turn in json.loads(row["sampling"])])
        row["logprobs"] = [None if x is None else recorded_as for x in row["logprobs"]]

    class Unscaled:
        async def score(self, ids: Any, start: int, temperature: float = 1.0) -> Any:
            return Scores([-1.0] * (len(ids) - start), 1.0, "default")

    path = written(tmp_path / "f.parquet", rows)
    options: dict[str, Any] = {"engine_version": "default", "vocab_size": VOCAB, "max_share": 0.0}
    report = await verify(path, Unscaled(), tolerance=1e-3, **options)
    assert report.unscaled is not None
    assert report.unscaled.num_tokens == report.num_trained
    assert any("SGLANG_RETURN_ORIGINAL_LOGPROB" in p for p in report.problems) is found


async def test_an_id_that_would_kill_a_real_server_is_not_sent(recorded: Rows, tmp_path: Path) -> None:
    rows = copy.deepcopy(recorded)
    unknown_id(rows)
    async with FakeSGLang(vocab_size=VOCAB) as fake, contextlib.aclosing(client_of(fake.url)) as client:
        report = await checked(client, written(tmp_path / "f.parquet", rows))
        assert fake.alive
        assert fake.requests
        assert all(max(request.input_ids) < VOCAB for request in fake.requests)
    assert report.num_violations >= 1


# -- the command


async def run(*arguments: str, command: str = "verify") -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        "tokentape", command, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.fixture(autouse=True)
def command_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import sys

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "200")


async def test_a_picture_that_cannot_be_made_is_said_at_once(
    recorded: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = written(tmp_path / "good.parquet", recorded)
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, _, err = await run(
        str(good), "--engine", "http://127.0.0.1:9", "--histogram", str(tmp_path / "h.png")
    )
    assert code == 2
    assert "tokentape[train]" in err
    assert len(err.strip().splitlines()) == 1


async def test_a_router_whose_servers_differ_is_no_judge(recorded: Rows, tmp_path: Path) -> None:
    good = written(tmp_path / "good.parquet", recorded)
    async with FakeSGLang() as a, FakeSGLang() as b, routing([a.url, b.url]) as router:
        a.weight_version = "7"
        code, _, err = await run(str(good), "--engine", router.url, "--model", str(TINY_MODEL))
    assert (code, "different weights" in err) == (2, True)


@pytest.mark.parametrize("command", ["verify", "report"])
async def test_an_engine_with_another_model_is_not_sent_ids(
    recorded: Rows, tmp_path: Path, command: str
) -> None:
    good = written(tmp_path / "good.parquet", recorded)
    async with FakeSGLang(byte_level_tokenizer()) as fake:
        arguments = (str(good), "--engine", fake.url, "--model", str(TINY_MODEL))
        code, _, err = await run(*arguments, command=command)
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert "the engine has another model" in err
        assert fake.requests == []


async def test_what_fails_beside_the_first_is_not_told_on_its_own(
    recorded: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        async def score(self, ids: Any, start: int, temperature: float = 1.0) -> Scores:
            del ids, start, temperature
            raise EngineFailed("down")

    path = written(tmp_path / "f.parquet", [*recorded, *recorded])
    with pytest.raises(EngineFailed):
        await verify(
            path, Failing(), engine_version=None, vocab_size=VOCAB, tolerance=1.0, max_share=0.0,
            concurrency=1 + len(recorded),
        )  # fmt: skip
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_the_command(engine: LocalEngine, recorded: Rows, tmp_path: Path) -> None:
    good = written(tmp_path / "good.parquet", recorded)
    rows = copy.deepcopy(recorded)
    swapped_ids(rows)
    bad = written(tmp_path / "bad.parquet", rows)
    async with serve(make_app(engine)) as url:
        code, out, _ = await run(str(good), "--engine", url, "--histogram", str(tmp_path / "h.png"))
        assert (code, out.strip().splitlines()[-1]) == (0, "verified"), out
        assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
        code, out, _ = await run(str(bad), "--engine", url)
        assert code == 1
        assert rows[0]["sample_id"] in out
        assert "not verified" in out
        code, out, _ = await run(str(bad), "--engine", url, "--json", "--model", str(TINY_MODEL))
        report = json.loads(out)
        assert code == 1
        assert msgspec.convert({k: v for k, v in report.items() if k != "problems"}, Report).problems
        assert report["problems"]
        code, _, err = await run(str(good), "--engine", url, "--model", "no/where/at/all")
        assert code == 2
        assert "--model" in err
    code, _, err = await run(str(good), "--engine", "http://127.0.0.1:9")
    assert (code, len(err.strip().splitlines())) == (2, 1)
