"""`--template-arg`: arguments of the chat template for agents that cannot send them."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gatewaykit import USER, Gateway, gateway_for
from tokentape.errors import ConfigError
from tokentape.testing import FakeSGLang, Reply

EMPTY_THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"

ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat/completions", {"messages": [USER], "max_tokens": 8}),
    "messages": ("messages", {"messages": [USER], "max_tokens": 8}),
    "responses": ("responses", {"input": "hello world"}),
}


async def prompt_of(gateway: Gateway, fake: FakeSGLang, wire: str, tokenizer: Tokenizer, **more: Any) -> str:
    fake.script(Reply([*tokenizer.encode("Yes.").ids, tokenizer.token_to_id("<|im_end|>")]))
    path, body = ASKED[wire]
    session_id = await gateway.create()
    answer = await gateway.request(
        "POST", f"/sessions/{session_id}/v1/{path}", {"model": "policy", **body, **more}
    )
    assert answer.status == 200, answer
    return tokenizer.decode(fake.requests[-1].input_ids, skip_special_tokens=False)


@pytest.mark.parametrize("wire", ASKED)
async def test_every_request_has_them(
    wire: str, tmp_path: Path, model_dir: Path, tokenizer: Tokenizer
) -> None:
    async with (
        FakeSGLang(tokenizer, context_length=8192) as fake,
        gateway_for(
            fake.url, model_dir, tmp_path / "s.sqlite", template_arguments={"enable_thinking": False}
        ) as gateway,
    ):
        assert (await prompt_of(gateway, fake, wire, tokenizer)).endswith(EMPTY_THOUGHT)
        own = {"chat_template_kwargs": {"enable_thinking": True}}  # the request's word goes before
        assert "<think>" not in await prompt_of(gateway, fake, wire, tokenizer, **own)


async def test_without_any_the_template_decides(
    tmp_path: Path, model_dir: Path, tokenizer: Tokenizer
) -> None:
    async with (
        FakeSGLang(tokenizer, context_length=8192) as fake,
        gateway_for(fake.url, model_dir, tmp_path / "s.sqlite") as gateway,
    ):
        assert "<think>" not in await prompt_of(gateway, fake, "chat", tokenizer)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enable_thinkin": False}, "reads no such variable; it reads .*enable_thinking"),
        ({"tools": []}, "own"),
    ],
)
async def test_one_that_has_no_effect_is_refused(
    arguments: Any, words: str, tmp_path: Path, model_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        async with gateway_for(
            "http://127.0.0.1:9", model_dir, tmp_path / "s.sqlite", template_arguments=arguments
        ):
            pass
