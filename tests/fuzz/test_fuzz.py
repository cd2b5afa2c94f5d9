"""Whatever is asked: an answer in the provider's shape, never our fault, and a session that stays exact.

`TOKENTAPE_FUZZ_EXAMPLES=5000` for a long run; the default takes some 10 s a wire.
"""

import asyncio
import http.client
import json
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bodies import FIELDS, NASTY, Ask, asks, junk, nasty, numbers, texts, to_bytes
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gatewaykit import TOKENIZER, USER, assert_samples_match, call, cut, gateway_for, sampled, seen_by
from tokentape.testing import FakeSGLang, Reply, write_model_dir
from tokentape.testing.sglang import ReceivedRequest
from wirekit import WIRES, Json, Talk, WireUnderTest

EXAMPLES = int(os.environ.get("TOKENTAPE_FUZZ_EXAMPLES", "0"))
TEXTS = (
    "hello world",
    "",
    "<think>\nthe user\n</think>\n\nhello",
    call("get_time", {"tz": "é"}),
    "the " + call("get_time", "{bad") + call("nothing", {}),
    "<think>\nthe",
    '{"city": "hello"}',
    "é日本語 👩‍👩‍👧",
)


@dataclass
class Target:
    """A gateway that runs in a thread of its own."""

    port: int
    fake: FakeSGLang

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Any = None
    ) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers.get_content_type(), response.read()
        finally:
            connection.close()

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        status, _, raw = self.ask(method, path, None if body is None else json.dumps(body).encode())
        assert status == 200, raw
        return json.loads(raw)


def respond(request: ReceivedRequest) -> Reply:
    """The same for the same prompt and seed; some are cut."""
    rng = random.Random(repr((request.input_ids, request.sampling_params.get("sampling_seed"))))
    text, seed = rng.choice(TEXTS), rng.randrange(100)
    return cut(text or "x", seed=seed) if rng.random() < 0.2 else sampled(text, seed=seed)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    directory: Path = tmp_path_factory.mktemp("fuzz")
    model = write_model_dir(directory / "model", tokenizer=TOKENIZER)
    started: list[Target] = []
    ready, stop, failed = threading.Event(), threading.Event(), list[BaseException]()

    async def serve() -> None:
        async with (
            FakeSGLang(TOKENIZER, responder=respond) as fake,
            gateway_for(fake.url, model, directory / "store.sqlite") as gateway,
        ):
            started.append(Target(int(gateway.url.rpartition(":")[2]), fake))
            ready.set()
            await asyncio.to_thread(stop.wait)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # told to the test's own thread
            failed.append(error)
            ready.set()
            raise

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    assert not failed, failed
    yield started[0]
    stop.set()
    thread.join()


def configured(num: int) -> settings:
    return settings(
        max_examples=EXAMPLES or num,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink]
        if EXAMPLES
        else [Phase.explicit, Phase.generate],
    )


def check(ask: Ask, status: int, kind: str, raw: bytes) -> None:
    """An answer that a client can read, and that does not blame us or a healthy engine."""
    assert status in (200, 400, 404), (status, raw)
    if kind == "text/event-stream":
        assert status == 200
        for line in raw.splitlines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                event = json.loads(line[6:])
                assert event.get("error") is None, event
                assert event.get("type") != "error", event
        return
    body = json.loads(raw)
    if status == 200:
        assert "tokentape" in body
    else:
        assert ask.wire.is_error(body) or "anthropic-version" in ask.headers, body


def exchange(target: Target, given: list[Ask], *, briefly: bool = False) -> list[int]:
    """All requests to one session, between the turns of a good agent; the statuses."""
    target.fake.requests.clear()
    session_id = target.ok("POST", "/sessions", {})["session_id"]
    path = f"/sessions/{session_id}"
    chat = f"{path}/v1/chat/completions"
    body: Json = {"seed": 1}
    messages: list[Json] = []

    def good_turn() -> None:
        messages.append(USER)
        messages.append(target.ok("POST", chat, {**body, "messages": messages})["choices"][0]["message"])

    good_turn()
    good_turn()
    statuses: list[int] = []
    for ask in given:
        before = None if briefly else target.ok("GET", path)
        status, kind, raw = target.ask("POST", path + ask.wire.path, ask.body, ask.headers)
        check(ask, status, kind, raw)
        statuses.append(status)
        if briefly:
            continue
        after = target.ok("GET", path)
        if status != 200:
            assert after == before
        assert after["failures"] == {}
    good_turn()
    assert target.ok("GET", path)["failures"] == {}
    summary, samples = target.ok("GET", path), target.ok("GET", f"{path}/samples")["samples"]
    assert_samples_match(seen_by(target.fake), samples, num_turns=summary["turns"])
    assert target.fake.alive
    return statuses


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
def test_whatever_is_asked(target: Target, wire: WireUnderTest) -> None:
    seen: list[int] = []

    @configured(150)
    @given(st.lists(asks(wire), min_size=1, max_size=3))
    def run(given: list[Ask]) -> None:
        seen.extend(exchange(target, given))

    run()
    assert {200, 400} <= set(seen), "the strategies are too tame, or too wild"
    assert seen.count(200) > len(seen) / 10


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
def test_every_field_with_every_value(target: Target, wire: WireUnderTest) -> None:
    statuses: list[int] = []
    short = {"max_tokens" if wire.name != "responses" else "max_output_tokens": 3}
    for name in wire.fields:
        given = [
            Ask(wire, to_bytes({**wire.body(Talk()), **short, name: value}), {})
            for one in NASTY
            for value in nasty(one)
        ]
        statuses += exchange(target, given, briefly=True)
    assert statuses.count(200) > 200
    assert statuses.count(400) > 1000


def test_wires_in_one_session(target: Target) -> None:
    @configured(60)
    @given(st.lists(st.one_of(*map(asks, WIRES)), min_size=2, max_size=5))
    def run(given: list[Ask]) -> None:
        exchange(target, given)

    run()


@configured(200)
@given(
    st.sampled_from(["POST", "GET", "DELETE", "PUT", "PATCH", "HEAD"]),
    st.lists(
        st.sampled_from(
            [
                "sessions",
                "x",
                "v1",
                "finish",
                "samples",
                "metrics",
                "chat",
                "completions",
                "messages",
                "%00",
                "..",
                "",
            ]
        ),
        max_size=5,
    ),
    st.sampled_from([b"", b"{}", b"[]", b"\xff", b'{"reward": 1}', b'{"session_id": "x"}']),
)
def test_whatever_route(target: Target, method: str, parts: list[str], body: bytes) -> None:
    status, kind, raw = target.ask(method, "/" + "/".join(parts), body)
    assert status < 500, raw
    if status >= 400 and method != "HEAD":
        assert kind == "application/json"
        assert "error" in json.loads(raw)
    target.ask("DELETE", "/sessions/x")


CREATIONS = st.fixed_dictionaries(
    {},
    optional={
        "session_id": texts,
        "metadata": st.dictionaries(texts, junk, max_size=2) | junk,
        "sampling": st.dictionaries(st.sampled_from(sorted(FIELDS)), junk | numbers, max_size=3) | junk,
        "max_turns": numbers | junk,
        "max_tokens": numbers | junk,
        "deadline_s": numbers | junk,
        "other": junk,
    },
)
FINISHES = st.fixed_dictionaries(
    {}, optional={"reward": numbers | junk, "metadata": st.dictionaries(texts, junk, max_size=2) | junk}
)


def test_whatever_session(target: Target) -> None:
    """Refused, or made: then it takes a turn or says why not, can be finished, read and deleted."""
    made: list[bool] = []

    @configured(150)
    @given(CREATIONS, FINISHES)
    def run(creation: Json, finish: Json) -> None:
        status, _, raw = target.ask("POST", "/sessions", json.dumps(creation).encode())
        assert status in (200, 400), raw
        made.append(status == 200)
        if status == 400:
            assert "error" in json.loads(raw)
            return
        path = f"/sessions/{json.loads(raw)['session_id']}"
        body = json.dumps({"messages": [USER]}).encode()
        status, _, raw = target.ask("POST", f"{path}/v1/chat/completions", body)
        assert status in (200, 400), raw
        num_turns = int(status == 200)
        status, _, raw = target.ask("POST", f"{path}/finish", json.dumps(finish).encode())
        assert status in (200, 400), raw
        assert target.ok("GET", path)["turns"] == num_turns
        assert len(target.ok("GET", f"{path}/samples")["samples"]) == num_turns
        target.ok("DELETE", path)

    run()
    assert 0.1 < sum(made) / len(made) < 0.9
