"""A real Letta server in this process, on SQLite, with an agent whose model is a fake SGLang."""

import contextlib
import io
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import letta.orm  # declares all tables
import letta.server.db
from letta.agents.letta_agent_v3 import LettaAgentV3
from letta.llm_api.openai_client import OpenAIClient
from letta.orm.base import Base
from letta.schemas.agent import CreateAgent
from letta.schemas.block import CreateBlock
from letta.schemas.embedding_config import EmbeddingConfig
from letta.schemas.enums import LLMCallType
from letta.schemas.letta_message_content import TextContent
from letta.schemas.letta_response import LettaResponse
from letta.schemas.llm_config import LLMConfig
from letta.schemas.message import MessageCreate
from letta.schemas.run import Run
from letta.server.server import SyncServer
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from gatewaykit import call
from tokentape.testing import FakeSGLang

CONTEXT = 200_000  # the byte-level tokenizer needs a token a character, and Letta's prompts are long
TOOLS = ("send_message", "core_memory_append")  # Letta runs these in its own process


def tell(text: str) -> str:
    """The text of a call that changes nothing."""
    return call("send_message", {"message": text})


def remember(text: str) -> str:
    """The text of a call that edits the agent's memory, and with it the next step's system prompt."""
    return call("core_memory_append", {"label": "human", "content": text})


def llm_config(url: str, model: Path | str, **fields: Any) -> LLMConfig:
    """What Letta makes of a model of its SGLang provider."""
    settings = {
        "model": str(model),
        "model_endpoint_type": "openai",
        "model_endpoint": f"{url}/v1",
        "context_window": CONTEXT,
        "handle": "sglang/policy",
        "provider_name": "sglang",
        "return_token_ids": True,
        "return_logprobs": True,
        "max_tokens": 300,
        "temperature": 0.6,
    }
    return LLMConfig(**{**settings, **fields})


def adapter(kind: type, config: LLMConfig, **fields: Any) -> Any:
    """An adapter as Letta's agent makes it."""
    arguments = {
        "llm_client": OpenAIClient(),
        "llm_config": config,
        "call_type": LLMCallType.agent_step,
        "agent_id": "agent-1",
    }
    return kind(**{**arguments, **fields})


async def invoke(adapter: Any, messages: list[Any], tools: Any = (), **request: Any) -> list[Any]:
    """One call as Letta's agent makes it; what the generator yielded."""
    generator = adapter.invoke_llm(
        request_data=request, messages=messages, tools=list(tools), use_assistant_message=False
    )
    return [chunk async for chunk in generator]


def said_by(one: Any) -> dict[str, Any]:
    """The assistant message that a loop would keep of a call."""
    said: dict[str, Any] = {"role": "assistant", "content": None}
    for part in one.content or ():
        if isinstance(part, TextContent):
            said["content"] = part.text
        else:
            said["reasoning_content"] = part.reasoning
    if one.tool_calls:
        said["tool_calls"] = [c.model_dump() for c in one.tool_calls]
    return said


def results_of(one: Any) -> list[dict[str, Any]]:
    return [{"role": "tool", "content": "sunny", "tool_call_id": c.id} for c in one.tool_calls]


@dataclass
class LettaServer:
    """Letta's server object with its database; `step` is one step of an agent, as a run of its own."""

    server: SyncServer

    async def agent(self, config: LLMConfig, **fields: Any) -> str:
        actor, manager = self.server.default_user, self.server.tool_manager
        tools = [await manager.get_tool_by_name_async(name, actor=actor) for name in TOOLS]
        settings: Mapping[str, Any] = {
            "agent_type": "letta_v1_agent",
            "llm_config": config,
            "embedding_config": EmbeddingConfig.default_config(provider="openai"),
            "tool_ids": [tool.id for tool in tools],
            "include_base_tools": False,
            "include_base_tool_rules": False,
            "memory_blocks": [CreateBlock(label="human", value="Ann")],
            "system": "You are a helpful agent.",
        }
        request = CreateAgent(**{**settings, **fields})
        return (await self.server.create_agent_async(request, actor=actor)).id

    async def loop(self, agent_id: str, kind: type[LettaAgentV3] = LettaAgentV3) -> LettaAgentV3:
        actor = self.server.default_user
        state = await self.server.agent_manager.get_agent_by_id_async(agent_id, actor=actor)
        return kind(agent_state=state, actor=actor)

    async def step(self, agent_id: str, text: str, kind: type[LettaAgentV3] = LettaAgentV3) -> LettaResponse:
        actor = self.server.default_user
        run = await self.server.run_manager.create_run(Run(agent_id=agent_id, background=False), actor=actor)
        loop = await self.loop(agent_id, kind)
        return await loop.step([MessageCreate(role="user", content=text)], max_steps=8, run_id=run.id)


@contextlib.asynccontextmanager
async def letta_server(directory: Path) -> AsyncIterator[LettaServer]:
    """Letta's server object on a fresh SQLite file; of Letta only the database engine is another."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("Letta", "letta", "httpx", "tokentape", "transformers"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    engine = create_async_engine(f"sqlite+aiosqlite:///{directory / 'letta.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    letta.server.db.async_session_factory = async_sessionmaker(
        engine, class_=AsyncSession, expire_on_commit=False, autocommit=False, autoflush=False
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its default user
            server = SyncServer(init_with_default_org_and_user=False)
            await server.init_async(init_with_default_org_and_user=True)
        yield LettaServer(server)
    finally:
        await engine.dispose()


@contextlib.contextmanager
def as_before() -> Any:
    """Undo what `install` does at the end."""
    from letta.adapters import sglang_native_adapter
    from letta.agents import letta_agent_v3

    original = sglang_native_adapter.SGLangNativeAdapter
    try:
        yield original
    finally:
        sglang_native_adapter.SGLangNativeAdapter = letta_agent_v3.SGLangNativeAdapter = original


def extends(fake: FakeSGLang) -> list[bool]:
    """For each request but the first: is its prompt what the engine saw and sampled before, then more?"""
    pairs = zip(fake.requests, fake.requests[1:], strict=False)
    return [
        after.input_ids[: len(before.input_ids) + len(before.output_ids)]
        == [*before.input_ids, *before.output_ids]
        for before, after in pairs
    ]
