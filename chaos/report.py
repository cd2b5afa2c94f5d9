"""The table that a run ends with."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from conductor import Conductor
from rich.console import Console
from rich.table import Table
from truth import Account, Generation
from world import Gateway

_MAX_SHOWN = 20


def report(
    console: Console,
    rows: Sequence[Mapping[str, Any]],
    generations: Sequence[Generation],
    account: Account,
    gateway: Gateway,
    conductor: Conductor,
    problems: Sequence[str],
) -> None:
    """Print what was done, what came of it, and the verdict."""
    table = Table(title="chaos", show_header=False)
    table.add_column("what")
    table.add_column("figures")
    exported = {turn["turn_id"]: row["session_id"] for row in rows for turn in row["turns"]}
    acknowledged = {one.turn_id for one in account.acknowledged}
    failures: Counter[str] = Counter()
    for episode in account.episodes:
        failures.update((episode.summary or {}).get("failures", {}))
    branches = Counter(row["branch_reason"] for row in rows)
    prompts: dict[str, set[int]] = defaultdict(set)
    for generation in generations:
        prompts[generation.turn_id].add(len(generation.prompt_ids))
    resumed = {turn_id for turn_id in exported if len(prompts[turn_id]) > 1}
    tokens = sum(sum(row["loss_mask"]) for row in rows)
    starts = gateway.starts_s
    lines = {
        "faults": _counted(conductor.num_faults),
        "gateway": f"{len(starts)} starts, the longest {max(starts):.1f} s; "
        f"{gateway.num_failed_starts} ended by themselves",
        "sessions": f"{len(account.episodes)}, "
        f"{sum(episode.summary is not None for episode in account.episodes)} finished",
        "turns": f"{len(exported)} exported, {tokens:,} tokens trained; "
        f"{len(generations)} generations by the workers",
        "acknowledged": f"{len(acknowledged)} turns, "
        f"{len(account.acknowledged) - len(acknowledged)} of them told twice; "
        f"{len(exported.keys() - acknowledged)} exported that no agent was told of (it had asked twice)",
        "retried": f"{len({(r.agent, r.request) for r in account.retries})} requests, "
        f"{len(account.retries)} tries: {_counted(Counter(r.why for r in account.retries))}",
        "failures": _counted(failures),
        "resumed": f"{len(resumed)} turns went on behind what had been sampled of them",
        "branches": _counted(branches),
        "longest request": f"{_longest_s(account):.1f} s from its first failed try to its reply",
        "longest recovery": f"{_recovery_s(account):.1f} s from a gateway's end to the next reply",
    }
    for name, line in lines.items():
        table.add_row(name, line)
    verdict = f"{len(problems)} VIOLATIONS" if problems else "nothing lost, nothing invented"
    table.add_row("verdict", verdict)
    console.print(table)
    for problem in problems[:_MAX_SHOWN]:
        console.print(f"  {problem}", markup=False, highlight=False)
    if len(problems) > _MAX_SHOWN:
        console.print(f"  … and {len(problems) - _MAX_SHOWN} more")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{num} {name}" for name, num in sorted(counts.items())) or "none"


def _recovery_s(account: Account) -> float:
    """Seconds from a gateway's end to the next acknowledged turn, at the longest."""
    told = sorted(one.at for one in account.acknowledged)
    return max((next((at for at in told if at > kill), kill) - kill for kill in account.kills), default=0.0)


def _longest_s(account: Account) -> float:
    """Seconds from the first failed try of a request to its reply, at the longest."""
    first: dict[tuple[str, int], float] = {}
    for retry in account.retries:
        first.setdefault((retry.agent, retry.request), retry.at)
    told = [(one.at, first.get((one.agent, one.request))) for one in account.acknowledged]
    return max((at - began for at, began in told if began is not None), default=0.0)
