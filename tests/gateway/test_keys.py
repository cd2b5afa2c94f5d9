"""`--api-key`: one key for everything, and for each session's agent a key that opens that session alone."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from gatewaykit import USER, Answer, Gateway, assert_samples_match, gateway_for, seen_by
from tokentape.testing import FakeSGLang

MASTER = {"Authorization": "Bearer sk-right"}
BODY = {"messages": [USER]}
CHAT = "/v1/chat/completions"


@pytest.fixture
async def locked(fake: FakeSGLang, model_dir: Path, store: Path) -> AsyncIterator[Gateway]:
    async with gateway_for(fake.url, model_dir, store, http={"api_key": "sk-right"}) as gateway:
        yield gateway


async def made(gateway: Gateway, session_id: str | None = None) -> tuple[str, str]:
    answer = await gateway.request("POST", "/sessions", {"session_id": session_id}, MASTER)
    assert set(answer.body) == {"session_id", "base_url", "api_key"}
    return answer.body["session_id"], answer.body["api_key"]


async def num_turns(gateway: Gateway, session_id: str) -> int:
    return (await gateway.request("GET", f"/sessions/{session_id}", headers=MASTER)).body["turns"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def refused(answer: Answer) -> None:
    assert (answer.status, answer.error["code"], answer.error["type"]) == (
        401,
        "unauthorized",
        "invalid_request_error",
    )
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("session_id", [None, "a.b.c", "x", "a" * 128, "run-1:a@b~c"])
async def test_a_sessions_own_key(fake: FakeSGLang, locked: Gateway, session_id: str | None) -> None:
    """With its path, without, as either header: always this session."""
    session_id, key = await made(locked, session_id)
    for headers in (bearer(key), {"x-api-key": key}):
        for path in (f"/sessions/{session_id}{CHAT}", CHAT):
            answer = await locked.request("POST", path, {**BODY, "seed": len(fake.requests)}, headers)
            assert answer.status == 200, answer
            assert answer.body["tokentape"]["session_id"] == session_id
        for path in (f"/sessions/{session_id}/v1/models", "/v1/models"):
            assert (await locked.request("GET", path, headers=headers)).status == 200
    assert await num_turns(locked, session_id) == 4
    answer = await locked.request("GET", f"/sessions/{session_id}/samples", headers=MASTER)
    assert_samples_match(seen_by(fake), answer.body["samples"], num_turns=4)


async def test_it_opens_no_other_session(fake: FakeSGLang, locked: Gateway) -> None:
    mine, key = await made(locked)
    other, _ = await made(locked)
    refused(await locked.request("POST", f"/sessions/{other}{CHAT}", BODY, bearer(key)))
    refused(await locked.request("GET", f"/sessions/{other}/v1/models", headers=bearer(key)))
    answer = await locked.request("POST", CHAT, BODY, {**bearer(key), "X-Session-Id": other})
    assert answer.status != 200 or answer.body["tokentape"]["session_id"] == mine
    assert await num_turns(locked, other) == 0


async def test_it_opens_no_control_route(fake: FakeSGLang, locked: Gateway) -> None:
    mine, key = await made(locked)
    for method, path in (
        ("POST", "/sessions"),
        ("GET", "/sessions"),
        ("GET", f"/sessions/{mine}"),
        ("DELETE", f"/sessions/{mine}"),
        ("GET", f"/sessions/{mine}/samples"),
        ("POST", f"/sessions/{mine}/finish"),
        ("GET", "/metrics"),
        ("GET", "/nowhere"),
        ("GET", f"/sessions/{mine}/samples?x=/v1/"),
        ("GET", f"/sessions/{mine}%2Fv1%2F/samples"),
        ("GET", f"/sessions/{mine}/v1/../samples"),
        ("GET", f"/sessions/{mine}/v1/%2e%2e/samples"),
        ("GET", f"/v1/../sessions/{mine}"),
        ("GET", f"/v1%2F/../sessions/{mine}"),
        ("GET", "/metrics/v1/"),
    ):
        answer = await locked.request(method, path, headers=bearer(key))
        assert answer.status in (401, 404), (method, path, answer)
        if answer.status == 404:
            assert "/v1" in path
    assert (await locked.request("GET", f"/sessions/{mine}", headers=MASTER)).body["state"] == "open"


async def test_the_master_key_opens_all(fake: FakeSGLang, locked: Gateway) -> None:
    session_id, _ = await made(locked)
    for headers in (
        MASTER,
        {"authorization": "bearer sk-right"},
        {"Authorization": "BEARER  sk-right "},
        {"x-api-key": "sk-right"},
        {"Authorization": "Basic nonsense", "x-api-key": "sk-right"},
    ):
        for path in (f"/sessions/{session_id}", "/sessions", "/metrics", f"/sessions/{session_id}/v1/models"):
            assert (await locked.request("GET", path, headers=headers)).status == 200, (headers, path)
        answer = await locked.request("POST", CHAT, BODY, {**headers, "X-Session-Id": session_id})
        assert answer.status == 200
    assert (await locked.request("POST", CHAT, BODY, MASTER)).status == 404  # it names no session


async def test_keys_that_are_none(fake: FakeSGLang, locked: Gateway) -> None:
    session_id, key = await made(locked)
    other, other_key = await made(locked)
    mac = key.rpartition(".")[2]
    for wrong in (
        *("", "sk-wrong", "sk-right2", "sk-righ", "SK-RIGHT", "sk-right\u00e9", "."),
        *(session_id, f"{session_id}.", f".{mac}", mac, key[:-1], key + "0", key.upper(), f"{key} x"),
        *(f"{session_id}.{'0' * 32}", f"{other}.{mac}", f"{session_id}.{other_key.rpartition('.')[2]}"),
        f"x.{key}",
    ):
        for headers in (bearer(wrong), {"x-api-key": wrong}, {"Authorization": wrong}):
            refused(await locked.request("POST", f"/sessions/{session_id}{CHAT}", BODY, headers))
            refused(await locked.request("POST", CHAT, BODY, {**headers, "X-Session-Id": session_id}))
    refused(await locked.request("POST", f"/sessions/{session_id}{CHAT}", BODY))
    assert not fake.requests


@pytest.mark.parametrize("value", [b"Bearer \xff\xfe", b"Bearer \xc3\xa9.\xff", b"\x80", b"Bearer \x01"])
async def test_odd_bytes(locked: Gateway, value: bytes) -> None:
    host, port = locked.url.removeprefix("http://").split(":")
    for name in (b"Authorization", b"x-api-key"):
        reader, writer = await asyncio.open_connection(host, int(port))
        head = b"POST /sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n"
        writer.write(head + name + b": " + value + b"\r\n\r\n{}")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert answer.split()[1] in (b"400", b"401"), answer


async def test_keys_survive_a_restart(fake: FakeSGLang, model_dir: Path, store: Path) -> None:
    """They are derived, not stored; another master key makes other ones."""
    async with gateway_for(fake.url, model_dir, store, http={"api_key": "sk-right"}) as gateway:
        _, key = await made(gateway, "s")
    async with gateway_for(fake.url, model_dir, store, http={"api_key": "sk-right"}) as gateway:
        assert (await gateway.request("POST", CHAT, BODY, bearer(key))).status == 200
    async with gateway_for(fake.url, model_dir, store, http={"api_key": "sk-other"}) as gateway:
        refused(await gateway.request("POST", CHAT, BODY, bearer(key)))
    stored = await asyncio.to_thread(store.read_bytes)
    assert b"sk-right" not in stored
    assert key.encode() not in stored


async def test_a_deleted_session(fake: FakeSGLang, locked: Gateway) -> None:
    session_id, key = await made(locked)
    await locked.request("DELETE", f"/sessions/{session_id}", headers=MASTER)
    assert (await locked.request("POST", CHAT, BODY, bearer(key))).status == 404


async def test_in_the_sdk(fake: FakeSGLang, locked: Gateway) -> None:
    session_id, key = await made(locked)
    for base_url in (f"{locked.url}/v1", f"{locked.url}/sessions/{session_id}/v1"):
        async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
            await client.chat.completions.create(model="policy", messages=[USER])
            assert [m.id async for m in client.models.list()] == ["policy"]
        async with openai.AsyncOpenAI(base_url=base_url, api_key=key[:-1], max_retries=2) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="policy", messages=[USER])
    assert await num_turns(locked, session_id) == 2


async def test_without_a_key_there_are_none(gateway: Gateway) -> None:
    answer = await gateway.request("POST", "/sessions", {}, MASTER)
    assert set(answer.body) == {"session_id", "base_url"}
