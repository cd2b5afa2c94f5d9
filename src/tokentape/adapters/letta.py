"""A drop-in for Letta's `SGLangNativeAdapter` that records every token. For letta 0.16.7 and 0.16.8.

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
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

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

from tokentape import Reply, errors
from tokentape.adapters.letta_messages import chat_messages, chat_tools
from tokentape.adapters.letta_tapes import LettaConfig, Tapes
from tokentape.types import Json

__all__ = ["LettaConfig", "SGLangNativeAdapter", "Tapes", "install", "letta_error"]

logger = get_logger(__name__)

# Not asked of tokentape. Letta itself runs only the first call where it wants one at most: to stop the model
# there would cut calls that have `</tool_call>` in an argument, and never train the end of such a turn.
_LETTAS_OWN = ("messages", "tools", "model", "stream", "stream_options", "parallel_tool_calls")
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


class SGLangNativeAdapter(SimpleLLMRequestAdapter):
    """Letta's adapter of this name, token-exact: same arguments, same attributes after a call.

    Beyond those, after a call: `reply` (tokentape's, with the turn), `prompt_ids` int[P], all that the engine
    was sent, and `bridge_ids`, the end of it that is new since the turn before (all of it at a branch).
    Before the first call, and after one that failed, they are None. `session_id` is set by the first call.
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
            named = self.session_id or self.tapes.config.session_of(self)
            self.session_id = named or f"letta-{uuid.uuid4().hex}"
            episode = await self.tapes.episode(self, self.session_id)
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
        self.reply: Reply | None = None
        self.prompt_ids: list[int] | None = None
        self.bridge_ids: list[int] | None = None
        self.message_id = self.request_data = self.response_data = self.chat_completions_response = None
        self.reasoning_content = self.content = self.tool_call = self.logprobs = self._finish_reason = None
        self.tool_calls = []
        self.output_ids = self.output_token_logprobs = self.llm_request_finish_timestamp_ns = None
        self.usage = LettaUsageStatistics()

    def _remember(self, reply: Reply) -> None:
        self.llm_request_finish_timestamp_ns = get_utc_timestamp_ns()
        self.reply = reply
        self.prompt_ids = reply.prompt_ids
        self.bridge_ids = reply.turn.prompt.ids.tolist()
        self.output_ids = list(reply.completion_ids)
        pairs = zip(reply.logprobs, self.output_ids, strict=True)
        self.output_token_logprobs = [[logprob, token_id, None] for logprob, token_id in pairs]
        response = self.chat_completions_response = _completion(reply, self.llm_config.model)
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
    adapter = type("SGLangNativeAdapter", (SGLangNativeAdapter,), {"tapes": tapes, "__module__": __name__})
    letta_agent_v3.SGLangNativeAdapter = sglang_native_adapter.SGLangNativeAdapter = adapter
    return tapes


def letta_error(error: errors.TokentapeError) -> Exception:
    """The error of Letta's that says the same. Its agent loop compacts on `ContextWindowExceededError`."""
    details = {"type": error.kind, "status": error.status, "retryable": error.retryable}
    if isinstance(error, errors.ContextOverflow):
        return letta_errors.ContextWindowExceededError(str(error), details=details)
    if isinstance(error, errors.ConfigError):
        return letta_errors.LettaConfigurationError(str(error))
    kind: Any = next(theirs for ours, theirs in _ERRORS if isinstance(error, ours))
    return kind(f"{error.kind}: {error}", details=details)


def _completion(reply: Reply, model: str) -> ChatCompletionResponse:
    said, asked = reply.message, reply.body["choices"][0]["logprobs"]
    others = [entry["top_logprobs"] for entry in asked["content"]] if asked else None
    tokens = [
        ChatCompletionTokenLogprob(
            token=str(token_id), logprob=logprob, bytes=None, top_logprobs=others[at] if others else []
        )
        for at, (token_id, logprob) in enumerate(zip(reply.completion_ids, reply.logprobs, strict=True))
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


def _trace(reply: Reply, response: ChatCompletionResponse, session_id: str | None) -> Json:
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
    if not fields.get("top_logprobs"):
        fields.pop("logprobs", None)  # the reply has those of the sampled tokens in any case
    return {**fields, **extra}


def _letta_messages(messages: list[Any]) -> list[Any]:
    """Letta's own messages as Letta itself writes them (parallel results, approvals); others as they are."""
    if messages and all(isinstance(message, Message) for message in messages):
        return Message.to_openai_dicts_from_list(messages)
    return messages
