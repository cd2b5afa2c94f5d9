"""prime-rl and verifiers: a sample as a `TrainingSample`, and as the `Branch` that prime-rl makes it of.

Read in verifiers 0.4.0, `verifiers/v1/graph.py` and `trace.py`, and in the public source of
PrimeIntellect-ai/prime-rl (`transport/types.py`, `orchestrator/trajectories.py`), which is not on PyPI and
whose `TrainingSample` changes often: rows have the names that its flat form has (`token_ids`, `mask`, …).
Before it, prime-rl split a sample into `prompt_ids` and `completion_ids`; that form is not written.

- No split: `token_ids`, `mask` (bools), `logprobs` are over the whole tape of N tokens, not shifted. A
  log-probability is 0.0 where the mask is 0, and only there. verifiers itself fills a sampled token that
  lacks one with 0.0; here it is an error.
- A turn that another sample trains is context: mask false. In a `Branch` its node is `sampled` and its mask
  all false, as prime-rl reads it: it too trains a node that branches share once.
- `temperatures`: one a token, what the turn was sampled with, 1.0 at tokens that are not trained; empty, as
  prime-rl leaves it for its orchestrator to fill, where a trained turn's temperature was not given.
- `reward`: one a sample, None where there is none. Rewards of turns are `turn_rewards`, one a trained turn,
  which prime-rl does not have. Advantages are its orchestrator's: a row has none.
- `trace_id` is the session, `branch_index` counts its samples; `group_id` and `weight_versions` (spans) stand
  beside: prime-rl gets groups from its dispatcher.
- `routed_experts`: our N-1 rows, `[N-1][layers][experts a token]`; prime-rl itself fills the last token's
  with zeros, and so does `branches`, where verifiers wants N rows of uint8.
- No padding: prime-rl packs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false
from tokentape.errors import ConfigError
from tokentape.export.row import Row, checked, experts_of, filled, turns_of
from tokentape.types import Json

CONVENTION = (
    "the whole tape; mask and log-probabilities over it, not shifted, 0.0 where the mask is 0; one reward a "
    "sample; advantages are prime-rl's"
)


def rows(
    samples: Sequence[Row], *, env_name: str = "", experts_per_token: int | None = None
) -> Iterator[Json]:
    """Samples as the fields of prime-rl's `TrainingSample`, one each, with what it has no place for.

    Raises:
        ConfigError: a sample is not sound, or has routed experts that `experts_per_token` does not fit.
    """
    indices: dict[str, int] = {}
    for sample in samples:
        checked(sample)
        index = indices[sample["session_id"]] = indices.get(sample["session_id"], -1) + 1
        row: Json = {
            "token_ids": list(sample["token_ids"]),
            "mask": [bool(trained) for trained in sample["loss_mask"]],
            "logprobs": filled(sample["logprobs"]),
            "temperatures": _temperatures(sample),
            "env_name": env_name,
            "reward": sample["reward"],
            "trace_id": sample["session_id"],
            "branch_index": index,
            "turn_rewards": [turn["reward"] for turn in sample["turns"] if turn["trained"]],
            "weight_versions": [dict(span) for span in sample["weight_versions"]],
            **{key: sample[key] for key in ("sample_id", "group_id", "truncated")},
        }
        if (experts := experts_of(sample, experts_per_token)) is not None:
            row["routed_experts"] = experts
        yield row


def branches(samples: Sequence[Row], *, experts_per_token: int | None = None) -> list[Any]:
    """Samples as verifiers' own `Branch`es, one each: a node a message, its tokens, mask, log-probabilities.

    What a turn was given stands on the last of its messages, since a sample keeps no cut between them; what
    it sampled on its reply. Joined they are the tape.

    Raises:
        ConfigError: as `rows`; verifiers does not know a message's shape, or an expert is no uint8.
    """
    from verifiers.v1.trace import Branch

    return [
        Branch(index=row["branch_index"], nodes=_nodes(sample, row.get("routed_experts")))
        for sample, row in zip(samples, rows(samples, experts_per_token=experts_per_token), strict=True)
    ]


def _nodes(sample: Row, experts: list[list[list[int]]] | None) -> list[Any]:
    nodes, end = list[Any](), 0
    for turn, (given, reply) in zip(sample["turns"], turns_of(sample), strict=True):
        if given:
            nodes += [_node(sample, message, end, end) for message in given[:-1]]
            nodes.append(_node(sample, given[-1], end, turn["start"]))
            end = turn["start"]
        nodes.append(_node(sample, reply, end, turn["end"], sampled=True))
        end = turn["end"]
    if end != len(sample["token_ids"]):
        raise ConfigError(f"sample {sample['sample_id']}: its last turn ends at {end}, its tape does not")
    if experts is not None:
        _give_experts(sample, nodes, experts)
    return nodes


def _node(sample: Row, message: Json, start: int, end: int, *, sampled: bool = False) -> Any:
    from pydantic import ValidationError
    from verifiers.v1.graph import MessageNode

    logprobs = sample["logprobs"][start:end]
    try:
        return MessageNode(
            message=_message(message),  # pyright: ignore[reportArgumentType]
            sampled=sampled,
            token_ids=list(sample["token_ids"][start:end]),
            mask=[bool(trained) for trained in sample["loss_mask"][start:end]],
            logprobs=[logprob for logprob in logprobs if logprob is not None],
        )
    except ValidationError as error:
        raise ConfigError(
            f"sample {sample['sample_id']}: verifiers has no such message of {message['role']!r}: {error}"
        ) from error


def _message(message: Json) -> Json:
    """OpenAI's shape as verifiers has it: a tool call is flat."""
    if not message.get("tool_calls"):
        return message
    calls = [{"id": call["id"], **call["function"]} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _give_experts(sample: Row, nodes: list[Any], experts: list[list[list[int]]]) -> None:
    import numpy as np

    values = np.asarray(experts)
    if values.max(initial=0) > np.iinfo(np.uint8).max:
        raise ConfigError(
            f"sample {sample['sample_id']}: verifiers' experts are uint8, {values.max()} is not"
        )
    last = np.zeros((1, *values.shape[1:]), dtype=np.uint8)
    rows_of_all, start = np.concatenate([values.astype(np.uint8), last]), 0
    for node in nodes:
        node.routed_experts = rows_of_all[start : start + len(node.token_ids)]
        start += len(node.token_ids)


def _temperatures(sample: Row) -> list[float]:
    sampling = msgspec.json.decode(sample["sampling"])
    out = [1.0] * len(sample["token_ids"])
    for turn, settings in zip(sample["turns"], sampling, strict=True):
        if turn["trained"] and turn["end"] > turn["start"]:
            if settings.get("temperature") is None:
                return []
            out[turn["start"] : turn["end"]] = [float(settings["temperature"])] * (
                turn["end"] - turn["start"]
            )
    return out
