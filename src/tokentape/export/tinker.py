"""Tinker: a sample as one `Datum`, what `forward_backward` takes for its policy losses.

Read in tinker 0.38.0, `tinker/types/datum.py`, and tinker-cookbook 0.6.1, `rl/data_processing.py` and
`rl/train.py`.

- No split. `model_input` is all N tokens but the last, `target_tokens` all but the first: Tinker shifts
  nothing, so all columns of `loss_fn_inputs` have N-1 entries, entry i of token i + 1.
- `mask`, `logprobs`, `advantages`: parallel to `target_tokens`. Mask and log-probability are 0.0 where the
  sample's mask is 0, and only there.
- Advantages are the caller's, one a sample, spread over its trained tokens, 0.0 elsewhere. That 0.0 is what
  keeps other tokens out of the loss: Tinker's losses read no mask, and its cookbook takes `mask` out before
  it sends a datum. Without advantages a row has none, and no loss takes it.
- A turn that another sample trains is context: mask and advantage 0. The cookbook's own `trajectory_to_data`
  trains each action of each trajectory it is given.
- Rewards: a datum has none. A row carries `reward` (None where there is none), `turn_rewards`, one a trained
  turn, `group_id` and `session_id` to make advantages from, and `weight_versions`, spans over the tape.
- No padding: a datum has its own length. `datums` takes no sample of fewer than two tokens.
- Routed experts: Tinker replays none: they are an error.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
from tokentape.errors import ConfigError
from tokentape.export.row import Row, checked, filled
from tokentape.types import Json

CONVENTION = (
    "all tokens but the last, and targets shifted by one; mask, log-probabilities and advantages over the "
    "targets, 0.0 where the mask is 0; advantages are the caller's, one a sample"
)


def rows(samples: Sequence[Row], *, advantages: Mapping[str, float] | None = None) -> Iterator[Json]:
    """Samples as plain values of a `Datum`, one each, with what advantages are made from.

    `advantages` has one for each `sample_id` of these samples; without it rows have no advantages. Sample ids
    are a session's own: where several sessions share one, give `"session_id/sample_id"`.

    Raises:
        ConfigError: a sample is not sound, has fewer than two tokens or routed experts, or `advantages` has
            no finite number for it, or one that could be for another sample too.
    """
    known = None if advantages is None else _by_sample(samples, advantages)
    for index, sample in enumerate(samples):
        checked(sample)
        _refuse(sample)
        inputs: Json = {
            "target_tokens": list(sample["token_ids"][1:]),
            "logprobs": filled(sample["logprobs"][1:]),
            "mask": [float(trained) for trained in sample["loss_mask"][1:]],
        }
        if known is not None:
            inputs["advantages"] = [known[index] if trained else 0.0 for trained in sample["loss_mask"][1:]]
        yield {
            "model_input": list(sample["token_ids"][:-1]),
            "loss_fn_inputs": inputs,
            "reward": sample["reward"],
            "turn_rewards": [turn["reward"] for turn in sample["turns"] if turn["trained"]],
            "weight_versions": [dict(span) for span in sample["weight_versions"]],
            **{key: sample[key] for key in ("session_id", "sample_id", "group_id")},
        }


def datums(samples: Sequence[Row], advantages: Mapping[str, float]) -> list[Any]:
    """Samples as Tinker's own `Datum`s, one each, in their order, equal to what its cookbook builds.

    `target_tokens` int64[N-1], `logprobs`, `advantages`, `mask` float32[N-1]. Take `mask` out before
    `forward_backward`, as the cookbook does: its losses do not know the name.

    Raises:
        ConfigError: as `rows`.
    """
    import tinker

    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(row["model_input"]),
            loss_fn_inputs={
                name: tinker.TensorData(
                    data=values,
                    dtype="int64" if name == "target_tokens" else "float32",
                    shape=[len(values)],
                )
                for name, values in row["loss_fn_inputs"].items()
            },
        )
        for row in rows(samples, advantages=advantages)
    ]


def _by_sample(samples: Sequence[Row], advantages: Mapping[str, float]) -> list[float]:
    sessions: dict[str, set[str]] = {}
    for sample in samples:
        sessions.setdefault(sample["sample_id"], set()).add(sample["session_id"])
    out: list[float] = []
    for sample in samples:
        name = sample["sample_id"]
        full = f"{sample['session_id']}/{name}"
        if full not in advantages and name in advantages and len(sessions[name]) > 1:
            raise ConfigError(
                f"sample {name}: sessions {sorted(sessions[name])} have one of that id; name its advantage "
                f"{full!r}"
            )
        value = advantages.get(full, advantages.get(name))
        if value is None or not math.isfinite(value):
            raise ConfigError(
                f"sample {name} of session {sample['session_id']}: its advantage is {value!r}, "
                "not a finite number"
            )
        out.append(float(value))
    return out


def _refuse(sample: Row) -> None:
    name = f"sample {sample['sample_id']}"
    if len(sample["token_ids"]) < 2:
        raise ConfigError(f"{name} has fewer than two tokens, nothing to predict: leave it out")
    if sample["routed_experts"] is not None:
        raise ConfigError(
            f"{name} has routed experts, and Tinker replays none: set the column routed_experts to None to "
            "train without"
        )
