"""An engine: is it there, is it what it should be, do log-probabilities come?"""

import contextlib
import re
import uuid
from pathlib import Path

from tokentape.doctor.checks import Check, Checks, Status
from tokentape.doctor.model import HELLO, Model
from tokentape.doctor.same import other_directory, other_tokenizer
from tokentape.engines.base import EngineInfo, GenerateRequest, GenerateResult
from tokentape.engines.sglang import SGLangConfig, SGLangEngine
from tokentape.errors import (
    ConfigError,
    EngineError,
    EngineFailed,
    EngineProtocolError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    TokentapeError,
    one_line,
)
from tokentape.render import Frame
from tokentape.types import Prompt, Sampling

_TESTED = "0.5.23"
_OLDEST = (0, 5)
_TIMEOUT_S = 30.0
# In the order of the tree: the first that fits is the nearest.
_ADVICE: tuple[tuple[type[TokentapeError], str], ...] = (
    (EngineUnavailable, "start SGLang there, or correct --engine: python -m sglang.launch_server --port …"),
    (EngineTimeout, "it takes connections and does not answer: look at its log; restart it if it hangs"),
    (EngineRejected, "--engine is the URL of SGLang's own server without /v1; --engine-api-key is its key"),
    (EngineProtocolError, "it is not SGLang, or one that this tokentape does not know: see docs/engines.md"),
    (EngineFailed, "look at the engine's log"),
    (EngineError, "look at the engine's log"),
    (ConfigError, "correct --engine: http://HOST:PORT"),
)


async def check_engine(url: str, model: Model | None, api_key: str | None = None) -> list[Check]:
    """Everything about the engine at a URL; a few tokens are sampled where the model is known."""
    checks = Checks(f"engine {url}")
    try:
        config = SGLangConfig(
            url, api_key=api_key, first_token_timeout_s=_TIMEOUT_S, total_timeout_s=2 * _TIMEOUT_S
        )
        engine = SGLangEngine(config, vocab_size=model.vocab_size if model is not None else 1)
        async with contextlib.aclosing(engine):
            info = await engine.info()
            checks.ok("reachable", "a router" if engine.routed else "one server")
            await _version(checks, engine)
            _weights(checks, info)
            _model(checks, info, model)
            _context(checks, info, model)
            _defaults(checks, info)
            if model is None:
                advice = "give --model, if log-probabilities and tokenizer are to be checked"
                checks.warn("log-probabilities", "not checked: there is no model that could be used", advice)
                return checks.found
            await _tokenizer(checks, engine, model)
            if any(one.status is Status.WRONG for one in checks.found if one.name in ("model", "tokenizer")):
                found = "not checked: an id that the engine does not know would kill it"
                checks.warn("log-probabilities", found, "give the --model that it serves, then ask again")
                return checks.found
            await _logprobs(checks, engine, model)
    except TokentapeError as error:
        checks.wrong("reachable", one_line(error), _advice(error))
    return checks.found


def _advice(error: TokentapeError) -> str:
    return next(
        (advice for kind, advice in _ADVICE if isinstance(error, kind)), "see docs/troubleshooting.md"
    )


async def _version(checks: Checks, engine: SGLangEngine) -> None:
    about = await engine.about()
    version = about.version if about is not None else None
    if version is None:
        checks.ok("version", "it does not say")
        return
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    dtype = f", computes in {about.dtype}" if about is not None and about.dtype not in (None, "auto") else ""
    if numbers and version[0].isdigit() and numbers < _OLDEST:
        advice = f"update SGLang: {_TESTED} is what tokentape is tested with"
        checks.warn("version", f"{version}{dtype}", advice)
    else:
        checks.ok("version", f"{version}{dtype} (tested with {_TESTED})")


def _weights(checks: Checks, info: EngineInfo) -> None:
    if info.differs:
        each = ", ".join(f"{server}: {name}" for server, name in info.weight_versions.items())
        advice = "update all of its servers to the same weights; until then no name holds for all"
        checks.wrong("weights", f"the router's servers differ: {each}", advice)
    elif info.weight_version is None:
        advice = "name them when they change: POST /weights (docs/weights.md); else staleness is not known"
        checks.warn("weights", "it does not say which", advice)
    else:
        checks.ok("weights", f"version {info.weight_version!r}")


def _model(checks: Checks, info: EngineInfo, model: Model | None) -> None:
    """Two directories can be compared; of two names one can only say that they differ."""
    served = info.model
    if served is None or model is None:
        checks.ok("model", served or "it does not say")
        return
    there = Path(served)
    if not (there / "tokenizer.json").is_file():
        alike = there.name.lower() == model.directory.name.lower() or _of_hub(model.directory) == served
        if alike:
            checks.ok("model", served)
        else:
            advice = "be sure that both are the same model; the checks of tokenizer and ids below help"
            checks.warn("model", f"it serves {served}, --model is {model.directory}", advice)
        return
    if (differs := other_directory(there, model.directory)) is not None:
        checks.wrong("model", differs, f"give --model {served}")
    else:
        checks.ok("model", f"{served}: the same tokenizer, the same {model.sizes.vocab_size} ids")


def _of_hub(directory: Path) -> str | None:
    """The hub id of a directory in the hub's cache, as models--Qwen--Qwen3-8B/snapshots/HASH."""
    part = next((part for part in directory.parts if part.startswith("models--")), None)
    return part.removeprefix("models--").replace("--", "/") if part else None


def _context(checks: Checks, info: EngineInfo, model: Model | None) -> None:
    mine, theirs = model.sizes.context_length if model is not None else None, info.context_length
    if theirs is None and mine is None:
        checks.warn("context", "neither engine nor model says how long", "serve with --context-length N")
    elif theirs is None:
        checks.ok("context", f"it does not say; the model's configuration: {mine:,} tokens")
    elif mine is not None and theirs > mine:
        advice = "the model was not made for more than its own: start the engine with --context-length"
        checks.warn("context", f"{theirs:,} tokens, the model's configuration says {mine:,}", advice)
    else:
        less = f" of the model's {mine:,}" if mine is not None and theirs < mine else ""
        checks.ok("context", f"{theirs:,} tokens{less}")


def _defaults(checks: Checks, info: EngineInfo) -> None:
    if info.sampling != Sampling():
        advice = "start it without --preferred-sampling-params, if requests are to mean what they say"
        checks.warn("sampling defaults", "it adds parameters to requests that do not name them", advice)


async def _tokenizer(checks: Checks, engine: SGLangEngine, model: Model) -> None:
    differs = await other_tokenizer(engine, model.renderer.tokenizer)
    if differs is None:
        checks.ok("tokenizer", "makes the same ids of the same texts")
    elif not differs:
        checks.ok("tokenizer", "it has no /tokenize: not compared")
    else:
        checks.wrong("tokenizer", differs, "give the --model that the engine serves")


async def _logprobs(checks: Checks, engine: SGLangEngine, model: Model) -> None:
    prompt = model.renderer.render(Frame(), [HELLO]).run
    request = GenerateRequest(
        rid=f"doctor-{uuid.uuid4().hex}",
        prompt=Prompt(prompt),
        sampling=Sampling(max_tokens=4, temperature=1.0),
        stream=True,
    )
    result: GenerateResult | None = None
    try:
        async with contextlib.aclosing(engine.generate(request)) as said:
            async for event in said:
                result = event if isinstance(event, GenerateResult) else result
    except TokentapeError as error:
        checks.wrong("log-probabilities", one_line(error), _advice(error))
        return
    if result is None or not result.completion_ids:
        checks.wrong("log-probabilities", "nothing was sampled", "look at the engine's log")
        return
    versions = ", ".join(repr(span.version) for span in result.versions)
    found = f"{len(result.completion_ids)} tokens sampled, one finite log-probability each, by {versions}"
    checks.ok("log-probabilities", found)
