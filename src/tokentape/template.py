"""The model's chat template: messages → text, with the same result as transformers' `apply_chat_template`.

Templates come with model repositories: untrusted code. They run in Jinja's immutable sandbox on plain data.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokentape.errors import ConfigError, RequestError, TemplateRefused
from tokentape.types import Json, Message, ToolCall

# String methods and operators with which templates look into a message's content.
_CONTENT_TESTS = frozenset({"startswith", "endswith", "split", "rsplit", "find", "replace", "count", "index"})


class ChatTemplate:
    """One compiled chat template and the conventions found by probing it.

    `arguments_as_text`: tool-call arguments must be JSON text (DeepSeek R1 and V3.1 raise on objects);
    otherwise they are objects (most raise on text, or encode it twice). `empty_content`: what an assistant
    message that is nothing but calls must have as content (some templates drop the calls unless it is None,
    some print "None"). `content_as_parts`: a message's content must be a list of parts (MiniMax M1, SmolVLM).
    `short_call_ids`: a call's id must be nine letters and digits (Mistral). `variables` are the names that it
    reads.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, tool_source: str | None = None
    ) -> None:
        """Compile `source`, and `tool_source` where a model has another template for requests with tools."""
        environment = _environment()
        self.source = source if tool_source is None else f"{source}\n{tool_source}"
        try:
            self._template = environment.from_string(source)
            self._tool_template = environment.from_string(source if tool_source is None else tool_source)
            tree = environment.parse(self.source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template does not compile: {error}; take the model's own") from error
        self.special_tokens = dict(special_tokens)
        self.literal_text = _literal_text(tree)
        self.content_tests = _content_tests(tree)
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
        self.arguments_as_text = False
        self.empty_content: str | None = None
        self.content_as_parts = False
        self.short_call_ids = False
        self._probe_conventions()

    @classmethod
    def from_dir(cls, directory: Path) -> "ChatTemplate":
        """Read the directory's template where transformers looks for it.

        That is `chat_template.jinja` (for requests with tools, `additional_chat_templates/tool_use.jinja`),
        else the `chat_template` of `tokenizer_config.json`, else a processor's `chat_template.json`.

        Raises:
            ConfigError: no file has a template, or one is broken; it names them.
        """
        config_path = directory / "tokenizer_config.json"
        config = _read_json(config_path) if config_path.exists() else {}
        names_path = directory / "special_tokens_map.json"  # where older models name their tokens
        names = _special_tokens(_read_json(names_path)) if names_path.exists() else {}
        path, source, tool_source = _read_sources(directory, config_path, config)
        if source is None or not source.strip():
            raise ConfigError(
                f"no chat template: neither {directory / 'chat_template.jinja'} nor a `chat_template` in "
                f"{config_path} exists; copy the template of the model you train into the directory"
            )
        try:
            return cls(source, {**names, **_special_tokens(config)}, tool_source=tool_source)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def render(
        self,
        messages: Sequence[Json],
        tools: Sequence[Json] | None,
        arguments: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
    ) -> str:
        """The conversation's text. `messages` are what `to_json` makes; templates read `arguments` by name.

        Raises:
            TemplateRefused: the template raised, with its words.
        """
        variables = {**self.special_tokens, **{k: v for k, v in arguments.items() if k not in RESERVED}}
        try:
            return (self._tool_template if tools else self._template).render(
                messages=messages,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except jinja2.TemplateError as error:
            raise TemplateRefused(
                f"the model's chat template refuses this conversation: {error.message}"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise TemplateRefused(f"the model's chat template fails on this conversation: {error}") from error

    def to_json(self, message: Message) -> Json:
        """A message as the template expects it.

        Reasoning goes under both names that templates read, as transformers does it.

        Raises:
            RequestError: a tool call's arguments are not an object, and the template needs one.
        """
        out: Json = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            out["reasoning_content"] = out["thinking"] = message.reasoning
        if message.tool_calls:
            out["content"] = message.content or self.empty_content
            out["tool_calls"] = [self._call_to_json(call) for call in message.tool_calls]
        elif message.content is None:
            out["content"] = ""
        if self.content_as_parts and out["content"] is not None:
            out["content"] = [{"type": "text", "text": out["content"]}]
        if message.tool_call_id is not None:
            out["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            out["name"] = message.name
        return out

    def _call_to_json(self, call: ToolCall) -> Json:
        arguments: Any = call.arguments
        if not self.arguments_as_text:
            try:
                arguments = json.loads(call.arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise RequestError(
                    f"tool call {call.id!r}: arguments are not JSON ({error}), and the model's chat template "
                    "needs an object",
                    param="messages.tool_calls.function.arguments",
                ) from None
            if not isinstance(arguments, dict):
                raise RequestError(
                    f"tool call {call.id!r}: arguments must be a JSON object, not {type(arguments).__name__}",
                    param="messages.tool_calls.function.arguments",
                )
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def _probe_conventions(self) -> None:
        """Find the conventions under which texts and tool calls show as they are in what is rendered."""
        self.content_as_parts = not self._shows_text(as_parts=False) and self._shows_text(as_parts=True)
        for as_text in (False, True):
            for empty in (None, ""):
                self.arguments_as_text, self.empty_content = as_text, empty
                text = self._probe_call()
                if "probe0" in text and not any(wrong in text for wrong in _MISRENDERED):
                    self.short_call_ids = not self._probe_call(f"call_{'0' * 24}")
                    return
        self.arguments_as_text, self.empty_content = False, ""  # it drops tool calls, or raises on them

    def _shows_text(self, *, as_parts: bool) -> bool:
        self.content_as_parts = as_parts
        text = self._probe([Message(role="user", content="probe0")], None)
        return "probe0" in text and "'text'" not in text

    def _probe_call(self, call_id: str = "probe0001") -> str:
        """A rendered tool call and its result."""
        call = ToolCall(id=call_id, name="tool0", arguments='{"key0": "probe0"}')
        messages = [
            Message(role="user", content="u"),
            Message(role="assistant", tool_calls=(call,)),
            Message(role="tool", content="r", tool_call_id=call.id),
        ]
        return self._probe(messages, [PROBE_TOOL])

    def _probe(self, messages: Sequence[Message], tools: Sequence[Json] | None) -> str:
        """What is rendered; "" where the template raises."""
        try:
            return self.render([self.to_json(m) for m in messages], tools, {}, add_generation_prompt=True)
        except TemplateRefused:
            return ""


PROBE_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "tool0",
        "description": "d",
        "parameters": {"type": "object", "properties": {"key0": {"type": "string"}}, "required": []},
    },
}
# Arguments encoded twice, Python's repr of a dict, a content of None printed as a word.
_MISRENDERED = ('\\"key0\\"', "'key0'", "None")
RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt"),
        *("raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace"),
        *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
    }
)
"""Names that a template reads and a caller's arguments may not take."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with what it decides by type and name decided once.

    Templates read `message.role` hundreds of times a render. An attribute that a dict does not have is its
    item, as in the sandbox itself; whether a name is safe on an object hangs on the object's type alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._safe: dict[tuple[type[Any], str], bool] = {}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or else an item."""
        if type(obj) is dict and attribute not in _DICT:
            item = cast("Json", obj).get(attribute, _MISSING)
            return item if item is not _MISSING else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have this attribute."""
        key = cast("type[Any]", type(obj)), attr
        safe = self._safe.get(key)
        if safe is None:
            safe = self._safe[key] = super().is_safe_attribute(obj, attr, value)
        return safe


_DICT = frozenset(dir(dict))
_MISSING = object()


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` blocks mark assistant text for trainers; rendering passes them through."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 reads it as a plain class attribute

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_MOMENT: ContextVar[datetime | None] = ContextVar("moment", default=None)


@contextmanager
def one_moment() -> Generator[None]:
    """Within it the clock that templates read stands still: what is rendered differs by its messages only."""
    token = _MOMENT.set(datetime.now())
    try:
        yield
    finally:
        _MOMENT.reset(token)


def _environment() -> _Sandbox:
    """The environment that transformers gives to chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    plain = json.JSONEncoder(ensure_ascii=False).encode  # `dumps` makes an encoder for every call

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        if ensure_ascii or sort_keys or indent is not None or separators is not None:
            return json.dumps(
                x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )
        return plain(x)

    def strftime_now(format: str) -> str:  # noqa: A002  # templates may pass it by name
        return (_MOMENT.get() or datetime.now()).strftime(format)  # local time, as transformers

    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    cast("Json", environment.globals).update(
        {"raise_exception": raise_exception, "strftime_now": strftime_now}
    )
    return environment


def _read_sources(directory: Path, config_path: Path, config: Json) -> tuple[Path, str | None, str | None]:
    """The file that has the template, its text, and the text for requests with tools (None: none)."""
    path, more = directory / "chat_template.jinja", directory / "additional_chat_templates" / "tool_use.jinja"
    if path.exists():
        try:
            tool_source = more.read_text(encoding="utf-8") if more.exists() else None
            return path, path.read_text(encoding="utf-8"), tool_source
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path} is not UTF-8 text: {error}; copy it from the model's repository again"
            ) from error
    source: Any = config.get("chat_template")
    path = config_path
    if source is None and (directory / "chat_template.json").exists():
        path = directory / "chat_template.json"
        source = _read_json(path).get("chat_template")
    if isinstance(source, list):  # several named templates: transformers takes these two by itself
        listed = cast("list[dict[str, str]]", source)
        try:
            named = {t["name"]: t["template"] for t in listed}
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: a chat template in the list has no name or no template") from error
        return path, named.get("default"), named.get("tool_use")
    return path, source if isinstance(source, str) else None, None


def _read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON: {error}; copy it from the model's repository again"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object; copy it from the model's repository again")
    return cast("Json", value)


def _special_tokens(config: Json) -> dict[str, str]:
    """`bos_token`, `eos_token`, … as templates name them; each is a string or an object with its content."""
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = cast("Json", value).get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _literal_text(tree: jinja2.nodes.Template) -> str:
    """Everything that the template itself may write, NUL between the pieces."""
    data = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    constants = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(data | constants))


def _content_tests(tree: jinja2.nodes.Template) -> tuple[str, ...]:
    """The texts that the template looks for inside messages: its behaviour may hang on them."""
    found: set[str] = set()
    for compare in tree.find_all(jinja2.nodes.Compare):
        if any(op.op in ("in", "notin") for op in compare.ops) and isinstance(
            compare.expr, jinja2.nodes.Const
        ):
            found.add(str(compare.expr.value))
    for call in tree.find_all(jinja2.nodes.Call):
        if isinstance(call.node, jinja2.nodes.Getattr) and call.node.attr in _CONTENT_TESTS:
            found |= {str(a.value) for a in call.args if isinstance(a, jinja2.nodes.Const)}
    return tuple(sorted(text for text in found if len(text.strip()) > 1))
