"""Hugging Face datasets: rows go through the real library and back, and through transformers' collators."""

import math
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episodes import EXPERTS_PER_TOKEN, NUM_LAYERS, forked, silent, single
from packages import own

from tokentape.errors import ConfigError
from tokentape.export import huggingface
from tokentape.export.files import write_rows
from tokentape.export.row import Row
from tokentape.schema import SAMPLES

PAD = 0


@pytest.fixture
def package() -> Any:
    """The real library."""
    return own("datasets")


def all_samples() -> list[Row]:
    """Experts, support, no group, no reward, nothing sampled: every null there is."""
    return [
        *forked(experts=True),
        *forked("s4", support=True, reward=None),
        *single(group_id=None),
        *silent(),
    ]


def test_a_row_to_the_letter() -> None:
    [first, _] = huggingface.rows(forked())
    texts = {name: first.pop(name) for name in ("messages", "tools", "metadata")}
    assert all(isinstance(text, str) for text in texts.values())
    assert first == {
        "input_ids": [100, 101, 102, 6001, 6002, 110, 111, 112, 6001, 6002],
        "attention_mask": [1] * 10,
        "labels": [-100] * 8 + [6001, 6002],
        "logprobs": [None] * 8 + [0.0, -0.125],
        "weight_versions": [None] * 8 + ["4", "4"],
        "session_id": "s1",
        "sample_id": "t3",
        "group_id": "g",
        "branch_reason": "forked",
        "reward": 1.0,
        "truncated": True,
        "num_prompt_tokens": 3,
        "agent": "main",
        "turn_starts": [3, 8],
        "turn_ends": [5, 10],
        "turn_trained": [False, True],
        "turn_rewards": [0.25, None],
        "sampling_logprobs": None,
        "support": None,
        "routed_experts": None,
    }


def test_experts_without_their_number_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"sample t1 has routed experts.*say experts_per_token"):
        list(huggingface.rows(single(experts=True)))


# -- against datasets


def test_a_dataset_holds_what_the_rows_say(package: Any) -> None:
    """All values, nulls as nulls, under the declared types; `None` and 0.0 stay two things."""
    samples = all_samples()
    made = huggingface.dataset(samples, experts_per_token=EXPERTS_PER_TOKEN)
    assert isinstance(made, package.Dataset)
    assert made.features == huggingface.features()
    assert set(made.column_names) == set(huggingface.features())
    assert made.to_list() == list(huggingface.rows(samples, experts_per_token=EXPERTS_PER_TOKEN))
    for row, sample in zip(made, samples, strict=True):
        size = len(sample["token_ids"])
        for name in ("input_ids", "attention_mask", "labels", "logprobs", "weight_versions"):
            assert len(row[name]) == size, name
        assert row["logprobs"] == sample["logprobs"]
        assert [label != huggingface.IGNORED for label in row["labels"]] == [*map(bool, sample["loss_mask"])]
    experts = made[0]["routed_experts"]
    assert {len(layers) for layers in experts} == {NUM_LAYERS}
    assert [e for layers in experts for layer in layers for e in layer] == [
        *samples[0]["routed_experts"]["data"]
    ]


def test_log_probabilities_keep_their_bits(package: Any) -> None:
    """A sample's are float32, and so is the column: not one that eighths alone survive."""
    assert package is not None
    [sample] = single()
    third = struct.unpack("f", struct.pack("f", -1 / 3))[0]
    logprobs = [p and third for p in sample["logprobs"]]
    captured = {"logprobs": logprobs, "sampling_logprobs": logprobs}
    [row] = huggingface.dataset([{**sample, **captured}])
    assert third in row["logprobs"]
    assert row["logprobs"] == row["sampling_logprobs"] == logprobs


def test_a_file_of_samples_is_the_same_dataset(package: Any, tmp_path: Path) -> None:
    samples = [*forked(), *single()]
    pq.write_table(
        pa.Table.from_pylist([dict(s) for s in samples], schema=SAMPLES), tmp_path / "samples.parquet"
    )
    made = huggingface.dataset(str(tmp_path / "samples.parquet"))
    assert isinstance(made, package.Dataset)
    assert made.to_list() == huggingface.dataset(samples).to_list()
    with pytest.raises(ConfigError, match="not a Parquet file of samples"):
        huggingface.dataset(tmp_path / "absent.parquet")


@pytest.mark.parametrize(("name", "reader"), [("rows.parquet", "from_parquet"), ("rows.jsonl", "from_json")])
def test_datasets_reads_the_command_s_files(package: Any, tmp_path: Path, name: str, reader: str) -> None:
    """What `tokentape export --format datasets` writes has no column that datasets could not read."""
    samples = all_samples()

    def make() -> Any:
        return huggingface.rows(samples, experts_per_token=EXPERTS_PER_TOKEN)

    write_rows(tmp_path / name, make)
    read = getattr(package.Dataset, reader)(
        str(tmp_path / name), features=huggingface.features(), cache_dir=str(tmp_path / "cache")
    )
    assert read.to_list() == list(make())


def test_it_survives_the_disk(package: Any, tmp_path: Path) -> None:
    made = huggingface.dataset([*forked(), *single()])
    made.save_to_disk(str(tmp_path / "d"))
    assert package.load_from_disk(str(tmp_path / "d")).to_list() == made.to_list()


@pytest.mark.parametrize("collator", ["DataCollatorForSeq2Seq", "DataCollatorForTokenClassification"])
def test_transformers_pads_it(package: Any, collator: str) -> None:
    """Padding is right, labels -100 there; the trained places are those of the mask."""
    assert package is not None
    transformers, tokenizers, torch = own("transformers"), own("tokenizers"), own("torch")
    samples = [*forked(), *single()]
    made = huggingface.dataset(samples).select_columns(["input_ids", "attention_mask", "labels"])
    model = tokenizers.models.WordLevel({"[PAD]": PAD}, unk_token="[PAD]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), pad_token="[PAD]", padding_side="right"
    )
    batch = getattr(transformers, collator)(tokenizer)([made[i] for i in range(len(made))])
    width = max(len(sample["token_ids"]) for sample in samples)
    for at, sample in enumerate(samples):
        pad = width - len(sample["token_ids"])
        assert batch["input_ids"][at].tolist() == sample["token_ids"] + [PAD] * pad
        assert batch["attention_mask"][at].tolist() == [1] * len(sample["token_ids"]) + [0] * pad
        trained = batch["labels"][at] != huggingface.IGNORED
        assert trained.tolist() == [*map(bool, sample["loss_mask"])] + [False] * pad
        assert torch.equal(batch["labels"][at][trained], batch["input_ids"][at][trained])


def test_the_model_s_own_loss_is_over_the_trained_tokens(package: Any) -> None:
    """A model's loss shifts for itself: it is the mean over the sample's trained tokens, no others."""
    assert package is not None
    transformers, torch = own("transformers"), own("torch")
    config = transformers.LlamaConfig(
        vocab_size=9000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    made = huggingface.dataset(forked())
    for row in made:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            out = model(input_ids=ids, labels=torch.tensor([row["labels"]]))
        found = torch.log_softmax(out.logits[0], dim=-1)
        trained = [at for at, value in enumerate(row["logprobs"]) if value is not None]
        expected = -sum(found[at - 1, row["input_ids"][at]].item() for at in trained) / len(trained)
        assert math.isclose(out.loss.item(), expected, rel_tol=1e-5)
