"""What the page is told: every number is the tape's own, whatever the sessions come from."""

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers
from viewerkit import turn as made_turn

from gatewaykit import (
    CLOCK,
    END,
    TOKENIZER,
    USER,
    WEATHER,
    Agent,
    Gateway,
    call,
    cut,
    drifts,
    gateway_for,
    sampled,
)
from tokentape.engines.server import serve
from tokentape.engines.sglang import SGLangConfig
from tokentape.errors import ConfigError, NotFound
from tokentape.export import stored_samples, write_parquet
from tokentape.gateway.memory import MemoryLimits
from tokentape.gateway.parts import PartsConfig, parts
from tokentape.gateway.viewing import desk_of
from tokentape.gateway.wirelog import Exchanged, WireLog
from tokentape.store import SessionRecord, SQLiteStore
from tokentape.stores import open_store
from tokentape.testing import FakeSGLang, Reply, byte_level_tokenizer, pseudo_logprob
from tokentape.tokenizer import TextStream, Tokenizer
from tokentape.types import Message
from tokentape.viewer.app import make_app
from tokentape.viewer.desk import Desk
from tokentape.viewer.drift import drifts as viewed_drifts
from tokentape.viewer.episode import Branch, Stretch
from tokentape.viewer.files import FileSource
from tokentape.viewer.glyphs import Glyphs, visible, width
from tokentape.viewer.source import Source
from tokentape.viewer.stored import StoreSource
from tokentape.viewer.strip import find_text, first_difference

Json = dict[str, Any]


async def episode(fake: FakeSGLang, gateway: Gateway, **created: Any) -> str:
    """Three turns with a tool call, a fork of the second, and a sub-agent; finished."""
    session_id = await gateway.create(session_id="one", metadata={"task": "weather"}, **created)
    agent = Agent(gateway, session_id, {"tools": [WEATHER, CLOCK]})
    fake.script(sampled(call("weather", {"city": "the world"}), seed=1))
    await agent.turn(USER)
    before, results = list(agent.messages), agent.results()
    fake.weight_version = "two"
    fake.script(sampled("hello the weather is hello", seed=3), cut("hello", seed=4))
    await agent.turn(*results)
    await agent.turn({"role": "user", "content": "the world"})
    agent.messages = before
    fake.script(sampled(call("weather", '{"city": '), seed=5), sampled("the system", seed=6))
    await agent.turn(*results)
    await Agent(gateway, session_id).turn({"role": "user", "content": "title"})
    await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 0.5})
    return session_id


async def sources(store: Path, tmp_path: Path) -> list[Source]:
    """The same sessions out of the store, and out of an exported file."""
    opened = open_store(store, readonly=True)
    await write_parquet(tmp_path / "f.parquet", stored_samples(opened))
    return [StoreSource(opened, "store"), FileSource(tmp_path / "f.parquet")]


async def all_tokens(gateway: Gateway, path: str, num_tokens: int) -> Json:
    """A branch's tokens, asked for in pieces of 7."""
    out: Json = {"ids": [], "texts": [], "hex": [], "logprobs": []}
    for start in range(0, num_tokens, 7):
        piece = await gateway.ok("GET", f"{path}/tokens?start={start}&end={min(start + 7, num_tokens)}")
        for name, values in out.items():
            values += piece[name]
    return out


async def test_tokens_are_the_tapes(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await episode(fake, gateway)
    session = await gateway.ok("GET", f"/sessions/{session_id}/view")
    samples = {sample["sample_id"]: sample for sample in await gateway.samples(session_id)}
    assert {branch["branch_id"] for branch in session["branches"]} == set(samples)
    for branch_id, sample in samples.items():
        path = f"/sessions/{session_id}/view/{branch_id}"
        head = await gateway.ok("GET", path)
        ids = sample["token_ids"]
        tokens = await all_tokens(gateway, path, len(ids))
        assert tokens["ids"] == ids
        assert b"".join(map(bytes.fromhex, tokens["hex"])).decode() == TOKENIZER.decode(
            ids, skip_special_tokens=False
        )
        assert (head["num_tokens"], head["num_trained"]) == (len(ids), sum(sample["loss_mask"]))
        mask = [0] * len(ids)
        known: list[float | None] = [None] * len(ids)
        for turn, recorded in zip(head["turns"], sample["turns"], strict=True):
            assert (turn["turn_id"], turn["start"], turn["end"]) == tuple(
                recorded[k] for k in ("turn_id", "start", "end")
            )
            span = range(turn["start"], turn["end"])
            for at in span:
                mask[at] = int(turn["trained"])
                known[at] = round(array("f", [pseudo_logprob(ids[at], at - turn["start"])])[0], 6)
        assert mask == sample["loss_mask"]
        assert tokens["logprobs"] == known  # also where another branch trains them
        assert all(r is None or abs(r - t) < 1e-6 for r, t in zip(sample["logprobs"], known, strict=True))
        lines = await gateway.ok("GET", f"{path}/lines?columns=40")
        starts = lines["starts"]
        assert starts == sorted(set(starts))
        assert {turn["begin"] for turn in head["turns"]} | {turn["start"] for turn in head["turns"]} <= {
            *starts,
            len(ids),
        }
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            line = tokens["texts"][start:end]
            assert width("".join(line)) <= 40 or len(line) == 1
            assert not any("⏎" in text for text in line[:-1])


async def test_the_tree_and_the_table(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await episode(fake, gateway)
    session = await gateway.ok("GET", f"/sessions/{session_id}/view")
    shown = await gateway.show(session_id)
    summary = await gateway.ok("GET", f"/sessions/{session_id}/view/summary")
    assert summary == session["summary"]
    same = {
        "turns": "turns",
        "branches": "branches",
        "labels": "labels",
        "tokens": "tokens",
        "sampled": "sampled_tokens",
        "versions": "weight_versions",
        "failures": "failures",
        "reward": "reward",
        "reasons": "branch_reasons",
    }
    assert {name: summary[name] for name in same} == {name: shown[other] for name, other in same.items()}
    assert Counter(turn["reason"] for turn in session["turns"] if turn["reason"]) == shown["branch_reasons"]
    table = await gateway.ok("GET", "/ui/api/sessions?limit=1")
    assert [row["session_id"] for row in table["sessions"]] == [session_id]
    assert not table["has_more"]


async def test_the_table_has_no_long_metadata(
    fake: FakeSGLang, gateway: Gateway, store: Path, tmp_path: Path
) -> None:
    many = {f"key-{n}": [0, 1, 2] for n in range(1000)}
    given: list[Json] = [
        {"prompt": "x" * 20_000, "try": 3},
        {"é": ["é"] * 9000},
        many,
        {"a": ["b"]},
    ]
    fake.responder = lambda _: sampled("hello")
    for number, metadata in enumerate(given):
        await gateway.create(session_id=f"s{number}", metadata=metadata)
        await gateway.chat(f"s{number}", [USER])
    live = await gateway.ok("GET", "/ui/api/sessions")
    for table in (live, *[await Desk(one).sessions("", 9) for one in await sources(store, tmp_path)]):
        rows = table["sessions"]
        assert [row.get("metadata_cut", False) for row in rows] == [True, True, True, False]
        assert all(len(json.dumps(row["metadata"], ensure_ascii=False)) < 4000 for row in rows)
        assert rows[0]["metadata"] == {"prompt": "x" * 1000 + "…", "try": 3}
        assert rows[2]["metadata"]["key-3"] == [0, 1, 2]
        assert rows[3]["metadata"] == {"a": ["b"]}
    for number, metadata in enumerate(given):  # whoever looks at one session sees all
        assert (await gateway.ok("GET", f"/sessions/s{number}/view/summary"))["metadata"] == metadata


async def test_attempts_stand_at_their_tokens(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await episode(fake, gateway)
    session = await gateway.ok("GET", f"/sessions/{session_id}/view")
    seen = set()
    for branch in session["branches"]:
        path = f"/sessions/{session_id}/view/{branch['branch_id']}"
        for turn in (await gateway.ok("GET", path))["turns"]:
            for attempt in turn["attempts"]:
                start, end = attempt["tokens"]
                piece = await gateway.ok("GET", f"{path}/tokens?start={start}&end={end}")
                text = b"".join(map(bytes.fromhex, piece["hex"])).decode()
                assert text.startswith("<tool_call>")
                assert text.rstrip().endswith("</tool_call>")
                seen.add(attempt["status"])
    assert seen == {"ok", "invalid_json"}


async def test_drift_is_where_encoding_again_differs(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await episode(fake, gateway)
    found = 0
    for sample in await gateway.samples(session_id):
        said = await gateway.ok("GET", f"/sessions/{session_id}/view/{sample['sample_id']}/drift")
        for turn in sample["turns"]:
            ids = sample["token_ids"][turn["start"] : turn["end"]]
            mine = [one for one in said["drifts"] if one["turn_id"] == turn["turn_id"]]
            assert bool(mine) == drifts(ids)
            again = list(ids)
            for one in reversed(mine):  # put in place of what was sampled, they are the other encoding
                again[one["start"] - turn["start"] : one["end"] - turn["start"]] = one["ids"]
                assert one["ids"] != ids[one["start"] - turn["start"] : one["end"] - turn["start"]]
            assert again == TOKENIZER.encode(TOKENIZER.decode(ids, skip_special_tokens=False)).ids
            found += len(mine)
    assert found


def sampled_branch(ids: Sequence[int]) -> Branch:
    """One turn that sampled these ids, and was given one."""
    token_ids = array("i", [1, *ids])
    logprobs = array("f", [-1.0] * len(token_ids))
    one = Stretch("t", 0, 1, len(token_ids), trained=True)
    return Branch("t", "root", "main", "", None, False, token_ids, logprobs, (), (one,))


def drifts_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[Json]:
    """The drifts of a turn; put in their places they are the other encoding."""
    glyphs = Glyphs(tokenizer)
    said = viewed_drifts(sampled_branch(ids), tokenizer, glyphs)
    again = [1, *ids]
    for one in reversed(said):
        mine = again[one["start"] : one["end"]]
        assert one["recorded"] == [glyphs.of(token_id).text for token_id in mine[:64]]
        assert one["texts"] == [glyphs.of(token_id).text for token_id in one["ids"]]
        assert one["cut"] == (max(len(mine), one["num_ids"]) > 64)
        assert not (mine and one["ids"] and (mine[0] == one["ids"][0] or mine[-1] == one["ids"][-1]))
        again[one["start"] : one["end"]] = one["ids"]
    if not any(one["cut"] for one in said):
        text = tokenizer.decode([token_id for token_id in ids if glyphs.bytes_of(token_id)])
        assert array("i", again[1:]) == tokenizer.encode(text)
    return said


@pytest.fixture(scope="module")
def composing(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer that makes one character of a letter and an accent, as Qwen's do."""
    library = byte_level_tokenizer()
    library.normalizer = normalizers.NFC()
    library.save(str(path := tmp_path_factory.mktemp("composing") / "tokenizer.json"))
    return Tokenizer(path)


def test_a_drift_is_as_short_as_it_can_be(composing: Tokenizer) -> None:
    half = next(i for i in range(composing.vocab_size) if composing.token_bytes(i) == b"\xf0")
    body = composing.encode("hello the weather, hello the world. " * 100)
    said = drifts_of([*body[:10], half, *body[10:500], half, half, *body[500:]], composing)
    assert [(one["start"], one["end"]) for one in said] == [(11, 12), (502, 503), (503, 504)]
    unknown = composing.vocab_size + 5  # it means no text
    [last] = drifts_of([*body, unknown], composing)
    assert (last["recorded"], last["ids"]) == ([f"⟨#{unknown}⟩"], [])


def test_a_drift_is_found_again_where_a_text_is_normalized(composing: Tokenizer) -> None:
    bytes_of = {composing.token_bytes(i): i for i in range(composing.vocab_size)}
    accented = [bytes_of[bytes([byte])] for byte in "e\u0301".encode()]
    body = composing.encode("hello the weather, hello the world. " * 100)
    three = drifts_of([*accented, *body, bytes_of[b"\xf0"], *body, *accented], composing)
    assert [one["end"] - one["start"] <= 3 for one in three] == [True, True, True]


def test_a_long_drift_is_cut(composing: Tokenizer) -> None:
    letters = [composing.encode(letter)[0] for letter in "hello"]
    [one] = drifts_of([composing.vocab_size + 5] * 100, composing)
    assert (len(one["recorded"]), one["cut"], one["end"] - one["start"]) == (64, True, 100)
    said = drifts_of(letters * 100, composing)
    assert [one["cut"] for one in said] == [False] * 100


@settings(deadline=None)
@given(data=st.data())
def test_drifts_are_the_other_encoding(composing: Tokenizer, data: st.DataObject) -> None:
    likely = composing.encode("hello weather e\u0301 \u00e9 👋")
    ids = st.integers(0, composing.vocab_size + 5) | st.sampled_from(likely.tolist())
    drifts_of(data.draw(st.lists(ids, max_size=60)), composing)


async def test_search(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await episode(fake, gateway)
    [sample] = [one for one in await gateway.samples(session_id) if len(one["turns"]) == 3]
    ids, path = sample["token_ids"], f"/sessions/{session_id}/view/{sample['sample_id']}"
    text = TOKENIZER.decode(ids, skip_special_tokens=False)
    for wanted in ("weather", "HELLO", "the wor", "<|im_end|>"):
        found = await gateway.ok(
            "GET", f"{path}/search?q={wanted.replace('<|', '%3C%7C').replace('|>', '%7C%3E')}"
        )
        assert found["num_hits"] == len(found["hits"]) == text.lower().count(wanted.lower()) > 0
        for start, end in found["hits"]:
            touched = TOKENIZER.decode(ids[start:end], skip_special_tokens=False).lower()
            assert wanted.lower() in touched
            assert (
                wanted.lower()
                not in TOKENIZER.decode(ids[start + 1 : end], skip_special_tokens=False).lower()
            )
    found = await gateway.ok("GET", f"{path}/search?q=%23{END}")
    assert [start for start, _ in found["hits"]] == [at for at, i in enumerate(ids) if i == END]


async def test_a_store_and_a_file_say_the_same(
    fake: FakeSGLang, gateway: Gateway, store: Path, tmp_path: Path
) -> None:
    session_id = await episode(fake, gateway)
    live = await gateway.ok("GET", f"/sessions/{session_id}/view")
    stored, filed = [Desk(source) for source in await sources(store, tmp_path)]
    assert json.loads(json.dumps(await stored.session(session_id), default=str)) == {
        k: live[k] for k in ("summary", "turns", "branches")
    }
    other = await filed.session(session_id)
    assert other["summary"] | {"state": "finished"} == live["summary"] | {"created_at": None}
    assert [branch["branch_id"] for branch in other["branches"]] == [
        branch["branch_id"] for branch in live["branches"]
    ]
    assert other["branches"] == live["branches"]
    assert tree_of(other) == tree_of(live)
    for branch in live["branches"]:
        mine = await stored.branch(session_id, branch["branch_id"])
        its = await filed.branch(session_id, branch["branch_id"])
        for a, b in zip(mine["turns"], its["turns"], strict=True):
            same = (
                "turn_id",
                "begin",
                "start",
                "end",
                "trained",
                "given",
                "reply",
                "num_given",
                "num_sampled",
            )
            assert {name: a[name] for name in same} == {name: b[name] for name in same}
        a, b = [await desk.tokens(session_id, branch["branch_id"], 0, 4000) for desk in (stored, filed)]
        assert a["ids"] == b["ids"]
        trained = [at for t in mine["turns"] if t["trained"] for at in range(t["start"], t["end"])]
        assert [a["logprobs"][at] for at in trained] == [b["logprobs"][at] for at in trained]
    page = await filed.sessions("", 10)
    assert [row["session_id"] for row in page["sessions"]] == [session_id]
    for desk in (stored, filed):
        with pytest.raises(NotFound):
            await desk.session("nobody")
        with pytest.raises(NotFound):
            await desk.branch(session_id, "no turn")


def tree_of(session: Json) -> dict[str, tuple[str | None, str | None]]:
    """Each turn's parent and reason."""
    return {turn["turn_id"]: (turn["parent_id"], turn["reason"]) for turn in session["turns"]}


@pytest.mark.parametrize(
    "last", [("b2", "a2"), ("a2", "b2"), ("b2",), ("b2", "b3", "a2"), ("a3", "b2", "a2")], ids="-".join
)
@pytest.mark.parametrize("rewards", [{}, {"b2": 1.0}])
async def test_a_file_shows_the_tree_of_its_store(
    tmp_path: Path, last: tuple[str, ...], rewards: dict[str, float]
) -> None:
    """Whichever branch goes on first: the reasons are their turns', the session's reward is no branch's."""
    commits = [("r", None, "root"), ("a1", "r", None), ("b1", "r", "resampled")]
    begun = set[str]()
    for name in last:
        parent = f"{name[0]}1"
        commits.append((name, parent, "forked" if parent in begun else None))
        begun.add(parent)
    commits += [("n1", None, "resampled"), ("n3", "n1", None), ("n2", "n1", "forked"), ("n4", "n3", None)]
    at = SQLiteStore(tmp_path / "s.sqlite")
    await at.put_session(SessionRecord("x", "finished", 1.5, reward=0.25, branch_rewards=rewards))
    made = [
        made_turn(name, [5], [6], parent_id=parent, branch_reason=reason, reply=Message("assistant", name))
        for name, parent, reason in commits
    ]
    await at.put_turns("x", made)
    await at.aclose()
    stored, filed = [
        await Desk(source).session("x") for source in await sources(tmp_path / "s.sqlite", tmp_path)
    ]
    assert tree_of(stored) == {name: (parent, reason) for name, parent, reason in commits}
    assert tree_of(filed) == tree_of(stored)
    assert filed["branches"] == stored["branches"]
    assert filed["summary"]["reasons"] == stored["summary"]["reasons"]
    assert filed["summary"]["reward"] == (None if rewards else 0.25)


async def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="not a Parquet file of samples"):
        FileSource(tmp_path / "f.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "f.parquet")
    with pytest.raises(ConfigError, match="it has no column 'session_id'"):
        FileSource(tmp_path / "f.parquet")


async def test_an_older_file(fake: FakeSGLang, gateway: Gateway, store: Path, tmp_path: Path) -> None:
    session_id = await episode(fake, gateway)
    await sources(store, tmp_path)
    rows = pq.read_table(tmp_path / "f.parquet").to_pylist()
    later = ("group_id", "label", "label_by", "sampling_logprobs", "support", "routed_experts")
    for row in rows:
        for name in later:
            del row[name]
        for turn in row["turns"]:
            for name in ("label", "logprob_basis", "reward"):
                del turn[name]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"tokentape.schema_version": "1"})
    pq.write_table(table, tmp_path / "old.parquet")
    desk = Desk(FileSource(tmp_path / "old.parquet"))
    session = await desk.session(session_id)
    assert session["summary"]["labels"] == {}
    assert len(session["branches"]) == len(rows)
    head = await desk.branch(session_id, rows[0]["sample_id"])
    assert head["turns"][0]["logprob_basis"] == "sampled"


async def test_a_session_in_postgres(fake: FakeSGLang, model_dir: Path, database: str) -> None:
    """Looked at beside the gateway that holds it, which goes on writing."""
    async with gateway_for(fake.url, model_dir, database) as gateway:
        session_id = await gateway.create()
        fake.responder = lambda _: sampled("hello")
        agent = Agent(gateway, session_id)
        await agent.turn(USER)
        opened = open_store(database, readonly=True)
        desk = Desk(StoreSource(opened, "PostgreSQL"))
        assert (await desk.session(session_id))["summary"]["turns"] == 1
        await agent.turn(USER)
        assert (await gateway.show(session_id))["turns"] == 2
        await opened.aclose()


# -- versions, the wire, keys


async def test_nothing_is_sent_where_nothing_changed(fake: FakeSGLang, gateway: Gateway) -> None:
    session_id = await gateway.create()
    fake.responder = lambda _: sampled("hello")
    path = f"/sessions/{session_id}/view"
    tags = set()
    for change in (None, "turn", "finish"):
        if change == "turn":
            await gateway.chat(session_id, [USER])
        elif change == "finish":
            await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 1.0})
        answer = await gateway.request("GET", path)
        tags.add(answer.headers["ETag"])
        again = await gateway.request("GET", path, headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status, again.body) == (304, b"")
    assert len(tags) == 3


async def test_a_later_session_of_the_same_id_is_another(
    fake: FakeSGLang, gateway: Gateway, store: Path
) -> None:
    fake.responder = lambda _: sampled("hello")
    opened = open_store(store, readonly=True)
    seen = list[tuple[str, str, str]]()
    for _ in range(2):
        await gateway.create(session_id="again")
        turn_id = (await gateway.chat("again", [USER]))["tokentape"]["turn_id"]
        answer = await gateway.request("GET", "/sessions/again/view")
        assert [turn["turn_id"] for turn in answer.body["turns"]] == [turn_id]
        await gateway.ok("GET", f"/sessions/again/view/{turn_id}")
        seen.append((turn_id, answer.headers["ETag"], await StoreSource(opened, "s").version("again")))
        await gateway.ok("DELETE", "/sessions/again")
    assert all(first != second for first, second in zip(*seen, strict=True))


async def test_who_looks_at_sessions_pushes_none_out(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    config = PartsConfig(
        model=str(model_dir),
        engine=SGLangConfig(fake.url),
        store=store,
        memory=MemoryLimits(max_sessions=2),
    )
    async with parts(config) as gateway:
        names = [f"s{number}" for number in range(5)]
        for name in names:
            await gateway.sessions.create(name)
        desk = desk_of(gateway)
        for name in reversed(names):
            await desk.version(name)
            assert (await desk.session(name))["summary"] == await desk.summary(name)
        assert [name for name in names if gateway.sessions.is_here(name)] == names[-2:]


class Asked(StoreSource):
    """A source that counts how often it is asked for a version."""

    num_asked = 0

    async def version(self, session_id: str) -> str:
        self.num_asked += 1
        return await super().version(session_id)


async def test_a_finished_session_is_not_read_for_every_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokentape.viewer.stored._FRESH_S", 0.0)
    at = SQLiteStore(tmp_path / "s.sqlite")
    source = Asked(at, "s")
    desk = Desk(source)

    async def asked(state: str, name: str) -> int:
        await at.put_session(SessionRecord("x", state, 1.0))
        await at.put_turns("x", [made_turn(name, [1], [2, 3])])
        before = source.num_asked
        for _ in range(10):
            assert (await desk.tokens("x", name, 0, 3))["ids"] == [1, 2, 3]
        return source.num_asked - before

    assert await asked("open", "t1") == 10
    await at.delete("x")
    assert await asked("finished", "t2") == 1
    await at.delete("x")
    with pytest.raises(NotFound):
        await desk.version("x")
    with pytest.raises(NotFound):
        await desk.tokens("x", "t2", 0, 3)
    assert await asked("finished", "t3") == 1
    await at.delete("x")
    await at.put_session(SessionRecord("x", "finished", 2.0))
    await at.put_turns("x", [made_turn("t4", [1], [2, 3])])
    await desk.version("x")
    assert [turn["turn_id"] for turn in (await desk.session("x"))["turns"]] == ["t4"]
    monkeypatch.setattr("tokentape.viewer.desk._FINAL_S", 0.0)
    await desk.session("x")
    await at.delete("x")
    with pytest.raises(NotFound):
        await desk.session("x")
    await at.aclose()


async def test_another_file_is_another_version(
    fake: FakeSGLang, gateway: Gateway, store: Path, tmp_path: Path
) -> None:
    session_id = await episode(fake, gateway)
    [_, before] = await sources(store, tmp_path)
    [_, after] = await sources(store, tmp_path)  # written again
    assert await before.version(session_id) == await before.version(session_id)
    assert await before.version(session_id) != await after.version(session_id)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_wire_is_kept(fake: FakeSGLang, gateway: Gateway, *, stream: bool) -> None:
    session_id = await gateway.create()
    fake.script(sampled("hello", seed=1))
    body = {"model": "policy", "messages": [USER], "stream": stream, "user": "\u00e9"}
    answer = await gateway.post(session_id, json.dumps(body).encode())
    [turn] = (await gateway.ok("GET", f"/sessions/{session_id}/view"))["turns"]
    wire = await gateway.ok("GET", f"/sessions/{session_id}/view/{turn['turn_id']}/wire")
    assert wire["request"] == json.dumps(body)
    assert wire["path"].endswith("/v1/chat/completions")
    if stream:
        assert wire["reply"].encode() == answer.body
        assert wire["reply"].endswith("data: [DONE]\n\n")
    else:
        assert json.loads(wire["reply"]) == answer.body


async def test_the_wire_is_not_kept(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    async with gateway_for(fake.url, model_dir, store, http={"wire_bytes": 0}) as gateway:
        session_id = await gateway.create()
        fake.script(sampled("hello", seed=1))
        reply = await gateway.chat(session_id, [USER])
        turn_id = reply["tokentape"]["turn_id"]
        assert await gateway.ok("GET", f"/sessions/{session_id}/view/{turn_id}/wire") == {"kept": False}
        assert not (await gateway.ok("GET", "/ui/api/info"))["has_wire"]


def test_the_wire_log_is_bounded() -> None:
    kept = WireLog(10_000)
    for number in range(100):
        kept.keep([f"a{number}", f"b{number}"], Exchanged("/p", b"q" * 500, b"r" * number))
        assert kept.num_bytes <= 10_000
    assert kept.of("a99") == kept.of("b99") == {"path": "/p", "request": "q" * 500, "reply": "r" * 99}
    assert kept.of("a0") is None
    kept.keep(["a99", "b99"], Exchanged("/p", b"", b"\xff"))  # the same turns again
    assert kept.of("b99") == {"path": "/p", "request": "", "reply": "\\xff"}
    kept.keep(["large"], Exchanged("/p", b"", b"r" * 10_000))
    assert kept.of("large") is None
    assert kept.of("a99") is not None


async def test_data_needs_the_key_and_the_page_does_not(
    fake: FakeSGLang, model_dir: Path, store: Path
) -> None:
    async with gateway_for(fake.url, model_dir, store, http={"api_key": "k"}) as gateway:
        key = {"Authorization": "Bearer k"}
        created = await gateway.request("POST", "/sessions", {}, key)
        session_id, own = created.body["session_id"], {"Authorization": f"Bearer {created.body['api_key']}"}
        data = (
            "/ui/api/info",
            "/ui/api/sessions",
            f"/sessions/{session_id}/view",
            f"/sessions/{session_id}/view/summary",
            f"/sessions/{session_id}/view/t/tokens",
            "/ui/nothing.js",
        )
        for path in data:
            assert (await gateway.request("GET", path)).status == 401
            assert (
                await gateway.request("GET", path, headers=own)
            ).status == 401  # a session's key is its agent's
        assert (await gateway.request("GET", data[2], headers=key)).status == 200
        for path in ("/ui", "/ui/", "/ui/main.js", "/ui/style.css"):
            await checked_headers(gateway, path)


async def test_the_viewer_alone_needs_its_key(store: Path) -> None:
    SQLiteStore(store)
    app = make_app(Desk(StoreSource(open_store(store, readonly=True), "s")), "k")
    async with serve(app) as url, aiohttp.ClientSession() as client:
        gateway = Gateway(url, client)
        assert (await gateway.request("GET", "/ui/api/info")).status == 401
        answer = await gateway.request("GET", "/ui/api/info", headers={"Authorization": "Bearer k"})
        assert (answer.status, answer.body["kind"]) == (200, "store")
        assert (await gateway.request("GET", "/")).status == 200  # leads to the page
        assert (
            await gateway.request("GET", "/elsewhere", headers={"Authorization": "Bearer k"})
        ).status == 404
        await checked_headers(gateway, "/ui/")


async def checked_headers(gateway: Gateway, path: str) -> None:
    answer = await gateway.request("GET", path)
    assert answer.status == 200
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/ui/api/sessions?limit=0",
            "/ui/api/sessions?limit=x",
            "/sessions/{}/view/{}/tokens?start=5&end=4",
        ),
        *("/sessions/{}/view/{}/tokens?start=0&end=99999", "/sessions/{}/view/{}/lines?columns=1"),
        *("/sessions/{}/view/{}/scores", "/sessions/{}/view/{}/tokens?start=-1"),
    ],
)
async def test_refusals(fake: FakeSGLang, gateway: Gateway, path: str) -> None:
    session_id = await gateway.create()
    fake.script(Reply([END]))
    turn_id = (await gateway.chat(session_id, [USER]))["tokentape"]["turn_id"]
    assert (await gateway.request("GET", path.format(session_id, turn_id))).status == 400
    assert (await gateway.request("GET", path.format("nobody", turn_id))).status in (400, 404)


# -- texts


def test_everything_can_be_seen() -> None:
    for hostile in (
        "\u202eabc",
        "a\u200bb",
        "\x00\x1b\x7f",
        "\ud800",
        "\u2028",
        "\ue000",
        "\ufeff",
        "\U000e0041",
        "a\U000e0100b",
        "a\u034fb",
        "\u3164",
        "\u115f\u1160",
        "\uffa0",
        "\u17b4",
        "\u180b",
        "\ufe00",
        "\U0001d173",
    ):
        shown = visible(hostile)
        assert "⟨U+" in shown
        assert all(c.isprintable() for c in shown), ascii(shown)
    assert visible("a\tb\n") == "a⇥b⏎"
    assert visible("\u0301a") == "◌\u0301a"
    assert visible("\ufe0ea") == "⟨U+FE0E⟩a"
    assert visible("❤\ufe0f") == "❤\ufe0f"
    assert (width("日本"), width("e\u0301"), width("ab")) == (4, 1, 2)


def test_glyphs_of_all_ids(model_dir: Path) -> None:
    tokenizer = Tokenizer(model_dir / "tokenizer.json", num_ids=400)
    glyphs = Glyphs(tokenizer)
    for token_id in (*range(400), 10**6, 2**31 - 1):
        glyph = glyphs.of(token_id)
        assert glyph.text.isprintable()
        assert glyph.columns == width(glyph.text) > 0
        assert bytes.fromhex(glyph.hex) == glyphs.bytes_of(token_id)
    assert Glyphs(None).of(17).text == " 17"


class Counting(Tokenizer):
    """A tokenizer that counts what it decodes."""

    num_decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.num_decoded += len(ids)
        return super().decode(ids)

    def stream(self) -> TextStream:
        raise AssertionError("it decodes all that there is again for each token")


@pytest.fixture(params=[False, True], ids=["", "strips"])
def falling_back(request: pytest.FixtureRequest, tmp_path: Path) -> Counting:
    """A vocabulary of words that begin with their space, and of bytes, as Gemma's is, and Llama 2's."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for word in ("\u2581", "a", "h", "i", "\u2581hello", "\u2581world", "hello", "<|end|>"):
        vocab[word] = len(vocab)
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if request.param else [])])
    library.save(str(tmp_path / "tokenizer.json"))
    return Counting(tmp_path / "tokenizer.json")


def ids_in(tokenizer: Tokenizer, *tokens: str | bytes) -> list[int]:
    names = [[one] if isinstance(one, str) else [f"<0x{byte:02X}>" for byte in one] for one in tokens]
    return [token_id for some in names for name in some if (token_id := tokenizer.id_of(name)) is not None]


def test_tokens_that_are_not_bytes(falling_back: Counting) -> None:
    glyphs = Glyphs(falling_back)
    ids = ids_in(falling_back, "\u2581hello", "\u2581", "hello", "é\n".encode(), "<|end|>")
    assert [glyphs.of(token_id).text for token_id in ids] == [
        *(" hello", " ", "hello", "⟨c3⟩", "⟨a9⟩", "⏎", "<|end|>")
    ]
    assert b"".join(map(glyphs.bytes_of, ids)) == " hello helloé\n<|end|>".encode()
    branch = sampled_branch(ids)
    assert find_text(branch, glyphs, "é") == [(4, 6)]
    assert find_text(branch, glyphs, "hello hello") == [(1, 4)]
    assert glyphs.bytes_of(falling_back.vocab_size + 10**6) == b""


async def test_attempts_stand_at_tokens_that_are_not_bytes(falling_back: Counting, tmp_path: Path) -> None:
    """And the whole completion is not decoded again for each of its tokens."""
    before, call = ["\u2581hello", "é".encode()] * 2000, ["\u2581world", "h", "i"]
    start, ids = len(ids_in(falling_back, *before)), ids_in(falling_back, *before, *call, "\u2581hello")
    text = falling_back.decode(ids)
    span = {"start": text.index(" world"), "end": text.index(" world") + len(" worldhi")}
    at = SQLiteStore(tmp_path / "s.sqlite")
    await at.put_session(SessionRecord("x", "open", 1.5))
    await at.put_turns("x", [made_turn("t", [97], ids, attempts=({"status": "ok", **span},))])
    desk = Desk(StoreSource(at, "s"), falling_back)
    falling_back.num_decoded = 0
    [turn] = (await desk.branch("x", "t"))["turns"]
    await at.aclose()
    assert turn["attempts"] == [{"status": "ok", **span, "tokens": [1 + start, 1 + start + 3]}]
    assert falling_back.num_decoded < 2 * len(ids)


def test_first_difference() -> None:
    a = array("i", range(1000))
    assert first_difference(a, a) is None
    assert first_difference(a, a[:10]) == 10
    for at in (0, 1, 511, 999):
        b = array("i", a)
        b[at] = -1
        assert first_difference(a, b) == at
    assert first_difference(array("i"), array("i")) is None
