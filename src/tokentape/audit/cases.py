"""The cases of an audit: a conversation, the turn that was sampled in it, and the messages that follow."""

from dataclasses import dataclass

from tokentape.types import Json, Message, ToolCall


@dataclass(frozen=True, slots=True)
class Case:
    """Messages `before` a sampled turn, the turn `reply`, and the `new` messages after it.

    `cut`: the turn stopped on length, without a stop token. `in_thought`: it did so inside its thought.
    `tool_use`: the verdict hangs on it.
    """

    name: str
    title: str
    before: tuple[Message, ...]
    reply: Message
    new: tuple[Message, ...]
    tools: tuple[Json, ...] = ()
    cut: bool = False
    in_thought: bool = False
    tool_use: bool = False

    @property
    def pieces(self) -> tuple[str, ...]:
        """The texts that show where a template renders the whole turn, in their order."""
        called = [text for call in self.reply.tool_calls for text in (call.name, _VALUES[call.name])]
        return tuple(text for text in (self.reply.reasoning, self.reply.content, *called) if text)

    @property
    def marks(self) -> tuple[str, ...]:
        """Those of the `pieces` that stand nowhere else in the conversation: a tool's name does."""
        names = {call.name for call in self.reply.tool_calls}
        return tuple(text for text in self.pieces if text not in names)

    @property
    def anchors(self) -> tuple[str, ...]:
        """The texts of the new messages: each stands nowhere else in the conversation."""
        return tuple(message.content for message in self.new if message.content)


def tool(name: str, **properties: Json) -> Json:
    """A tool definition, as Chat Completions has it; every parameter is required."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": f"What {name} does", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = (
    tool("get_weather", city={"type": "string"}, days={"type": "integer"}),
    tool("get_time", zone={"type": "string"}),
)
_VALUES = {"get_weather": "Paris", "get_time": "Europe"}

SYSTEM = Message(role="system", content="Be brief.")
USER = Message(role="user", content="How is it there?")
MORE = Message(role="user", content="And tomorrow?")
WEATHER = ToolCall(id="call00001", name="get_weather", arguments='{"city": "Paris", "days": 2}')
CLOCK = ToolCall(id="call00002", name="get_time", arguments='{"zone": "Europe"}')
SUNNY = Message(role="tool", content="18C, clear", tool_call_id="call00001")
NOON = Message(role="tool", content="It is 12:30", tool_call_id="call00002")
BOTH = (SUNNY, NOON)
THOUGHT = "I should look it up."


def says(content: str | None = None, *calls: ToolCall, thought: str | None = None) -> Message:
    """An assistant's turn."""
    return Message(role="assistant", content=content, reasoning=thought, tool_calls=calls)


_START = (SYSTEM, USER)
_CALLED = (*_START, says(None, WEATHER), SUNNY)
_THOUGHT = (*_START, says(None, WEATHER, thought=THOUGHT), SUNNY)

CASES: tuple[Case, ...] = (
    Case("call", "a call, its result", _START, says(None, WEATHER), (SUNNY,), TOOLS, tool_use=True),
    Case(
        "two calls", "two calls, both results",
        _START, says(None, WEATHER, CLOCK), BOTH, TOOLS, tool_use=True,
    ),
    Case(
        "call again", "a second call after a result, its result",
        _CALLED, says(None, CLOCK), (NOON,), TOOLS, tool_use=True,
    ),
    Case("text+call", "text and a call, its result", _START, says("Let me look.", WEATHER), (SUNNY,), TOOLS),
    Case("call, user", "a call, its result and a user", _START, says(None, WEATHER), (SUNNY, MORE), TOOLS),
    Case("text after call", "a call, then text, a user", _CALLED, says("It is sunny."), (MORE,), TOOLS),
    Case(
        "call, next task", "a call and text, a user, a call, its result",
        (*_CALLED, says("It is sunny."), MORE), says(None, CLOCK), (NOON,), TOOLS,
    ),
    Case("text", "text, a user", _START, says("It is sunny."), (MORE,)),
    Case(
        "thought+call", "a thought and a call, its result",
        _START, says(None, WEATHER, thought=THOUGHT), (SUNNY,), TOOLS, tool_use=True,
    ),
    Case(
        "thought+two calls", "a thought and two calls, both results",
        _START, says(None, WEATHER, CLOCK, thought=THOUGHT), BOTH, TOOLS, tool_use=True,
    ),
    Case(
        "thought+call again", "a second thought and call after a result, its result",
        _THOUGHT, says(None, CLOCK, thought="Now the time."), (NOON,), TOOLS, tool_use=True,
    ),
    Case(
        "empty thought+call", "a thought that is empty and a call, its result",
        _START, says(None, WEATHER, thought=""), (SUNNY,), TOOLS,
    ),
    Case(
        "thought+text", "a thought and text, a user",
        _START, says("It is sunny.", thought=THOUGHT), (MORE,),
    ),
    Case(
        "thought+text after call", "thoughts, a call, then text, a user",
        _THOUGHT, says("It is sunny.", thought="Now I know."), (MORE,), TOOLS,
    ),
    Case("no system", "no system message: a call, its result", (USER,), says(None, WEATHER), (SUNNY,), TOOLS),
    Case("empty", "nothing said, a user", _START, says(""), (MORE,)),
    Case("cut text", "text cut by length, a user", _START, says("It is"), (MORE,), cut=True),
    Case(
        "cut thought", "a thought cut by length, a user",
        _START, says("", thought=THOUGHT), (MORE,), cut=True, in_thought=True,
    ),
)  # fmt: skip
"""In the order of the report. A tool's result is told from another by its text."""
