"""A tokenizer and a model directory that need no download."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# Words whose every prefix is a token: "hello" is one id, and also he+llo, hell+o, … as a model might sample
# it.
_WORDS = (
    *("hello", "world", "the", "weather", "tool", "user", "assistant", "system", "name", "arguments"),
    *("Ġthe", "Ġis"),  # Ġ stands for a blank
)


def byte_level_tokenizer(
    special: Sequence[str] = SPECIAL_TOKENS, added: Sequence[str] = ADDED_TOKENS
) -> Tokenizer:
    """A byte-level BPE tokenizer of some 330 ids: 256 bytes, words and their prefixes, `special`, `added`.

    Every text is encodable, byte by byte if need be. Most texts with one of the words have several
    encodings, as with a real model's tokenizer, so a test can sample a split that re-encoding would not give
    back. `special` tokens are the model's control tokens (ChatML's by default), `added` are single tokens
    that are not control tokens, as Qwen3's `<think>` is. Nothing is added on encoding: no BOS, no EOS.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        prefixes = [word[:end] for end in range(1, len(word) + 1)]
        for left, right in pairwise(prefixes):
            if right not in vocab:
                vocab[right] = len(vocab)
                merges.append((left, right[-1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(token, special=True, normalized=False) for token in special]
    tokens += [AddedToken(token, special=False, normalized=False) for token in added]
    tokenizer.add_tokens(tokens)  # pyright: ignore[reportUnknownMemberType]  # its stub says list without items
    return tokenizer


def write_model_dir(path: Path, *, tokenizer: Tokenizer | None = None, context_length: int = 8192) -> Path:
    """Write what `--model` needs into `path`: tokenizer, chat template, configuration; no weights.

    The template is ChatML in the manner of Qwen3: tools in the system message, `<tool_call>` blocks with
    JSON, consecutive tool results in one user message, and reasoning that is dropped once a user speaks
    again.
    """
    tokenizer = tokenizer or byte_level_tokenizer()
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    end_id = tokenizer.token_to_id("<|im_end|>")
    files: dict[str, dict[str, object]] = {
        "config.json": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": tokenizer.get_vocab_size(),
            "max_position_embeddings": context_length,
            "eos_token_id": end_id,
        },
        "generation_config.json": {"eos_token_id": [end_id]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    (path / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    return path


_CHAT_TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n\nYou may call these functions:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>\n\nFor each call, return a JSON object within <tool_call></tool_call>:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.reasoning_content and loop.index0 > ns.last_user %}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or content %}{{- '\n' }}{%- endif %}
            {%- set call = call.function or call %}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
