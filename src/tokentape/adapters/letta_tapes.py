"""What all Letta adapters of one installation share: connections, tokenizers, sessions. Imports no Letta."""

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import tokentape
from tokentape import RecordedSession, Recorder, Reply, errors
from tokentape.adapters import letta_models as models
from tokentape.adapters.letta_messages import Replies
from tokentape.engines.sglang import SGLangConfig
from tokentape.types import Json

log = logging.getLogger(__name__)
_Key: TypeAlias = tuple[str, str, str]


class Caller(Protocol):
    """What is known of a call: whose it is, and for which model."""

    agent_id: str | None
    agent_tags: list[str] | None
    run_id: str | None
    llm_config: Any
    model_settings: Any


def by_agent(caller: Caller) -> str | None:
    """The session of a call: its agent's. An adapter without an agent has a session of its own."""
    return caller.agent_id


@dataclass(frozen=True, slots=True)
class LettaConfig:
    """How Letta's calls are recorded.

    `models` maps Letta's model names to a model directory or hub id, for tokenizer and chat template; a name
    that is not in it is taken for one itself. `store` is a file that keeps all sessions, None for memory.
    `history` "preserve" keeps each thought where it was sampled, so that a step extends the one before;
    "template" lets the chat template drop it, and starts a branch there. `sampling` is what holds where
    Letta's request says nothing. `session_of` names the session of a call. A call that failed in a way that
    may pass is sent again, at most `max_retries` times. `engine` are fields of `SGLangConfig` (time limits,
    API key), `options` further ones of `tokentape.open`.
    """

    models: Mapping[str, str] = field(default_factory=dict[str, str])
    store: Path | str | None = None
    history: Literal["template", "preserve"] = "preserve"
    tool_format: str = "auto"
    reasoning_format: str = "auto"
    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    session_of: Callable[[Caller], str | None] = by_agent
    max_retries: int = 2
    engine: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Episode:
    """One session, and what Letta forgets of it."""

    def __init__(self, session: RecordedSession, key: _Key, max_retries: int) -> None:
        self.session = session
        self.key = key
        self._max_retries = max_retries
        self._replies = Replies()

    async def chat(self, messages: Sequence[Json], tools: Sequence[Json], fields: Json) -> Reply:
        """Sample the next turn; raises what `RecordedSession.chat` does."""
        sent = self._replies.put_back(messages)
        reply = await self._persist(sent, tools, fields)
        self._replies.add(sent, reply.message)
        return reply

    async def finish(self, reward: float | None, metadata: Mapping[str, Any]) -> Json:
        """Close the session; raises what `RecordedSession.finish` does."""
        summary = await self.session.finish(reward, metadata)
        self._replies = Replies()
        return summary

    async def _persist(self, sent: list[Json], tools: Sequence[Json], fields: Json) -> Reply:
        """Try again, as the OpenAI client would; what failed left nothing in the session but its count."""
        for attempt in range(self._max_retries):
            try:
                return await self.session.chat(sent, tools=tools or None, **fields)
            except errors.TokentapeError as error:
                if not error.retryable:
                    raise
                log.warning("%s: %s; trying again", error.kind, error)
                await asyncio.sleep(min(0.5 * 2**attempt, 8.0))
        return await self.session.chat(sent, tools=tools or None, **fields)


@dataclass(eq=False, slots=True)
class _Open:
    """What is open on one event loop: recorders by model, URL and tool format; episodes by session."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    holders: "list[asyncio.Task[None]]" = field(default_factory=list["asyncio.Task[None]"])
    recorders: dict[_Key, Recorder] = field(default_factory=dict[_Key, Recorder])
    episodes: dict[str, Episode] = field(default_factory=dict[str, Episode])


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
        return await self._episode(session_id).finish(reward, metadata or {})

    async def aclose(self) -> None:
        """Close connections and store. Calls that come later open them again."""
        opened = self._open.pop(asyncio.get_running_loop(), None)
        if opened is not None:
            opened.closing.set()
            await asyncio.gather(*opened.holders)

    async def episode(self, caller: Caller, session_id: str) -> Episode:
        """The episode of a call, opened on demand.

        Raises:
            ConfigError: the model directory or the store cannot be used.
            RequestError: the session began with another model or server: its tokens mean nothing to this one.
        """
        opened, key = self._opened(), self._key(caller)
        async with opened.lock:  # calls that come at the same time open it once
            if session_id not in opened.episodes:
                if key not in opened.recorders:
                    opened.recorders[key] = await self._make(opened, key)
                opened.episodes[session_id] = self._begin(opened.recorders[key], caller, session_id, key)
        episode = opened.episodes[session_id]
        if episode.key != key:
            raise errors.RequestError(
                f"session {session_id!r} began with {' '.join(episode.key)}, and now asks for {' '.join(key)}"
            )
        return episode

    def _key(self, caller: Caller) -> _Key:
        settings, name = caller.model_settings, caller.llm_config.model
        # Only the settings of Letta's SGLang provider have a parser.
        parser = settings.tool_call_parser if hasattr(settings, "tool_call_parser") else None
        model = self.config.models.get(name) or models.model_of(name)
        url = models.endpoint(caller.llm_config.model_endpoint)
        return model, url, models.tool_format(parser) or self.config.tool_format

    def _begin(self, recorder: Recorder, caller: Caller, session_id: str, key: _Key) -> Episode:
        about = {
            "agent_id": caller.agent_id,
            "agent_tags": caller.agent_tags,
            "run_id": caller.run_id,
            "model": caller.llm_config.model,
            "handle": caller.llm_config.handle,
        }
        metadata = {"letta": {name: value for name, value in about.items() if value is not None}}
        session = recorder.session(session_id, metadata=metadata, sampling=self.config.sampling)
        return Episode(session, key, self.config.max_retries)

    async def _make(self, opened: _Open, key: _Key) -> Recorder:
        ready: asyncio.Future[Recorder] = asyncio.get_running_loop().create_future()
        opened.holders.append(asyncio.create_task(self._hold(key, ready, opened.closing)))
        return await ready

    async def _hold(self, key: _Key, ready: "asyncio.Future[Recorder]", closing: asyncio.Event) -> None:
        """Keep a recorder open until `closing`, or until the loop ends, which cancels what still runs."""
        try:
            async with self._recording(*key) as recorder:
                if not ready.done():  # else the call that asked for it was cancelled
                    ready.set_result(recorder)
                    await closing.wait()
        except errors.TokentapeError as error:
            if ready.done():
                raise
            ready.set_exception(error)

    @contextlib.asynccontextmanager
    async def _recording(self, model: str, url: str, tool_format: str) -> AsyncGenerator[Recorder]:
        config = self.config
        with tempfile.TemporaryDirectory(prefix="tokentape-") as scratch:
            directory, is_chatml = await asyncio.to_thread(models.with_template, model, Path(scratch))
            if is_chatml:
                log.warning("%s has no chat template: conversations are rendered as ChatML", model)
            async with tokentape.open(
                model=directory,
                engine=SGLangConfig(url, **config.engine),
                store=config.store,
                history=config.history,
                tool_format=tool_format,
                reasoning_format=config.reasoning_format,
                **config.options,
            ) as recorder:
                yield recorder

    def _episode(self, session_id: str) -> Episode:
        episode = self._opened().episodes.get(session_id)
        if episode is None:
            raise errors.NotFound(f"no session {session_id!r} in this process")
        return episode

    def _opened(self) -> _Open:
        """What is open on the running loop: connections cannot move to another."""
        return self._open.setdefault(asyncio.get_running_loop(), _Open())
