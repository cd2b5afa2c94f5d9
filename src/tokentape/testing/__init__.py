"""Fakes to test against, public: no GPU, no download, no mocks.

    FakeSGLang             a server that speaks SGLang's protocol on a real socket, with faults on demand
    FakeEngine             an in-process `engines.base.Engine` that answers what it is told
    Reply, Fault           what a fake answers, and what goes wrong with it
    pseudo_logprob         the log-probability that a fake gives a token; `pseudo_top` those beside it,
                           `pseudo_support` what truncation left, `pseudo_experts` where it was routed
    byte_level_tokenizer   a small tokenizer on which most texts have several encodings
    write_model_dir        a model directory (tokenizer and chat template, no weights) for `--model`

A test in five lines:

    async with FakeSGLang(byte_level_tokenizer()) as fake:
        fake.script(Reply(ids=[40, 41, 257]), Fault("disconnect", after=1))
        engine = SGLangEngine(SGLangConfig(fake.url), vocab_size=fake.vocab_size)
        ...
        assert fake.requests[0].input_ids == prompt_ids
"""

from tokentape.testing.engine import FakeEngine
from tokentape.testing.model import byte_level_tokenizer, write_model_dir
from tokentape.testing.script import (
    Fault,
    FaultKind,
    Reply,
    pseudo_experts,
    pseudo_logprob,
    pseudo_support,
    pseudo_top,
)
from tokentape.testing.sglang import FakeSGLang, ReceivedRequest

__all__ = [
    "FakeEngine",
    "FakeSGLang",
    "Fault",
    "FaultKind",
    "ReceivedRequest",
    "Reply",
    "byte_level_tokenizer",
    "pseudo_experts",
    "pseudo_logprob",
    "pseudo_support",
    "pseudo_top",
    "write_model_dir",
]
