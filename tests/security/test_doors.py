"""Doors between sessions, hostile names, and bodies and headers that no client of good will sends."""

import asyncio
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from gatewaykit import END, USER, Gateway, assert_samples_match, gateway_for, sampled, seen_by
from tokentape.testing import FakeSGLang, Reply
from wirekit import WIRES, Json, Talk, WireUnderTest

every_wire = pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
HEADER_LIMIT = 8190  # aiohttp's, of one line


async def usable(fake: FakeSGLang, gateway: Gateway) -> None:
    """A new session works, and is exact."""
    session_id = await gateway.create()
    fake.script(sampled("hello", seed=1), sampled("world", seed=2))
    reply = await gateway.chat(session_id, [USER])
    await gateway.chat(session_id, [USER, reply["choices"][0]["message"], USER])
    assert_samples_match(seen_by(fake), await gateway.samples(session_id), num_turns=2)


async def raw(gateway: Gateway, data: bytes) -> bytes:
    """What comes back to bytes that no HTTP client would write; b"" where the connection is closed."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        await asyncio.wait({asyncio.ensure_future(writer.wait_closed())})


def post(path: str, body: bytes, *headers: bytes, length: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1".encode(), b"Host: x", b"Connection: close", *headers]
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# -- sessions of others


@every_wire
async def test_nothing_of_one_session_is_in_another(
    fake: FakeSGLang, gateway: Gateway, wire: WireUnderTest
) -> None:
    """The same conversation in two sessions: no parent, no id of the other one's."""
    fake.responder = lambda _: sampled("hello")
    mine, other = await gateway.create(), await gateway.create()
    body = wire.body(Talk())
    answers = [
        await gateway.request("POST", f"/sessions/{session_id}{wire.path}", body)
        for session_id in (mine, other)
    ]
    tapes = [answer.body["tokentape"] for answer in answers]
    assert [tape["session_id"] for tape in tapes] == [mine, other]
    assert [tape["branch_reason"] for tape in tapes] == ["root", "root"]
    name = "input" if "input" in body else "messages"
    going_on = {**body, name: [*body[name], {"role": "assistant", "content": "hello"}, {**USER}]}
    answer = await gateway.request("POST", f"/sessions/{other}{wire.path}", going_on)
    assert answer.body["tokentape"]["parent_turn_id"] == tapes[1]["turn_id"]
    assert (await gateway.show(mine))["turns"] == 1


async def test_responses_of_others(fake: FakeSGLang, gateway: Gateway) -> None:
    """An id is no key: it opens only what is in the caller's own session."""
    fake.responder = lambda _: Reply([END])
    mine, other = await gateway.create(), await gateway.create()
    made = await gateway.ok("POST", f"/sessions/{mine}/v1/responses", {"input": "hello"})
    for method, path in (
        ("GET", ""),
        ("GET", "/input_items"),
        ("DELETE", ""),
        ("POST", "/cancel"),
    ):
        route = f"/v1/responses/{made['id']}{path}"
        answer = await gateway.request(method, f"/sessions/{other}{route}")
        assert answer.status == 404, (method, path)
        answer = await gateway.request(method, route, headers={"X-Session-Id": other})
        assert answer.status == 404, (method, path)
    body = {"input": "more", "previous_response_id": made["id"]}
    answer = await gateway.request("POST", f"/sessions/{other}/v1/responses", body)
    assert answer.status in (400, 404)
    assert (await gateway.show(other))["turns"] == 0
    await gateway.ok("GET", f"/sessions/{mine}/v1/responses/{made['id']}")


# -- names


NAMES = {
    "path": "../../etc/passwd",
    "encoded path": "..%2f..%2fetc%2fpasswd",
    "twice encoded": "%252e%252e%252f",
    "dot": "%2e",
    "dots": "%2e%2e",
    "slash": "a%2fb",
    "backslash": "a%5cb",
    "NUL": "a%00b",
    "newline": "a%0d%0aX-Evil:%201",
    "no utf-8": "%ff%fe",
    "surrogate": "%ed%a0%80",
    "unicode": "%C3%A9",
    "lookalike": "%EF%BC%8E%EF%BC%8E",
    "blank": "%20",
    "quote": "%27%20OR%20%271%27=%271",
    "sql": "x%27;DROP%20TABLE%20turns;--",
    "wildcards": "%25",
    "long": "a" * 4000,
    "129": "a" * 129,
    "empty": "",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("auto", [False, True], ids=["", "auto"])
async def test_hostile_names(
    fake: FakeSGLang, model_dir: Path, tmp_path: Path, name: str, auto: bool
) -> None:
    """Neither found nor made, by path or by header; nothing is written anywhere."""
    store = tmp_path / "store" / "store.sqlite"
    store.parent.mkdir()
    async with gateway_for(fake.url, model_dir, store, auto_sessions=auto) as gateway:
        await gateway.chat(await gateway.create(session_id="a"), [USER])
        files = sorted(store.parent.iterdir())
        for wire in WIRES:
            body = json.dumps(wire.body(Talk())).encode()
            answer = await raw(gateway, post(f"/sessions/{NAMES[name]}{wire.path}", body))
            assert answer.split()[1:2] in ([b"400"], [b"404"], [b"405"]), answer
            assert b"X-Evil" not in answer.partition(b"\r\n\r\n")[0]
        for method, suffix in (("GET", ""), ("GET", "/samples"), ("DELETE", ""), ("POST", "/finish")):
            line = f"{method} /sessions/{NAMES[name]}{suffix} HTTP/1.1\r\n".encode()
            answer = await raw(gateway, line + b"Host: x\r\nConnection: close\r\n\r\n")
            listing = name == "empty" and suffix == ""
            assert answer.split()[1:2] in ([b"400"], [b"404"], [b"405"]) or listing, answer
        assert sorted(store.parent.iterdir()) == files
        sessions = (await gateway.ok("GET", "/sessions"))["sessions"]
        assert [s["session_id"] for s in sessions] == ["a"]
        await usable(fake, gateway)


@pytest.mark.parametrize(
    "value",
    [b"../a", b"a/b", b"a\tb", b"\xff\xfe", b"\xc3\xa9", b"a" * 5000, b"x' OR '1'='1", b"."],
    ids=repr,
)
@pytest.mark.parametrize("header", [b"X-Session-Id: ", b"Authorization: Bearer ", b"x-api-key: "], ids=repr)
async def test_hostile_headers(fake: FakeSGLang, gateway: Gateway, header: bytes, value: bytes) -> None:
    for wire in WIRES:
        body = json.dumps(wire.body(Talk())).encode()
        answer = await raw(gateway, post(wire.path, body, header + value))
        assert answer.split()[1] in (b"400", b"404"), answer
        assert wire.is_error(json.loads(answer.partition(b"\r\n\r\n")[2]))
    assert not fake.requests


@pytest.mark.parametrize("label", ["", " ", "a b", "a" * 65, "../x", "-x", "é", "<|im_end|>", "a\u2028"])
@every_wire
async def test_hostile_labels(fake: FakeSGLang, gateway: Gateway, wire: WireUnderTest, label: str) -> None:
    path = f"/sessions/{await gateway.create()}{wire.path}"
    body = json.dumps(wire.body(Talk())).encode()
    answer = await raw(gateway, post(path, body, b"X-Tokentape-Label: " + label.encode()))
    assert answer.split()[1] == b"400", answer
    assert not fake.requests


# -- sizes


@every_wire
async def test_bodies_too_large(
    fake: FakeSGLang, model_dir: Path, tmp_path: Path, wire: WireUnderTest
) -> None:
    """413 in the wire's shape: with its length, in chunks, or packed; before anything is read as JSON."""
    limit = 20_000
    store = tmp_path / "small.sqlite"
    async with gateway_for(fake.url, model_dir, store, http={"max_body_bytes": limit}) as gateway:
        path = f"/sessions/{await gateway.create()}{wire.path}"
        large = json.dumps(wire.body(Talk(user="x" * limit * 4))).encode()
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (large[:9000], large[9000:])) + b"0\r\n\r\n"
        packed = gzip.compress(large)
        assert len(packed) < 2000
        for data in (
            post(path, large),
            post(path, chunked, b"Transfer-Encoding: chunked", length=False),
            post(path, packed, b"Content-Encoding: gzip"),
            post(path, zlib.compress(large), b"Content-Encoding: deflate"),
        ):
            answer = await raw(gateway, data)
            assert answer == b"" or answer.split()[1] == b"413", answer
            if answer:
                assert wire.is_error(json.loads(answer.partition(b"\r\n\r\n")[2]))
        assert not fake.requests
        fitting = json.dumps(wire.body(Talk(user="x" * 2000))).encode()
        answer = await raw(gateway, post(path, gzip.compress(fitting), b"Content-Encoding: gzip"))
        assert answer.split()[1] == b"200", answer


async def test_headers_too_large(fake: FakeSGLang, gateway: Gateway) -> None:
    path = f"/sessions/{await gateway.create()}/v1/chat/completions"
    body = json.dumps({"messages": [USER]}).encode()
    for headers in (
        [b"X-Long: " + b"x" * (HEADER_LIMIT + 10)],
        [b"X-Tokentape-Label: " + b"x" * (HEADER_LIMIT + 10)],
        [b"X-%d: x" % n for n in range(40_000)],
        [b"Idempotency-Key: " + b"x" * 100_000],
    ):
        answer = await raw(gateway, post(path, body, *headers))
        assert answer == b"" or answer.split()[1] in (b"400", b"431"), answer[:300]
    assert not fake.requests
    await usable(fake, gateway)


async def test_a_long_target(fake: FakeSGLang, gateway: Gateway) -> None:
    answer = await raw(gateway, b"GET /sessions?after=" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer == b"" or answer.split()[1] in (b"400", b"414")
    await usable(fake, gateway)


# -- what is no HTTP, or hardly


@every_wire
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ([b"Content-Encoding: gzip"], b"this is not packed"),
        ([b"Content-Encoding: gzip"], gzip.compress(b"{" * 5000)[:40]),
        ([b"Content-Encoding: deflate"], b"\xff" * 30),
        ([b"Content-Encoding: br"], b"{}"),
        ([b"Content-Encoding: nonsense"], b"{}"),
        ([b"Content-Type: application/json; charset=nonsense"], b"{}"),
        ([b"Content-Type: multipart/form-data; boundary=x"], b"--x\r\n\r\n{}"),
        ([b"Content-Type: \xff"], b"{}"),
        ([b"Expect: 100-continue"], b"{}"),
        ([b"Expect: nonsense"], b"{}"),
        ([b"Accept: \xff"], b"{}"),
    ],
    ids=repr,
)
async def test_odd_bodies(
    fake: FakeSGLang, gateway: Gateway, wire: WireUnderTest, headers: list[bytes], body: bytes
) -> None:
    path = f"/sessions/{await gateway.create()}{wire.path}"
    answer = (await raw(gateway, post(path, body, *headers))).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert answer == b"" or answer.split()[1] in (b"400", b"415", b"417"), answer
    assert not fake.requests


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        b"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"POST /sessions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"POST /sessions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: nonsense\r\n\r\n{}",
        b"GET /sessions HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
        b"GET /sessions HTTP/1.1\r\nHost: x\r\nX\x00Y: a\r\n\r\n",
        b"GET http://elsewhere.example/sessions/../metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"CONNECT evil:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET //metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ],
    ids=lambda data: repr(data)[:40],
)
async def test_odd_requests(fake: FakeSGLang, gateway: Gateway, data: bytes) -> None:
    """Never a 500, and the next one is served as if nothing had been."""
    try:
        answer = await raw(gateway, data)
    except TimeoutError:  # it waits for more, which is its right
        answer = b""
    assert b" 500 " not in answer.split(b"\r\n")[0], answer
    await usable(fake, gateway)


async def test_many_half_requests(fake: FakeSGLang, gateway: Gateway) -> None:
    """Connections that say nothing more keep nobody waiting."""
    host, port = gateway.url.removeprefix("http://").split(":")
    opened: list[Any] = []
    for n in range(100):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"[: 20 + n])
        opened.append(writer)
    async with asyncio.timeout(5):
        await usable(fake, gateway)
    for writer in opened:
        writer.close()
        await writer.wait_closed()


@every_wire
async def test_errors_show_nothing_of_the_inside(
    fake: FakeSGLang, gateway: Gateway, wire: WireUnderTest, tmp_path: Path
) -> None:
    """No path, no traceback, no other session's id, also where the engine says something odd."""
    other = await gateway.create()
    path = f"/sessions/{await gateway.create()}{wire.path}"
    bodies: list[Json | bytes] = [b"{", {"messages": 7, "input": 7}, {}, wire.body(Talk(call_id="é" * 5000))]
    for body in bodies:
        answer = await gateway.request("POST", path, body)
        text = json.dumps(answer.body)
        for secret in (str(tmp_path), "Traceback", 'File \\"', other, ".py"):
            assert secret not in text
