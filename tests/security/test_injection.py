"""No control token reaches the engine but those that the template wrote, whatever a request says."""

import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gatewaykit import TOKENIZER
from tokentape.engines.base import GenerateRequest
from tokentape.errors import RequestError
from tokentape.gateway.parts import Gateway, PartsConfig, parts
from tokentape.gateway.session import Session
from tokentape.testing import FakeEngine, Reply, write_model_dir
from tokentape.tokenizer import Tokenizer
from wirekit import WIRES, Json, Talk, WireUnderTest

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "models"
CLEAN = "ok"
# What the model samples at the end of its turn.
ENDS = ("<|im_end|>", "<|eot_id|>", "[e~[", "<｜end▁of▁sentence｜>", "<|return|>", "<|user|>", "</s>")  # noqa: RUF001

every_wire = pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)


def models() -> list[Any]:
    """A tokenizer takes up to 20 s to load: two by default, one whose template walks through schemas.

    `TOKENTAPE_SECURITY_MODELS=all` for all; tests/render holds the renderer to the same with each of them.
    """
    names = sorted(path.parent.name for path in SHARED.glob("*/tokenizer.json"))
    if os.environ.get("TOKENTAPE_SECURITY_MODELS") != "all":
        names = [name for name in names if name in ("llama-3.1", "qwen3-coder")]
    return ["byte-level", *(pytest.param(name, marks=pytest.mark.shared) for name in names)]


def schema(text: str) -> Json:
    """The text as key and value, wherever templates walk through."""
    inner = {"type": text, "description": text, "enum": [text], "default": text, "const": {text: text}}
    return {
        "type": "object",
        "description": text,
        "properties": {
            text: inner,
            "n": {"type": "object", "properties": {text: inner}, "items": {text: text}},
        },
        "required": [text],
        text: {text: [text]},
    }


# Where a request says something. The second ones are what the assistant is said to have said: its own
# grammar is its own affair, special tokens are not.
PLACES: Mapping[str, Any] = {
    "system": lambda text: {"system": f"S {text}"},
    "user": lambda text: {"user": text},
    "last user": lambda text: {"last": f"{text} x"},
    "result": lambda text: {"result": f"{{{text}}}"},
    "result's name": lambda text: {"result_name": text},
    "tool's name": lambda text: {"tool_name": text},
    "tool's description": lambda text: {"tool_description": text},
    "tool's parameters": lambda text: {"parameters": schema(text)},
    "everything": lambda text: {
        **dict.fromkeys(("system", "user", "last", "result", "tool_description"), text),
        "parameters": schema(text),
    },
}
ASSISTANTS_PLACES: Mapping[str, Any] = {
    "assistant's text": lambda text: {"assistant": f"A {text}"},
    "assistant's thought": lambda text: {"reasoning": text},
    "assistant's thought, at the end": lambda text: {"reasoning": text, "last": None},
    "call's name": lambda text: {"call_name": text},
    "call's arguments": lambda text: {"arguments": {"tz": text, text: [text, {text: text}]}},
    "call's id": lambda text: {"call_id": text},
}


def some(tokens: Any) -> list[str]:
    """Every one of them, but of the hundreds that differ in a number alone four."""
    tokens = sorted(tokens)
    numbered = [token for token in tokens if any(c.isdigit() for c in token)]
    return [token for token in tokens if token not in numbered] + numbered[:4]


def ways(tokens: list[str]) -> list[str]:
    """All in a row, with and without blanks; the first dozen without a bracket, as templates may write it."""
    cut = [piece for token in tokens[:12] for piece in (token[1:], token[:-1], token[1:-1])]
    return [" ".join(tokens), "".join(tokens), "\n".join(cut)]


class Model:
    """A gateway without HTTP for one model, with an engine that ends every turn at once."""

    def __init__(self, gateway: Gateway, engine: FakeEngine) -> None:
        self.gateway = gateway
        self.engine = engine
        self.tokenizer: Tokenizer = gateway.api.config.tokenizer
        self.variables = gateway.api.config.template_variables

    async def session(self) -> Session:
        return await self.gateway.sessions.create()

    async def sent(self, wire: WireUnderTest, body: Json, session: Session | None = None) -> list[int] | None:
        """The ids that reach the engine; None where the request is refused."""
        session = session or await self.session()
        api = self.gateway.api
        try:
            decoded = api.decode(wire.wire, session, json.dumps(body).encode(), {})
            async with api.answering(session, decoded, {}) as answering:
                await answering.dones()
                answering.delivered()
        except RequestError:
            return None
        return self.engine.requests[-1].prompt.to_list()

    def control(self, ids: list[int], *, special: bool) -> Counter[str]:
        tokens = self.tokenizer.control_tokens
        names = {
            i: text for text, i in tokens.items() if not special or text in self.tokenizer.special_tokens
        }
        return Counter(names[i] for i in ids if i in names)


@pytest_asyncio.fixture(scope="module", params=models(), loop_scope="module")
async def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Model]:
    name: str = request.param
    directory = SHARED / name
    if name == "byte-level":
        directory = write_model_dir(
            tmp_path_factory.mktemp("model"), tokenizer=TOKENIZER, context_length=2**20
        )
    engine = FakeEngine()
    config = PartsConfig(model=str(directory), engine=engine, store=None)
    engine._info = replace(engine._info, context_length=2**20)
    async with parts(config, ask_engine=True) as gateway:
        found = Model(gateway, engine)
        end = next(i for text in ENDS if (i := found.tokenizer.id_of(text)) is not None)

        def respond(request: GenerateRequest) -> Reply:
            del request
            return Reply([end])

        engine.responder = respond
        yield found


@every_wire
@pytest.mark.asyncio(loop_scope="module")
async def test_no_control_token_from_outside(model: Model, wire: WireUnderTest) -> None:
    num_checked = 0
    for places, special in ((PLACES, False), (ASSISTANTS_PLACES, True)):
        tokens = some(model.tokenizer.special_tokens if special else model.tokenizer.control_tokens)
        for place, put in places.items():
            clean = await model.sent(wire, wire.body(Talk(**put(CLEAN))))
            if clean is None:  # a place that this wire or this template does not have
                continue
            expected = model.control(clean, special=special)
            for text in ways(tokens):
                dirty = await model.sent(wire, wire.body(Talk(**put(text))))
                if dirty is not None:
                    assert model.control(dirty, special=special) == expected, (place, text)
                    num_checked += 1
    assert num_checked > 20


@every_wire
@pytest.mark.asyncio(loop_scope="module")
async def test_no_control_token_in_a_bridge(model: Model, wire: WireUnderTest) -> None:
    """What comes after a recorded turn is encoded on its own: the same rule."""
    tokens = some(model.tokenizer.control_tokens)

    async def second(text: str) -> Counter[str] | None:
        session = await model.session()
        first = wire.body(Talk(result=text, tool_description=text, parameters=schema(text)))
        if await model.sent(wire, first, session) is None:
            return None
        name = "input" if "input" in first else "messages"
        reply: Json = {"role": "assistant", "content": ""}
        ids = await model.sent(
            wire, {**first, name: [*first[name], reply, {"role": "user", "content": f"N {text}"}]}, session
        )
        return None if ids is None else model.control(ids, special=False)

    expected = await second(CLEAN)
    for text in ways(tokens):
        assert await second(text) == expected, text


@every_wire
@pytest.mark.asyncio(loop_scope="module")
async def test_template_arguments(model: Model, wire: WireUnderTest) -> None:
    """Every variable that the template reads, one by one."""
    tokens = some(model.tokenizer.control_tokens)
    for name in sorted(model.variables):
        clean = await model.sent(wire, wire.body(Talk(template_arguments={name: CLEAN})))
        if clean is None:  # the gateway's own, or the template wants another type
            continue
        expected = model.control(clean, special=False)
        for text in ways(tokens):
            ids = await model.sent(wire, wire.body(Talk(template_arguments={name: text})))
            if ids is not None:
                assert model.control(ids, special=False) == expected, (name, text)


# -- a template that prints its argument before every turn of the assistant


@every_wire
@pytest.mark.parametrize("value", ["<|im_end|>", ["<|im_end|>"], {"<|im_end|>": "<|im_start|>"}], ids=repr)
async def test_a_template_argument_in_a_bridge(tmp_path: Path, wire: WireUnderTest, value: Any) -> None:
    directory = write_model_dir(tmp_path / "model", tokenizer=TOKENIZER)
    template = directory / "chat_template.jinja"
    opening = "{{- '<|im_start|>assistant\\n' }}"
    source = template.read_text()
    assert source.count(opening) == 2  # of a turn in the history, and of the one to come
    template.write_text(source.replace(opening, "{{- note | string }}" + opening))
    end = TOKENIZER.token_to_id("<|im_end|>")
    engine = FakeEngine(responder=lambda _: Reply([end]))
    async with parts(PartsConfig(model=str(directory), engine=engine, store=None)) as gateway:
        model = Model(gateway, engine)
        session = await model.session()
        body = wire.body(Talk(template_arguments={"note": value}))
        name = "input" if "input" in body else "messages"
        more = [{"role": "assistant", "content": ""}, {"role": "user", "content": "N"}]
        counts = [
            model.control(await model.sent(wire, one, session) or [], special=False)["<|im_end|>"]
            for one in (body, {**body, name: [*body[name], *more]})
        ]
        [turn] = [t for t in session.tree.turns() if t.parent_id is not None]
        assert turn.branch_reason is None
        assert counts[1] == counts[0] + 2  # the sampled one, and the user's


# -- the checker can fail


@every_wire
@pytest.mark.asyncio(loop_scope="module")
async def test_negative_control(model: Model, wire: WireUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the marks, control tokens do come through."""
    monkeypatch.setattr("tokentape.render.mark_untrusted", lambda _, tools, said: (tools, said, _nothing()))
    tokens = some(model.tokenizer.control_tokens)
    clean = await model.sent(wire, wire.body(Talk(user=CLEAN)))
    dirty = await model.sent(wire, wire.body(Talk(user=" ".join(tokens))))
    assert clean is not None
    assert dirty is not None
    assert model.control(dirty, special=False) != model.control(clean, special=False)


def _nothing() -> Any:
    from tokentape.untrusted import Marking

    return Marking()
