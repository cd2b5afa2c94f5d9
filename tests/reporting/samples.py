"""Samples to report on: sound ones, as many as wanted, with what the caller says otherwise."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tokentape.schema import SAMPLES

Json = dict[str, Any]


def sample(
    name: str,
    *,
    session: str | None = None,
    group: str | None = None,
    turns: int = 2,
    prompt: int = 10,
    sampled: int = 5,
    bridge: int = 3,
    logprob: float = -0.25,
    versions: tuple[str, ...] = ("1",),
    statuses: tuple[str, ...] = (),
    shared: int = 0,
    **columns: Any,
) -> Json:
    """A sample of so many turns; the first `shared` of them are trained elsewhere, versions take turns."""
    ids: list[int] = [*range(prompt)]
    mask, logprobs = [0] * prompt, [None] * prompt
    spans, entries = list[Json](), list[Json]()
    truncated = columns.get("truncated", False)
    for turn in range(turns):
        if turn:
            ids, mask, logprobs = ids + [7] * bridge, mask + [0] * bridge, logprobs + [None] * bridge
        start, trained = len(ids), turn >= shared
        ids = ids + [20 + turn] * sampled
        mask = mask + [int(trained)] * sampled
        logprobs = logprobs + [logprob if trained else None] * sampled
        if trained and sampled:
            version = versions[turn % len(versions)]
            spans.append({"version": version, "start": start, "end": len(ids)})
        entries.append(
            {
                "turn_id": name if turn == turns - 1 else f"{name}.{turn}",
                "start": start,
                "end": len(ids),
                "finish_reason": "length" if truncated and turn == turns - 1 else "stop",
                "trained": trained,
                "parse_status": statuses[turn] if turn < len(statuses) else "ok",
                "label": columns.get("label", "main"),
                "logprob_basis": "sampled",
                "reward": None,
            }
        )
    return {
        "session_id": session or f"s-{name}",
        "sample_id": name,
        "group_id": group,
        "branch_reason": "root",
        "label": "main",
        "label_by": "inferred",
        "token_ids": ids,
        "loss_mask": mask,
        "logprobs": logprobs,
        "weight_versions": spans,
        "sampling_logprobs": None,
        "support": None,
        "routed_experts": None,
        "num_prompt_tokens": prompt,
        "turns": entries,
        "reward": 1.0,
        "truncated": truncated,
        "messages": "[]",
        "tools": "[]",
        "sampling": json.dumps([{}] * turns),
        "metadata": "{}",
        **columns,
    }


def write(path: Path, rows: Iterable[Json]) -> Path:
    """A Parquet file of them."""
    pq.write_table(pa.Table.from_pylist([*rows], schema=SAMPLES), path, row_group_size=100)
    return path


def many(count: int, *, seed: int = 0) -> list[Json]:
    """A run as it might be: groups of eight, some branches, updates of the weights, a few that are odd."""
    rng, rows = random.Random(seed), list[Json]()
    for number in range(count):
        skill = 0.2 + 0.6 * number / count
        cut = rng.random() < 0.06
        branches = 1 + (rng.random() < 0.15) + (rng.random() < 0.05)
        for branch in range(branches):
            version = 3 + 12 * number // count
            turns = 1 + min(int(rng.expovariate(0.45)), 11)
            rows.append(
                sample(
                    f"t-{number:05}-{branch}",
                    session=f"s-{number:05}",
                    group=f"g-{number // 8}",
                    turns=turns,
                    prompt=int(rng.lognormvariate(6, 0.25)),
                    sampled=1 + int(rng.lognormvariate(4.2, 0.8)),
                    bridge=1 + int(rng.lognormvariate(3.8, 0.6)),
                    logprob=-rng.lognormvariate(-1.2, 0.4),
                    versions=(str(version), str(version + rng.choice((0, 0, 0, 1, 2)))),
                    statuses=tuple(
                        rng.choices(("ok", "invalid_json", "unclosed", "unknown_tool"), (95, 2, 1, 2))[0]
                        for _ in range(turns)
                    ),
                    shared=min(branch, turns - 1),
                    branch_reason="root"
                    if not branch
                    else rng.choice(("resampled", "forked", "reasoning_dropped", "edited_history")),
                    label=rng.choice(("main", "main", "main", "subagent")) if branch else "main",
                    reward=None if rng.random() < 0.01 else float(rng.random() < skill) - 0.1 * cut,
                    truncated=cut,
                )
            )
    return rows
