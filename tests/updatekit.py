"""Weights that change while sessions run: perturbed checkpoints, an updater, a check version by version."""

import asyncio
import contextlib
import itertools
import json
import random
import shutil
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
from safetensors.torch import load_file, save_file

import tokentape
from tokentape.engines.local.forward import Forward
from tokentape.invariants import check_samples

Json = dict[str, Any]


@contextlib.contextmanager
def copied(model_dir: Path, out: Path) -> Generator[dict[str, torch.Tensor]]:
    """A copy of a model with the tensors that they are when the context closes."""
    shutil.copytree(model_dir, out)
    tensors = load_file(out / "model.safetensors")
    yield tensors
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def perturbed(model_dir: Path, out: Path, *, scale: float, seed: int = 0) -> Path:
    """The same model with noise of `scale` standard deviations on every matrix."""
    generator = torch.Generator().manual_seed(seed)
    with copied(model_dir, out) as tensors:
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * scale
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    return out


def endless(model_dir: Path, out: Path) -> Path:
    """The same model, which hardly ever ends a turn: its tests can count on one that is under way."""
    end = json.loads((model_dir / "config.json").read_text())["eos_token_id"]
    with copied(model_dir, out) as tensors:
        tensors["model.embed_tokens.weight"][end] = 0.0  # its logit: what is likely has ten and more
    return out


@dataclass
class Updates:
    """`weights` are the directories of each version, in the order of their coming; `every_s` in seconds."""

    engine_url: str
    directories: Sequence[Path]
    every_s: float
    weights: dict[str, Path] = field(default_factory=dict[str, Path])
    modes: Sequence[str] = ("abort", "retract")

    async def run(self) -> None:
        async with aiohttp.ClientSession(raise_for_status=True) as http:
            for number, mode in enumerate(itertools.cycle(self.modes), start=len(self.weights)):
                await asyncio.sleep(self.every_s)
                await self.update(http, str(number), mode)

    async def update(self, http: aiohttp.ClientSession, version: str, mode: str) -> None:
        directory = self.directories[int(version) % len(self.directories)]
        await self._post(http, "/pause_generation", {"mode": mode})
        body = {"model_path": str(directory), "weight_version": version}
        await self._post(http, "/update_weights_from_disk", body)
        self.weights[version] = directory
        await self._post(http, "/continue_generation", {})

    async def _post(self, http: aiohttp.ClientSession, path: str, body: Json) -> None:
        async with http.post(self.engine_url + path, json=body) as answer:
            await answer.read()


@contextlib.asynccontextmanager
async def updating(updates: Updates) -> AsyncGenerator[None]:
    """Version 0, the first directory, before all else; then the next again and again."""
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        await updates.update(http, "0", "abort")
    task = asyncio.create_task(updates.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def sessions(
    engine_url: str, model_dir: Path, *, num_sessions: int, num_turns: int, max_tokens: int
) -> list[Json]:
    """Conversations at temperature 1, half of them streamed; all of their samples."""
    async with tokentape.open(model=model_dir, engine=engine_url) as tape:

        async def talk(number: int) -> list[Json]:
            rng = random.Random(number)
            session = tape.session(f"s{number}")
            messages: list[Any] = [{"role": "system", "content": "You tell long stories."}]
            async with session.openai(max_retries=0) as client:
                for _ in range(num_turns):
                    messages.append({"role": "user", "content": f"Tell a story about {rng.randint(1, 999)}."})
                    fields: Json = {"model": "m", "messages": messages, "max_tokens": max_tokens}
                    if number % 2:
                        stream = await client.chat.completions.create(**fields, stream=True)
                        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
                    else:
                        reply = await client.chat.completions.create(**fields)
                        text = reply.choices[0].message.content or ""
                    messages.append({"role": "assistant", "content": text})
            summary = await session.summary()
            assert (summary["turns"], summary["failures"]) == (num_turns, {})
            return await session.samples()

        rows = await asyncio.gather(*(talk(n) for n in range(num_sessions)))
    return [row for samples in rows for row in samples]


@dataclass
class Checked:
    """What a file of samples says of the weights: per version differences from them, and from the others."""

    num_turns: int = 0
    num_mixed: int = 0
    own: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    other: list[float] = field(default_factory=list)

    @property
    def worst(self) -> float:
        return max(max(differences) for differences in self.own.values())


def check(rows: Sequence[Json], weights: Mapping[str, Path]) -> Checked:
    """Recompute every trained token under the weights that its span names, and under the others."""
    assert check_samples(rows) == []
    forwards = {directory: Forward(directory) for directory in set(weights.values())}
    checked = Checked()
    for row in rows:
        under = {d: [0.0, *forward.logprobs(row["token_ids"])] for d, forward in forwards.items()}
        for turn in row["turns"]:
            within = [v for v in row["weight_versions"] if turn["start"] <= v["start"] < turn["end"]]
            checked.num_turns += turn["trained"]
            checked.num_mixed += len(within) > 1
        for span in row["weight_versions"]:
            mine = weights[span["version"]]
            for at in range(span["start"], span["end"]):
                recorded = row["logprobs"][at]
                checked.own[span["version"]].append(abs(recorded - under[mine][at]))
                checked.other += [abs(recorded - v[at]) for d, v in under.items() if d != mine]
    return checked
