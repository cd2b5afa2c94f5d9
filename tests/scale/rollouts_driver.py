"""A trainer that dies: it takes groups from `tokentape.rollouts` and writes down what it got.

python rollouts_driver.py GATEWAY JOURNAL NOTES GROUPS GROUP_SIZE local|ray
"""

import json
import sys
from pathlib import Path
from typing import Any

import aiohttp

import tokentape
from tokentape.rollout import Episode, OnRay

RAY = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 100 * 2**20}


async def episode(task: Any, episode: Episode) -> float:
    """One question, one short answer; what is right does not matter here, only that it is said once."""
    body = {
        "model": episode.model,
        "messages": [{"role": "user", "content": task["question"]}],
        "max_tokens": 8,
        "temperature": 1.0,
    }
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        for _ in range(2):
            async with http.post(f"{episode.base_url}/chat/completions", json=body) as answer:
                message = (await answer.json())["choices"][0]["message"]
            body["messages"] += [message, {"role": "user", "content": "Are you sure?"}]
    return float(len(message["content"] or "") % 2)


def main(gateway: str, journal: str, notes: str, num_groups: int, group_size: int, on: str) -> None:
    tasks = [{"question": f"What is {n} + {n + 1}?"} for n in range(num_groups)]
    with (
        tokentape.rollouts(
            episode,
            tasks,
            gateway=gateway,
            group_size=group_size,
            concurrency=32 if on == "local" else 4,
            on=OnRay(num_cpus=0.5, init=RAY) if on == "ray" else "local",
            deadline_s=60,
            run="scale",
            journal=journal,
        ) as groups,
        Path(notes).open("a") as file,
    ):
        for group in groups:
            table = group.table
            note = {
                "group": group.group_id,
                "complete": group.complete,
                "sessions": group.session_ids,
                "in_table": table["session_id"].to_pylist(),
                "trained": sum(map(sum, table["loss_mask"].to_pylist())),
                "rewards": group.rewards,
                "failures": [failure.message for failure in group.failures],
            }
            file.write(json.dumps(note) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
