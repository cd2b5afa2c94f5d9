"""A store that fails: no turn is half there, none is lost; the session goes on from what the store has."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from gatewaykit import USER, Gateway, assert_samples_match, gateway_for, sampled, seen_by
from tokentape.errors import StoreError
from tokentape.invariants import check_samples
from tokentape.store import SQLiteStore
from tokentape.tape import Turn
from tokentape.testing import FakeSGLang

RETRY = {"x-stainless-retry-count": "1"}


def break_once(monkeypatch: pytest.MonkeyPatch, *, written: bool, uncertain: bool = True) -> None:
    """The next commit fails; whether it reached the disk all the same, nobody is told."""
    put_turns = SQLiteStore.put_turns

    async def broken(store: SQLiteStore, session_id: str, turns: Sequence[Turn]) -> None:
        monkeypatch.setattr(SQLiteStore, "put_turns", put_turns)
        if written:
            await put_turns(store, session_id, turns)
        raise StoreError("disk I/O error", uncertain=uncertain)

    monkeypatch.setattr(SQLiteStore, "put_turns", broken)


@pytest.mark.parametrize("written", [True, False], ids=["written", "lost"])
async def test_an_uncertain_commit(
    fake: FakeSGLang, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    fake.script(sampled("hello"), sampled("world", seed=1), sampled("more"), sampled("hi"))
    session_id = await gateway.create()
    first = (await gateway.chat(session_id, [USER]))["choices"][0]["message"]
    break_once(monkeypatch, written=written)
    body = {"model": "policy", "messages": [USER, first, USER]}
    answer = await gateway.post(session_id, body)
    assert (answer.status, answer.body["error"]["code"]) == (503, "store_error")
    # The agent tries again: it gets the turn that the store has, or a new one where it has none.
    again = await gateway.post(session_id, body, RETRY)
    assert again.status == 200, again
    assert len(fake.requests) == (2 if written else 3)
    said = again.body["choices"][0]["message"]
    assert said["content"] == ("world" if written else "more")
    await gateway.chat(session_id, [USER, first, USER, said, USER])
    summary = await gateway.show(session_id)
    assert (summary["state"], summary["turns"], summary["branches"]) == ("open", 3, 1)
    samples = await gateway.samples(session_id)
    assert check_samples(samples) == []
    seen = seen_by(fake)
    assert_samples_match(seen if written else [seen[0], *seen[2:]], samples, num_turns=3)


async def test_turns_that_run_beside_a_failed_commit_are_told(
    fake: FakeSGLang, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finish on the sealed copy must not go around what the store has."""
    fake.script(sampled("hello"))
    session_id = await gateway.create()
    break_once(monkeypatch, written=True)
    assert (await gateway.post(session_id, {"model": "policy", "messages": [USER]})).status == 503
    finished = await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 1.0})
    assert (finished["turns"], finished["state"]) == (1, "finished")
    (sample,) = await gateway.samples(session_id)
    assert sample["loss_mask"].count(1) == len(fake.requests[0].output_ids)


async def test_a_failure_that_is_certain_seals_nothing(
    fake: FakeSGLang, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.script(sampled("hello"), sampled("world"))
    session_id = await gateway.create()
    break_once(monkeypatch, written=False, uncertain=False)
    assert (await gateway.post(session_id, {"model": "policy", "messages": [USER]})).status == 503
    reply = await gateway.chat(session_id, [USER])
    assert reply["choices"][0]["message"]["content"] == "world"
    assert (await gateway.show(session_id))["failures"] == {"store_error": 1}


async def test_a_full_disk(
    fake: FakeSGLang, model_dir: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own limit stands for the disk's: the same error, at the same places."""
    stores: list[SQLiteStore] = []
    prepare = SQLiteStore._prepare

    def remember(one: SQLiteStore, tokenizer: str | None) -> None:
        stores.append(one)
        prepare(one, tokenizer)

    monkeypatch.setattr(SQLiteStore, "_prepare", remember)
    async with gateway_for(fake.url, model_dir, store) as gateway:
        fake.responder = lambda _: sampled("hello")
        session_id = await gateway.create()
        other = await gateway.create()
        reply = await gateway.chat(session_id, [USER])
        pages = stores[0]._connection.execute("PRAGMA page_count").fetchone()[0]
        stores[0]._connection.execute(f"PRAGMA max_page_count={pages + 2}")
        history, failed = [USER], None
        for _ in range(100):
            history += [reply["choices"][0]["message"], USER]
            answer = await gateway.post(session_id, {"model": "policy", "messages": history})
            if answer.status != 200:
                failed = answer
                break
            reply = answer.body
        assert failed is not None
        assert (failed.status, failed.body["error"]["code"]) == (507, "store_full")
        assert (await gateway.request("GET", f"/sessions/{other}")).status == 200
        before = await gateway.samples(session_id)
        assert check_samples(before) == []
        stores[0]._connection.execute("PRAGMA max_page_count=1000000")  # somebody has made room
        answer = await gateway.post(session_id, {"model": "policy", "messages": history}, RETRY)
        assert answer.status == 200
        (sample,) = await gateway.samples(session_id)
        assert check_samples([sample]) == []
        assert sample["token_ids"][: len(before[0]["token_ids"])] == before[0]["token_ids"]
