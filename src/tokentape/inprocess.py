"""The same core without HTTP, for authors of environments: prompts in, tapes out, in one process.

    async with tokentape.open(model="Qwen/Qwen3-8B", engine="http://127.0.0.1:30000") as tape:
        session = tape.session(metadata={"task": "greet"})
        reply = await session.chat(messages, tools=tools)     # or an agent, with session.openai()
        await session.finish(reward=1.0)
        rows = await session.samples()

A session takes its turns on the event loop that opened the recorder.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import msgspec

from tokentape.engines.base import Engine
from tokentape.engines.sglang import SGLangConfig
from tokentape.errors import ConfigError, RequestError, SessionClosed, SessionExists
from tokentape.export.samples import samples, stored_samples, write_parquet
from tokentape.formats import Format
from tokentape.gateway import chat, control
from tokentape.gateway.credit import Credit
from tokentape.gateway.fields import session_sampling
from tokentape.gateway.parts import Gateway, GatewayConfig, PartsConfig, parts
from tokentape.gateway.sessions import Session, new_session_id
from tokentape.gateway.turn import Capture
from tokentape.render import History
from tokentape.store import SessionRecord
from tokentape.stores import is_shared
from tokentape.tape import Turn
from tokentape.types import Json, Prompt, Usage

if TYPE_CHECKING:
    from anthropic import Anthropic, AsyncAnthropic
    from openai import AsyncOpenAI, OpenAI

    from tokentape.clients import InProcess

# Two calls of one conversation are two turns, also while the first one runs: neither is the other's retry.
_FIRST_TRY = {"x-stainless-retry-count": "0"}


@dataclass(frozen=True, slots=True)
class Reply:
    """A turn, or with `n` above 1 several of one prompt; what is not said of `turns` is of the first.

    `body` is the whole answer as OpenAI Chat Completions has it, `prompt` all that the engine was sent.
    """

    body: Json
    turns: tuple[Turn, ...]
    prompt: Prompt
    usage: Usage

    @property
    def message(self) -> Json:
        """The assistant's message, to append to `messages`: content, reasoning_content, tool_calls."""
        message: Json = self.body["choices"][0]["message"]
        return {name: value for name, value in message.items() if name != "refusal"}

    @property
    def turn(self) -> Turn:
        """The committed turn."""
        return self.turns[0]

    @property
    def prompt_ids(self) -> list[int]:
        """int[P]: all that the engine was sent."""
        return self.prompt.to_list()

    @property
    def completion_ids(self) -> list[int]:
        """int[C]: all that it sampled, the stop token included."""
        return self.turn.completion.ids.tolist()

    @property
    def logprobs(self) -> list[float]:
        """float[C], nats: one for each of `completion_ids`."""
        return self.turn.logprobs.tolist()

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for why it ended: "stop", "length" or "tool_calls"."""
        return self.body["choices"][0]["finish_reason"]


class RecordedSession:
    """One episode. It is made, or continued, when it is first used.

    Calls may run side by side: each is a turn of its own, and those that do not continue each other are
    branches.
    """

    def __init__(self, recorder: "Recorder", create: control.Create, session_id: str) -> None:
        self.session_id = session_id
        self._recorder = recorder
        self._create = create
        self._is_open = False
        self._opening = asyncio.Lock()

    async def chat(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        label: str | None = None,
        **fields: Any,
    ) -> Reply:
        """Sample the next turn of a conversation and commit it.

        `messages`, `tools` and `fields` are those of OpenAI Chat Completions, as dicts or as the SDK's own
        objects, under the rules of the gateway's route; `label` says whose turn it is. Cancelling the call
        aborts the turn.

        Raises:
            RequestError: the request cannot be served, or the session takes no more turns; nothing has
                changed.
            EngineError, StoreError: the turn failed, and is counted as such.
        """
        if fields.get("stream"):
            raise RequestError("`stream` has no meaning here: use the client of openai()", param="stream")
        given: Json = {"messages": messages, "tools": tools or None, **fields}
        body = _encode({name: value for name, value in given.items() if value is not None})
        headers = _FIRST_TRY if label is None else {**_FIRST_TRY, "X-Tokentape-Label": label}
        session = await self._opened()
        api = self._recorder.gateway.api
        decoded = api.decode(chat.WIRE, session, body, headers)
        async with api.answering(session, decoded, headers) as answering:
            dones = await answering.dones()
            answering.delivered()
        return Reply(
            msgspec.json.decode(decoded.writer.whole(dones)),
            tuple(done.turn for done in dones),
            dones[0].prompt,
            dones[0].usage,
        )

    def openai(self, **options: Any) -> "AsyncOpenAI":
        """A client of the official SDK whose requests stay in this process; `options` are the client's.

        Raises:
            ConfigError: the SDK is not installed.
        """
        with _extra():
            from tokentape import clients

            return clients.async_openai(self._agent(), options)

    def openai_sync(self, **options: Any) -> "OpenAI":
        """The same for an agent that blocks: run it in another thread (`asyncio.to_thread`)."""
        with _extra():
            from tokentape import clients

            return clients.sync_openai(self._agent(), self._recorder.loop, options)

    def anthropic(self, **options: Any) -> "AsyncAnthropic":
        """Anthropic's client, likewise."""
        with _extra():
            from tokentape import clients

            return clients.async_anthropic(self._agent(), options)

    def anthropic_sync(self, **options: Any) -> "Anthropic":
        """Anthropic's client for an agent in another thread."""
        with _extra():
            from tokentape import clients

            return clients.sync_anthropic(self._agent(), self._recorder.loop, options)

    async def reward(
        self,
        reward: float | None = None,
        *,
        turns: Mapping[str, float | None] | None = None,
        branches: Mapping[str, float | None] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Json:
        """Add rewards while the session is open, and return its summary.

        `reward` is the session's. `turns` are by turn id, `branches` by the id of the branch's last turn, and
        stand in the session's place there; None takes one back.

        Raises:
            SessionClosed: the session is finished.
            RequestError: a reward is not finite, or for a turn or a branch that is not there.
        """
        gateway, session = self._recorder.gateway, await self._opened()
        await gateway.sessions.credit(session, _credit(reward, turns, branches, metadata))
        return await gateway.summary(session)

    async def finish(
        self,
        reward: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        turns: Mapping[str, float | None] | None = None,
        branches: Mapping[str, float | None] | None = None,
    ) -> Json:
        """Close the session, rewards as in `reward`, and return its summary. Again it changes nothing.

        Raises:
            SessionClosed: it is finished with other rewards or other metadata.
            RequestError: as in `reward`.
        """
        gateway, session = self._recorder.gateway, await self._opened()
        await gateway.sessions.finish(session, _credit(reward, turns, branches, metadata))
        return await gateway.summary(session)

    async def summary(self) -> Json:
        """State, counts of turns, branches, tokens and failures, the weights that sampled, rewards."""
        return await self._recorder.gateway.summary(await self._opened())

    async def samples(self) -> list[Json]:
        """The session's samples so far, one a branch: the columns of an export, each row a dict."""
        session = await self._opened()
        batch = await session.read(lambda: samples(session.record, session.tree.tapes()))
        return await asyncio.to_thread(batch.to_pylist)

    def _agent(self) -> "InProcess":
        from tokentape.clients import InProcess

        return InProcess(self._recorder.gateway, self._opened)

    async def _opened(self) -> Session:
        async with self._opening:
            self._recorder.check_open()
            if not self._is_open:
                session = await self._open()
                self._is_open = True
                return session
        return await self._recorder.gateway.sessions.get(self.session_id)

    async def _open(self) -> Session:
        """Make the session, or continue the one of this id."""
        sessions = self._recorder.gateway.sessions
        try:
            session = await control.create(sessions, self._create)
        except SessionExists:
            session = await sessions.get(self.session_id)
            if session.record.state == "open":
                _check_same(self._create, session.record)
        return session


class Recorder:
    """Makes sessions while `open` is open."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.loop = asyncio.get_running_loop()
        self._closed = False

    def session(
        self,
        session_id: str | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        max_turns: int | None = None,
        max_tokens: int | None = None,
        deadline_s: float | None = None,
        group_id: str | None = None,
    ) -> RecordedSession:
        """A session for one episode.

        An open session of this id in the store is continued: it keeps its metadata and its deadline, and
        `sampling` and limits, where given, must be those that it has. `sampling` are fields of a chat request
        that hold where a request does not say otherwise; `max_tokens` bounds all sampled tokens together;
        `deadline_s` counts from the session's first use. `group_id` names the episodes that are compared.

        Raises:
            RequestError: a setting cannot be used; id, sampling and metadata are checked at the first use.
        """
        session_id = session_id if session_id is not None else new_session_id()
        settings: Json = {
            "session_id": session_id,
            "metadata": metadata or {},
            "sampling": sampling or {},
            "max_turns": max_turns,
            "max_tokens": max_tokens,
            "deadline_s": deadline_s,
            "group_id": group_id,
        }
        return RecordedSession(self, control.read_body(_encode(settings), control.Create), session_id)

    async def announce(self, version: str) -> Json:
        """The engine has new weights of this name; what is in force: its own report, where it has one.

        Raises:
            EngineError: the engine does not answer.
            NotPaused: the engine has no name for its weights, and turns are being sampled.
        """
        return await self.gateway.weights.announce(version)

    async def pause(self) -> None:
        """Interrupt what is being sampled and hold it, with all that comes, until `resume`.

        Raises:
            EngineError: the engine does not answer; the recorder is paused all the same.
        """
        await self.gateway.weights.pause()

    def resume(self) -> None:
        """Let everything go on, behind the tokens that are there."""
        self.gateway.weights.resume()

    async def export(self, path: Path | str) -> int:
        """Write the samples of all sessions in the store to a Parquet file, and return how many.

        Raises:
            ConfigError: the file cannot be written.
        """
        self.check_open()
        return await write_parquet(Path(path), stored_samples(self.gateway.store))

    def check_open(self) -> None:
        """Raise `SessionClosed` where the recorder is closed."""
        if self._closed:
            raise SessionClosed("the recorder is closed: use it inside its `async with`")

    async def aclose(self) -> None:
        """Take no more turns, stop those that are being sampled, and wait until that is recorded."""
        self._closed = True
        await self.gateway.sessions.end_all(
            SessionClosed("the recorder is closed: use it inside its `async with`")
        )


@contextlib.asynccontextmanager
async def open(  # noqa: A001  # tokentape.open
    *,
    model: str | Path,
    engine: str | SGLangConfig | Engine,
    store: str | Path | None = None,
    history: History = "template",
    tool_format: str = "auto",
    reasoning_format: str = "auto",
    formats: Sequence[Format] = (),
    template_arguments: Mapping[str, Any] | None = None,
    volatile: Sequence[str] = ("billing-header",),
    capture: Sequence[Literal["support", "routed-experts"]] = (),
    context_length: int | None = None,
    default_max_tokens: int = 4096,
    strict: bool = False,
    served_model_name: str = "policy",
) -> AsyncGenerator[Recorder]:
    """A recorder while the context is open; on the way out what is being sampled is aborted.

    `model` is a directory or hub id, for tokenizer and chat template; `engine` a SGLang server's URL, or an
    engine of your own, which is not closed here. `store` is a file or a `postgresql://` DSN that keeps the
    sessions; without one they are gone at the end. `formats` are rows of your own, tried before the others.
    The other options are those of `tokentape serve`.

    Raises:
        ConfigError: the model, the store or an option cannot be used.
    """
    config = PartsConfig(
        model=str(model),
        engine=SGLangConfig(engine) if isinstance(engine, str) else engine,
        store=store if store is None or is_shared(store) else Path(store),
        tool_format=tool_format,
        reasoning_format=reasoning_format,
        formats=tuple(formats),
        template_arguments=dict(template_arguments or {}),
        history=history,
        default_max_tokens=default_max_tokens,
        volatile=tuple(volatile),
        capture=Capture("support" in capture, "routed-experts" in capture),
        http=GatewayConfig(model=served_model_name, strict=strict, context_length=context_length),
    )
    async with parts(config, ask_engine=True) as gateway:
        recorder = Recorder(gateway)
        try:
            yield recorder
        finally:
            await recorder.aclose()


@contextlib.contextmanager
def _extra() -> Generator[None]:
    """Say what to install where an SDK is missing."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"this needs an extra: pip install 'tokentape[clients]' ({error})") from error


@runtime_checkable
class _Dumped(Protocol):
    """One of the SDK's objects (pydantic)."""

    def model_dump(self, *, mode: str, exclude_unset: bool) -> Json: ...


def _plain(value: object) -> Json:
    if isinstance(value, _Dumped):
        return value.model_dump(mode="json", exclude_unset=True)  # as the SDK itself sends it
    raise TypeError(f"{type(value).__name__} is not JSON")


def _encode(value: Json) -> bytes:
    try:
        return msgspec.json.encode(value, enc_hook=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"this cannot be written as JSON: {error}") from error


def _credit(
    reward: float | None,
    turns: Mapping[str, float | None] | None,
    branches: Mapping[str, float | None] | None,
    metadata: Mapping[str, Any] | None,
) -> Credit:
    for value in (reward, *(turns or {}).values(), *(branches or {}).values()):
        if value is not None and not math.isfinite(value):  # JSON would make it a null: no reward at all
            raise RequestError(f"a reward must be a finite number, not {value}", param="reward")
    given = {"reward": reward, "turn_rewards": turns, "branch_rewards": branches, "metadata": metadata}
    return control.read_body(_encode({k: v for k, v in given.items() if v is not None}), Credit)


def _check_same(create: control.Create, record: SessionRecord) -> None:
    """Raise `SessionExists` where a session that goes on is given other settings than it has."""
    asked = {
        "sampling": session_sampling(create.sampling) if create.sampling else None,
        "max_turns": create.max_turns,
        "max_tokens": create.max_tokens,
    }
    has = {"sampling": record.sampling, "max_turns": record.max_turns, "max_tokens": record.max_tokens}
    for name, value in asked.items():
        if value is not None and value != has[name]:
            raise SessionExists(
                f"session {record.session_id!r} goes on with another `{name}` than it has", param=name
            )
