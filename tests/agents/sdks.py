"""SDKs and frameworks: a driver script each, and two tools that really run."""

from collections.abc import Callable
from functools import partial
from typing import Any

from agentkit import HERE, Case, Place, program
from scripts import adds_and_reads, writes_code

TASK = "Add 20 and 22, read note.txt, and say what it holds. Use your tools."


def driver(name: str, mode: str, *, venv: str) -> Callable[[Place], list[str]]:
    script = str(HERE / "drivers" / name)
    return lambda place: [program(venv, "bin", "python"), script, mode, place.base_url, TASK]


def sdk(
    agent: str,
    package: str,
    protocol: str,
    name: str,
    mode: str,
    *,
    venv: str = "requirements",
    **fields: Any,
) -> Case:
    return Case(
        agent, package, protocol, driver(name, mode, venv=venv), **{"script": adds_and_reads, **fields}
    )


SDKS = [
    sdk("openai, `create`", "openai", "chat", "openai_chat.py", "create"),
    sdk("openai, `stream` helper", "openai", "chat", "openai_chat.py", "stream"),
    sdk("openai, `parse` helper", "openai", "chat", "openai_chat.py", "parse"),
    sdk("openai, `create`", "openai", "responses", "openai_responses.py", "create"),
    sdk("openai, `stream` helper", "openai", "responses", "openai_responses.py", "stream"),
    sdk("openai, `previous_response_id`", "openai", "responses", "openai_responses.py", "previous"),
    sdk("anthropic, `create`", "anthropic", "messages", "anthropic_messages.py", "create"),
    sdk("anthropic, `stream` helper", "anthropic", "messages", "anthropic_messages.py", "stream"),
    sdk("anthropic, tool runner", "anthropic", "messages", "anthropic_messages.py", "runner"),
    sdk(
        "anthropic, streaming tool runner", "anthropic", "messages", "anthropic_messages.py", "runner-stream"
    ),
    sdk(
        "anthropic, tool runner, `thread=False`",
        *("anthropic", "messages", "anthropic_messages.py", "runner-whole"),
    ),
    sdk("openai-agents", "openai-agents", "chat", "openai_agents.py", "chat"),
    sdk("openai-agents, streaming", "openai-agents", "chat", "openai_agents.py", "chat-stream"),
    sdk("openai-agents", "openai-agents", "responses", "openai_agents.py", "responses"),
    sdk("openai-agents, streaming", "openai-agents", "responses", "openai_agents.py", "responses-stream"),
    sdk("pydantic-ai", "pydantic-ai-slim", "chat", "pydantic_ai_agent.py", "chat"),
    sdk("pydantic-ai, streaming", "pydantic-ai-slim", "chat", "pydantic_ai_agent.py", "chat-stream"),
    sdk("pydantic-ai", "pydantic-ai-slim", "messages", "pydantic_ai_agent.py", "messages"),
    sdk("pydantic-ai, streaming", "pydantic-ai-slim", "messages", "pydantic_ai_agent.py", "messages-stream"),
    sdk("pydantic-ai", "pydantic-ai-slim", "responses", "pydantic_ai_agent.py", "responses"),
    sdk(
        "pydantic-ai, streaming", "pydantic-ai-slim", "responses", "pydantic_ai_agent.py", "responses-stream"
    ),
    sdk("LangGraph", "langgraph", "chat", "langgraph_agent.py", "chat"),
    sdk("LangGraph, streaming", "langgraph", "chat", "langgraph_agent.py", "chat-stream"),
    sdk("LangGraph", "langgraph", "messages", "langgraph_agent.py", "messages"),
    sdk("LangGraph, streaming", "langgraph", "messages", "langgraph_agent.py", "messages-stream"),
    sdk("LangGraph", "langgraph", "responses", "langgraph_agent.py", "responses"),
    sdk("LangGraph, streaming", "langgraph", "responses", "langgraph_agent.py", "responses-stream"),
    sdk(
        *("smolagents, ToolCallingAgent", "smolagents", "chat", "smolagents_agent.py", "tools"),
        script=partial(adds_and_reads, last="final_answer"),
        why_not="it replays its calls as text",
    ),
    sdk(
        *("smolagents, CodeAgent", "smolagents", "chat", "smolagents_agent.py", "code"),
        script=writes_code,
        why_not="it adds the code that it ran to what the model said",
    ),
    sdk("strands", "strands-agents", "chat", "strands_agent.py", "chat", venv="requirements-older"),
    sdk("strands", "strands-agents", "messages", "strands_agent.py", "messages", venv="requirements-older"),
]
