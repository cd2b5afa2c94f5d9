"""A random Qwen3 of a few thousand parameters with a byte-level tokenizer, saved to a directory."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END = 258  # <|im_end|>, the model's end of turn
VOCAB = 264
CONTEXT = 512


def save_tokenizer(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)


def save_model(directory: Path, *, seed: int = 0, hidden: int = 32, **config: object) -> None:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,  # wide: neighbouring positions must not look alike
            tie_word_embeddings=True,
            eos_token_id=END,
            bos_token_id=None,
            pad_token_id=256,
            **config,
        )
    )
    model.save_pretrained(directory)


def make(directory: Path, **model: object) -> Path:
    save_tokenizer(directory)
    save_model(directory, **model)
    return directory
