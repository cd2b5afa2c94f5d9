"""A drop-in for Letta's `SGLangNativeAdapter` whose every token is recorded. Works with letta 0.16.7 and 0.16.8.

    Letta's agent loop ─▶ SGLangNativeAdapter.invoke_llm ─▶ Session.chat ─▶ SGLang /generate
          turns ◀─ output_ids, output_token_logprobs ◀─┘         └─▶ tapes: Tapes.samples(agent_id)

One line turns it on, before the server starts or the agent loop is used:

    tapes = tokentape.adapters.letta.install(store="rollouts.sqlite")

An agent is a session: the prompt of each call extends what the model saw and sampled before, across the calls
of a step and across steps. Where Letta really changes history (compaction, edited memory, other tools) a
branch starts and says why. Importing this module imports Letta, which tokentape itself does not need.
"""

# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false, reportUntypedBaseClass=false
# (Letta is not installed where this is checked: it lives in an environment of its own)
import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from letta import errors as letta_errors
from letta.adapters.simple_llm_request_adapter import SimpleLLMRequestAdapter
from letta.helpers.datetime_helpers import get_utc_timestamp_ns
from letta.log import get_logger
from letta.schemas.letta_message_content import ReasoningContent, TextContent
from letta.schemas.message import Message
from letta.schemas.openai.chat_completion_response import (
    ChatCompletionResponse,
    ChatCompletionTokenLogprob,
    Choice,
    ChoiceLogprobs,
    ToolCall,
    UsageStatistics,
    UsageStatisticsPromptTokenDetails,
)
from letta.schemas.openai.chat_completion_response import Message as ChoiceMessage
from letta.schemas.usage import LettaUsageStatistics

import tokentape
from tokentape import errors
from tokentape.adapters.letta_messages import Replies, chat_messages, chat_tools
from tokentape.types import Json

logger = get_logger(__name__)

# How Letta names a kind of tool call in `model_settings.tool_call_parser` → how tokentape does.
TOOL_FORMATS: Mapping[str, str] = {"qwen25": "hermes", "qwen": "hermes", "hermes": "hermes"}
# Not for the engine: what Letta does itself, and what a session does in any case.
_LETTAS_OWN = ("messages", "tools", "model", "stream", "stream_options", "logprobs", "parallel_tool_calls")
_ERRORS: Sequence[tuple[type[errors.TokentapeError], type[Exception]]] = (
    (errors.Unauthorized, letta_errors.LLMAuthenticationError),
    (errors.NotFound, letta_errors.LLMNotFoundError),
    (errors.RequestError, letta_errors.LLMBadRequestError),
    (errors.EngineTimeout, letta_errors.LLMTimeoutError),
    (errors.EngineUnavailable, letta_errors.LLMConnectionError),
    (errors.EngineDisconnected, letta_errors.LLMConnectionError),
    (errors.EngineError, letta_errors.LLMServerError),
    (errors.TokentapeError, letta_errors.LLMServerError),
)
"""tokentape's error → Letta's, the first that fits. Context overflow and configuration are made by hand."""


def by_agent(adapter: "SGLangNativeAdapter") -> str | None:
    """The session of a call: its agent's. An adapter without an agent has a session of its own."""
    return adapter.agent_id


@dataclass(frozen=True, slots=True)
class LettaConfig:
    """How Letta's calls are recorded.

    `models` maps Letta's model names to a model directory or hub id, for tokenizer and chat template; a name
    that is not in it is taken for one itself. `store` is a file that keeps all sessions, None for memory.
    `history` "preserve" keeps each thought where it was sampled, so that a step extends the one before;
    "template" lets the chat template drop it, and starts a branch there. `sampling` is what holds where
    Letta's request says nothing. `session_of` names the session of a call.
    """

    models: Mapping[str, str] = field(default_factory=dict[str, str])
    store: Path | str | None = None
    history: str = "preserve"
    tool_format: str = "auto"
    reasoning_format: str = "auto"
    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    session_of: "Callable[[SGLangNativeAdapter], str | None]" = by_agent


class _Episode:
    """One session, and what Letta forgets of it."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.replies = Replies()

    async def chat(self, messages: Sequence[Json], tools: Sequence[Json], fields: Json) -> Any:
        sent = self.replies.put_back(messages)
        reply = await self.session.chat(sent, tools=tools or None, **fields)
        self.replies.add(sent, reply.message)
        return reply


@dataclass(eq=False, slots=True)
class _Open:
    """What is open on one event loop: recorders by model, endpoint and tool format; episodes by session id."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    recorders: dict[tuple[str, str, str], Any] = field(default_factory=dict[tuple[str, str, str], Any])
    episodes: dict[str, _Episode] = field(default_factory=dict[str, _Episode])


class Tapes:
    """All that the adapters of one installation share: connections, tokenizers, sessions."""

    def __init__(self, config: LettaConfig) -> None:
        self.config = config
        self._open: WeakKeyDictionary[asyncio.AbstractEventLoop, _Open] = WeakKeyDictionary()

    async def samples(self, session_id: str) -> list[Json]:
        """The tapes of a session (an agent's id, unless configured otherwise): token ids, mask, and so on.

        Raises:
            NotFound: nothing was sampled for it since the process started.
        """
        return await self._episode(session_id).session.samples()

    async def finish(
        self, session_id: str, *, reward: float | None = None, metadata: Mapping[str, Any] | None = None
    ) -> Json:
        """Close a session with its reward, and return its summary. The agent's next call will be refused.

        Raises:
            NotFound: nothing was sampled for it since the process started.
        """
        return await self._episode(session_id).session.finish(reward=reward, metadata=metadata or {})

    async def aclose(self) -> None:
        """Close connections and store. Calls that come later open them again."""
        opened = self._open.pop(asyncio.get_running_loop(), None)
        if opened is not None:
            await opened.stack.aclose()

    async def episode(self, adapter: "SGLangNativeAdapter", session_id: str | None) -> _Episode:
        """The episode of a call, opened on demand.

        Raises:
            ConfigError: the model directory or the store cannot be used.
        """
        opened = self._opened()
        if session_id is not None and session_id in opened.episodes:
            return opened.episodes[session_id]
        recorder = await self._recorder(opened, adapter)
        about = {
            "agent_id": adapter.agent_id,
            "agent_tags": adapter.agent_tags,
            "run_id": adapter.run_id,
            "model": adapter.llm_config.model,
            "handle": adapter.llm_config.handle,
        }
        metadata = {"letta": {key: value for key, value in about.items() if value is not None}}
        session = recorder.session(
            session_id=session_id, metadata=metadata, sampling=dict(self.config.sampling)
        )
        return opened.episodes.setdefault(session.session_id, _Episode(session))

    async def _recorder(self, opened: _Open, adapter: "SGLangNativeAdapter") -> Any:
        name = adapter.llm_config.model
        model = self.config.models.get(name) or _model_of(name)
        tool_format = _tool_format(adapter.model_settings) or self.config.tool_format
        key = model, _endpoint(adapter.llm_config.model_endpoint), tool_format
        async with opened.lock:  # calls that come at the same time open it once
            if key not in opened.recorders:
                opened.recorders[key] = await opened.stack.enter_async_context(
                    tokentape.open(
                        model=model,
                        engine=key[1],
                        store=self.config.store,
                        history=self.config.history,
                        tool_format=tool_format,
                        reasoning_format=self.config.reasoning_format,
                    )
                )
        return opened.recorders[key]

    def _episode(self, session_id: str) -> _Episode:
        episode = self._opened().episodes.get(session_id)
        if episode is None:
            raise errors.NotFound(f"no session {session_id!r} in this process")
        return episode

    def _opened(self) -> _Open:
        """What is open on the running loop: connections cannot move to another."""
        return self._open.setdefault(asyncio.get_running_loop(), _Open())


class SGLangNativeAdapter(SimpleLLMRequestAdapter):
    """Letta's adapter of this name, token-exact: same arguments, same attributes after a call.

    Beyond those, after a call: `reply` (tokentape's, with the turn), `prompt_ids` int[P], all that the engine
    was sent, `bridge_ids`, the end of it that is new since the turn before (all of it at a branch), and
    `session_id`. Before the first call, and after one that failed, none of it is set.
    """

    tapes: ClassVar[Tapes] = Tapes(LettaConfig())

    def __init__(self, *args: Any, model_settings: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_settings = model_settings
        self.session_id: str | None = None
        self._forget()

    async def invoke_llm(
        self,
        request_data: Json,
        messages: list[Any],
        tools: list[Any],
        use_assistant_message: bool,
        requires_approval_tools: list[str] = [],  # noqa: B006  # Letta's own signature
        step_id: str | None = None,
        actor: Any = None,
    ) -> AsyncGenerator[None]:
        """Sample one turn, then yield None once. What Letta put into `request_data` has the last word.

        Raises:
            ContextWindowExceededError: the conversation does not fit: Letta compacts it and calls again.
            LLMError: one of Letta's, by what happened; tokentape's error is its cause.
        """
        self._forget()
        self.request_data = request_data
        try:
            chat = request_data.get("messages") or _letta_messages(messages)
            episode = await self.tapes.episode(self, self.session_id or self.tapes.config.session_of(self))
            self.session_id = episode.session.session_id
            reply = await episode.chat(
                chat_messages(chat),
                chat_tools(request_data.get("tools") or tools or ()),
                _fields(request_data),
            )
        except errors.TokentapeError as error:
            raise letta_error(error) from error
        self._remember(reply)
        self.log_provider_trace(step_id=step_id, actor=actor)
        logger.info(
            "tokentape: session %s turn %s: %d prompt tokens (%d new), %d sampled, %d tool calls, %s%s",
            *(self.session_id, reply.turn.turn_id, len(reply.prompt_ids), len(reply.turn.prompt)),
            *(len(reply.completion_ids), len(self.tool_calls), self.finish_reason),
            f", branch: {reply.turn.branch_reason}" if reply.turn.branch_reason else "",
        )
        yield None

    def supports_token_streaming(self) -> bool:
        """Never: a turn is delivered when it is recorded."""
        return False

    def _forget(self) -> None:
        """Nothing of an earlier call may be taken for this one's."""
        self.reply: Any = None
        self.prompt_ids: list[int] | None = None
        self.bridge_ids: list[int] | None = None
        self.message_id = self.request_data = self.response_data = self.chat_completions_response = None
        self.reasoning_content = self.content = self.tool_call = self.logprobs = self._finish_reason = None
        self.tool_calls = []
        self.output_ids = self.output_token_logprobs = self.llm_request_finish_timestamp_ns = None
        self.usage = LettaUsageStatistics()

    def _remember(self, reply: Any) -> None:
        self.llm_request_finish_timestamp_ns = get_utc_timestamp_ns()
        self.reply = reply
        self.prompt_ids = reply.prompt_ids
        self.bridge_ids = reply.turn.prompt.ids.tolist()
        self.output_ids = list(reply.completion_ids)
        pairs = list(zip(reply.logprobs, self.output_ids, strict=True))
        self.output_token_logprobs = [[logprob, token_id, None] for logprob, token_id in pairs]
        response = self.chat_completions_response = _completion(reply, pairs, self.llm_config.model)
        message = response.choices[0].message
        thought = message.reasoning_content
        self.reasoning_content = [ReasoningContent(reasoning=thought, is_native=True)] if thought else None
        text = [TextContent(text=message.content)] if message.content else []
        self.content = [*(self.reasoning_content or []), *text] or None  # Letta persists `content` alone
        self.tool_calls = list(message.tool_calls or [])
        self.tool_call = self.tool_calls[0] if self.tool_calls else None
        self.logprobs = response.choices[0].logprobs
        self.usage = LettaUsageStatistics(
            step_count=1,
            prompt_tokens=response.usage.prompt_tokens,
            completion_tokens=response.usage.completion_tokens,
            total_tokens=response.usage.total_tokens,
            cached_input_tokens=reply.usage.num_cached,
        )
        self.response_data = _trace(reply, response, self.session_id)


def install(config: LettaConfig | None = None, **options: Any) -> Tapes:
    """Make Letta take this adapter where it would take its own; `options` are the fields of `LettaConfig`.

    Call it before agents run, in the process that runs them. What was installed before is no longer used.
    """
    from letta.adapters import sglang_native_adapter
    from letta.agents import letta_agent_v3

    tapes = Tapes(config or LettaConfig(**options))
    adapter = type("SGLangNativeAdapter", (SGLangNativeAdapter,), {"tapes": tapes})
    letta_agent_v3.SGLangNativeAdapter = sglang_native_adapter.SGLangNativeAdapter = adapter
    return tapes


def letta_error(error: errors.TokentapeError) -> Exception:
    """The error of Letta's that says the same. Its agent loop compacts on `ContextWindowExceededError`."""
    details = {"type": error.kind, "status": error.status, "retryable": error.retryable}
    if isinstance(error, errors.ContextOverflow):
        return letta_errors.ContextWindowExceededError(str(error), details=details)
    if isinstance(error, errors.ConfigError):
        return letta_errors.LettaConfigurationError(str(error))
    kind = next(theirs for ours, theirs in _ERRORS if isinstance(error, ours))
    return kind(f"{error.kind}: {error}", details=details)


def _completion(reply: Any, pairs: Sequence[tuple[float, int]], model: str) -> ChatCompletionResponse:
    said = reply.message
    tokens = [
        ChatCompletionTokenLogprob(token=str(token_id), logprob=logprob, bytes=None, top_logprobs=[])
        for logprob, token_id in pairs
    ]
    message = ChoiceMessage(
        role="assistant",
        content=(said.get("content") or "").strip() or None,
        reasoning_content=said.get("reasoning_content") or None,
        tool_calls=[ToolCall.model_validate(call) for call in said.get("tool_calls") or ()] or None,
    )
    usage = reply.usage
    return ChatCompletionResponse(
        id=reply.turn.turn_id,
        created=int(time.time()),
        model=model,
        choices=[
            Choice(
                index=0,
                finish_reason=reply.finish_reason,
                message=message,
                logprobs=ChoiceLogprobs(content=tokens),
            )
        ],
        usage=UsageStatistics(
            prompt_tokens=usage.num_prompt,
            completion_tokens=usage.num_completion,
            total_tokens=usage.num_prompt + usage.num_completion,
            prompt_tokens_details=UsageStatisticsPromptTokenDetails(cached_tokens=usage.num_cached),
        ),
    )


def _trace(reply: Any, response: ChatCompletionResponse, session_id: str | None) -> Json:
    """What Letta's provider trace keeps of a call: the reply, and every token that was new in it."""
    turn = reply.turn
    return {
        **response.model_dump(mode="json", exclude={"choices": {"__all__": {"logprobs"}}}),
        "tokentape": {
            "session_id": session_id,
            "turn_id": turn.turn_id,
            "parent_turn_id": turn.parent_id,
            "branch_reason": turn.branch_reason,
            "bridge_ids": turn.prompt.ids.tolist(),
            "completion_ids": list(reply.completion_ids),
            "logprobs": list(reply.logprobs),
            "weight_versions": [[span.version, span.start, span.end] for span in turn.versions],
            "stop_id": turn.stop_id,
            "parse": {"status": turn.parse_status, "attempts": list(turn.attempts)},
        },
    }


def _fields(request_data: Json) -> Json:
    """The fields of Chat Completions that a call asks for; what is None is not asked for."""
    fields = {
        key: value for key, value in request_data.items() if key not in _LETTAS_OWN and value is not None
    }
    extra = dict(fields.pop("extra_body", {}))  # as the OpenAI client sends it: fields like the others
    if "chat_template_args" in extra:  # another server's name for it
        extra["chat_template_kwargs"] = extra.pop("chat_template_args")
    return {**fields, **extra}


def _letta_messages(messages: list[Any]) -> list[Any]:
    """Letta's own messages as Letta itself writes them (parallel results, approvals); others as they are."""
    if messages and all(isinstance(message, Message) for message in messages):
        return Message.to_openai_dicts_from_list(messages)
    return messages


def _endpoint(url: str | None) -> str:
    return (url or "").rstrip("/").removesuffix("/v1").rstrip("/")


def _model_of(name: str) -> str:
    """The tokenizer's directory or hub id: of `sglang//models/qwen` it is `/models/qwen`, as with Letta."""
    before, slashes, path = name.partition("//")
    return f"/{path}" if before and slashes and path else name


def _tool_format(model_settings: Any) -> str | None:
    """The tool format that the agent's settings name, None where they name none.

    Raises:
        ConfigError: it is none that tokentape knows.
    """
    name = model_settings.tool_call_parser if hasattr(model_settings, "tool_call_parser") else None
    if not name:
        return None
    if name not in TOOL_FORMATS:
        known = ", ".join(sorted(TOOL_FORMATS))
        raise errors.ConfigError(f"tool_call_parser {name!r} is not supported: choose from {known}")
    return TOOL_FORMATS[name]
