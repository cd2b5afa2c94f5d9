"""Train the bundled model: a tiny Qwen3 that answers arithmetic questions with a calculator.

It writes a checkpoint directory (default: the one in the package) with a byte-level BPE tokenizer of 1024
entries, a Qwen3 of 1.97 M parameters (4 layers, hidden size 192; 3.9 MB in bf16) and its settings; the chat
template there is written by hand. All data is generated (`conversations.py`); data, first weights and BPE
dropout come from `--seed`, so that seed, steps and number of threads fix a run on one machine.

    python models/tiny/train.py                      # the bundled model: seed 0, 850 steps
    python models/tiny/train.py --smoke --out DIR    # a few steps, to see that everything runs
    python models/tiny/train.py --evaluate-only      # measure what is there

Measured on the bundled weights (bf16, loaded back and run in float32; 400 episodes at temperature 1, seed 0):

    valid first calls            98.5 %
    right answers                55.8 %
    non-canonical completions    23.9 %
    turns per episode            2.65

850 steps saw 1.9 M tokens and took 8.1 minutes with two threads on two busy cores (3,944 tokens/s).

Two habits keep it interesting: the demonstrator errs (`conversations.SLIP`), so a policy-gradient step has
something to gain, and a fifth of the completions are drawn with BPE dropout, so the model samples ids that a
re-encoding of its text would not give back, about as often as real models do (18 to 24 %).

What makes it quick: the first half of the steps leaves out the system turn, whose tool list is half of the
tokens; Muon for the matrices; bf16 autocast over float32 weights.
"""

import argparse
import itertools
import json
import re
import shutil
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from conversations import COMMON_WORDS, Message, make_conversation
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

from tokentape.demo.task import CALCULATOR, SYSTEM, Question, calculator, make_question, reward

BUNDLED = Path(__file__).parents[2] / "src" / "tokentape" / "models" / "tiny"
TEMPLATE = BUNDLED / "chat_template.jinja"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STEPS = 850  # of the bundled model
VOCAB_SIZE = 1024
CONTEXT = 4096
SHORT = 0.5  # share of the training that leaves out the system turn
MAX_TOKENS = 1024  # longest conversation trained on
NON_CANONICAL = 0.23  # share of completions whose tokens are drawn with BPE dropout
DROPOUT = 0.06  # share of merges skipped in those


def render(messages: list[Message], tools: list[dict[str, Any]]) -> str:
    """The conversation as text, with transformers' own template environment."""
    rendered, _ = render_jinja_template([messages], tools=tools or None, chat_template=TEMPLATE.read_text())
    return rendered[0]


# --- tokens -------------------------------------------------------------------------------------------------


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE like Qwen's: NFC, the same split (digits one by one), markup added at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = Random(seed)
    markup = re.compile("|".join(map(re.escape, SPECIAL + MARKUP)))
    corpus = [" ".join(COMMON_WORDS.split())] * 3
    corpus += [part for _ in range(2000) for part in markup.split(render(*make_conversation(rng)))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL + MARKUP),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"vocabulary has {tokenizer.get_vocab_size()} entries, not {VOCAB_SIZE}")
    return tokenizer


class Splitter:
    """BPE dropout (Provilkov et al. 2020), seeded; the dropout of `tokenizers` cannot be."""

    def __init__(self, tokenizer: Tokenizer, rng: Random) -> None:
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        self.tokenizer, self.rng = tokenizer, rng
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        self.vocab = tokenizer.get_vocab()

    def __call__(self, text: str) -> list[int]:
        """Ids that decode to `text` and are, if at all possible, not its canonical encoding."""
        canonical = self.tokenizer.encode(text, add_special_tokens=False)
        words: dict[int, list[str]] = {}
        for token, word in zip(canonical.tokens, canonical.word_ids, strict=True):
            words.setdefault(word, []).append(token)
        for _ in range(8):  # "396<|im_end|>" has nothing to split
            ids = [self.vocab[piece] for word in words.values() for piece in self._split(word)]
            if ids != canonical.ids:
                return ids
        return canonical.ids

    def _split(self, word: list[str]) -> list[str]:
        if len(word) == 1 and word[0] in SPECIAL + MARKUP:
            return word
        pieces = list("".join(word))
        while True:
            pairs = [
                (self.ranks[pair], i)
                for i, pair in enumerate(itertools.pairwise(pieces))
                if pair in self.ranks and self.rng.random() >= DROPOUT
            ]
            if not pairs:
                return pieces
            _, i = min(pairs)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


class Encoder:
    """Conversations to ids and loss mask; each assistant turn is encoded apart, as a rollout holds it."""

    def __init__(self, tokenizer: Tokenizer, rng: Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.split = Splitter(tokenizer, rng)

    def __call__(self, text: str) -> tuple[list[int], list[int]]:
        """Ids and mask of one rendered conversation, cut after the last sampled token."""
        ids: list[int] = []
        mask: list[int] = []
        parts = re.split(r"(?s)(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", text)
        for i, part in enumerate(parts):
            if i % 2 and self.rng.random() < NON_CANONICAL:
                new = self.split(part)
            else:
                new = self.tokenizer.encode(part, add_special_tokens=False).ids
            ids += new
            mask += [i % 2] * len(new)
        return ids[:-1] if not mask[-1] else ids, mask[:-1] if not mask[-1] else mask


# --- training -----------------------------------------------------------------------------------------------


Batch = tuple[torch.Tensor, torch.Tensor]  # `ids` and `labels`, int[B, L] each


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how large: a number of steps, or minutes of wall time (not repeatable)."""

    steps: int | None
    minutes: float | None
    batch_tokens: int = 2560
    pool: int = 100
    learning_rate: float = 3e-3

    def progress(self, step: int, started: float) -> float:
        """The share of the training that is done."""
        if self.steps is not None:
            return step / self.steps
        return (time.monotonic() - started) / 60 / (self.minutes or 1.0)


def make_config() -> Qwen3Config:
    """Sizes that SGLang's kernels know: heads of 64, two key-value heads."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCAB_SIZE - len(MARKUP) - 1,
        pad_token_id=VOCAB_SIZE - len(MARKUP) - 3,
        dtype="bfloat16",
    )


def draw_text(rng: Random, with_system: bool) -> str:
    """A rendered conversation; perhaps without its system turn, whose tool list is half of the tokens."""
    while True:
        messages, tools = make_conversation(rng)
        if with_system:
            return render(messages, tools)
        if tools:
            return render([message for message in messages if message["role"] != "system"], [])


def make_batches(encode: Encoder, rng: Random, plan: Plan) -> Generator[Batch, bool]:
    """Endless batches of conversations of like length; sent whether system turns are wanted."""
    with_system = False
    while True:
        pool = [encode(draw_text(rng, with_system)) for _ in range(plan.pool)]
        pool = sorted((pair for pair in pool if len(pair[0]) <= MAX_TOKENS), key=lambda pair: len(pair[0]))
        batches: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if (len(batches[-1]) + 1) * len(pair[0]) > plan.batch_tokens:
                batches.append([])
            batches[-1].append(pair)
        rng.shuffle(batches)
        for batch in batches:
            longest = max(len(ids) for ids, _ in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            for row, (tokens, mask) in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, : len(tokens)] = torch.where(torch.tensor(mask) == 1, torch.tensor(tokens), -100)
            with_system = yield ids, labels


def make_optimizers(model: Qwen3ForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    muon = torch.optim.Muon(matrices, lr=plan.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def train(model: Qwen3ForCausalLM, encode: Encoder, rng: Random, plan: Plan) -> None:
    """A short warm-up, then a linear way down to zero; loss on sampled tokens only."""
    optimizers = make_optimizers(model, plan)
    model.train()
    started, step, seen, average = time.monotonic(), 0, 0, 0.0
    batches = make_batches(encode, rng, plan)
    next(batches)
    while (done := plan.progress(step, started)) < 1:
        ids, labels = batches.send(done > SHORT)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        logits = model.lm_head(hidden[wanted != -100].float())
        loss = torch.nn.functional.cross_entropy(logits, wanted[wanted != -100])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = plan.learning_rate * min(1.0, (step + 1) / 100, (1 - done) / 0.7)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        step, seen = step + 1, seen + ids.numel()
        average = loss.item() if step == 1 else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            passed = time.monotonic() - started
            print(f"step {step}  {done:4.0%}  loss {average:.3f}  {seen / passed:,.0f} tokens/s", flush=True)
    print(f"trained {step} steps, {seen:,} tokens, {(time.monotonic() - started) / 60:.1f} minutes")


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write a checkpoint that transformers and SGLang load: weights in bf16, plain files."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where readers before transformers 5 look
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)  # transformers leaves it readable by its owner only
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": CONTEXT,
        "split_special_tokens": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {
        "do_sample": True,
        "eos_token_id": model.config.eos_token_id,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    generation["pad_token_id"] = model.config.pad_token_id
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")
    if out.resolve() != BUNDLED.resolve():
        shutil.copy(TEMPLATE, out / TEMPLATE.name)


# --- evaluation ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Episode:
    """One question being worked on; `ids` is the tape so far, `completions` what was sampled."""

    question: Question
    ids: list[int]
    completions: list[list[int]]
    first_call_valid: bool = False
    final_text: str | None = None
    done: bool = False


def read_call(text: str) -> str | None:
    """The expression of a completion's one calculator call, None if there is no valid call."""
    match = re.search(r"(?s)<tool_call>\n(.*?)\n</tool_call><\|im_end\|>$", text)
    try:
        call = json.loads(match.group(1)) if match else None
        expression = call["arguments"]["expression"] if call and call["name"] == "calculator" else None
    except (ValueError, TypeError, KeyError):
        return None
    return expression if isinstance(expression, str) else None


def advance(episode: Episode, completion: list[int], tokenizer: Any, max_turns: int) -> None:
    """Take in one sampled turn: run its call, or close the episode."""
    episode.ids += completion
    episode.completions.append(completion)
    text = tokenizer.decode(completion)
    expression = read_call(text)
    if len(episode.completions) == 1:
        episode.first_call_valid = expression is not None
    if expression is None or len(episode.completions) == max_turns:
        episode.done = True
        episode.final_text = None if "<tool_call>" in text else text.split("</think>")[-1]
        return
    bridge = f"\n<|im_start|>user\n<tool_response>\n{calculator(expression)}\n</tool_response><|im_end|>\n"
    episode.ids += tokenizer.encode(f"{bridge}<|im_start|>assistant\n", add_special_tokens=False)


@torch.inference_mode()
def generate(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Sample one completion per prompt at temperature 1 from the full distribution."""
    longest, pad, eos = max(map(len, prompts)), model.config.pad_token_id, model.config.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 120}
    output = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, longest:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in output]


def evaluate(checkpoint: Path, num_episodes: int, seed: int, max_turns: int = 6) -> dict[str, float]:
    """Play episodes with the saved checkpoint in float32; print and return what came of them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(seed)
    rng = Random(f"evaluation {seed}")
    episodes: list[Episode] = []
    for _ in range(num_episodes):
        question = make_question(rng)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question.text}]
        text = render(messages, [CALCULATOR]) + "<|im_start|>assistant\n"
        episodes.append(Episode(question, tokenizer.encode(text, add_special_tokens=False), []))
    while running := [episode for episode in episodes if not episode.done]:
        for start in range(0, len(running), 100):
            batch = running[start : start + 100]
            completions = generate(model, [episode.ids for episode in batch])
            for episode, completion in zip(batch, completions, strict=True):
                advance(episode, completion, tokenizer, max_turns)
    completions = [completion for episode in episodes for completion in episode.completions]
    drifted = [c for c in completions if tokenizer.encode(tokenizer.decode(c), add_special_tokens=False) != c]
    figures = {
        "valid first calls": sum(e.first_call_valid for e in episodes) / num_episodes,
        "right answers": sum(reward(e.question, e.final_text) for e in episodes) / num_episodes,
        "non-canonical completions": len(drifted) / len(completions),
        "turns per episode": len(completions) / num_episodes,
    }
    print(f"\n{num_episodes} episodes at temperature 1")
    for name, figure in figures.items():
        print(f"{name:<28}{figure:>8.2f}" if name.startswith("turns") else f"{name:<28}{figure:>8.1%}")
    for episode in episodes[:6]:
        print(f"\n{episode.question.text}  -> {episode.question.answer}")
        print("\n".join(f"    {tokenizer.decode(completion)!r}" for completion in episode.completions))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that everything runs")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint in --out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.evaluate_only:
        plan = Plan(steps=options.steps, minutes=options.minutes)
        if options.smoke:
            plan = Plan(steps=3, minutes=None, batch_tokens=2048, pool=16)
        elif options.steps is None and options.minutes is None:
            plan = Plan(steps=STEPS, minutes=None)
        rng = Random(options.seed)
        torch.manual_seed(options.seed)
        tokenizer = train_tokenizer(options.seed)
        model = Qwen3ForCausalLM(make_config())
        print(
            f"{model.num_parameters():,} parameters, vocabulary of {tokenizer.get_vocab_size()}", flush=True
        )
        train(model, Encoder(tokenizer, rng), rng, plan)
        save(model, tokenizer, options.out)
    evaluate(options.out, 8 if options.smoke else options.episodes, options.seed)


if __name__ == "__main__":
    main()
