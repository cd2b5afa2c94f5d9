"""`tokentape top`: a running gateway, watched in the terminal."""

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp
import click
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokentape.addresses import is_http
from tokentape.errors import ConfigError
from tokentape.shown import shown

_STAGES = ("plan", "engine", "commit")
_PREFIX = "tokentape_"
_Key = tuple[str, tuple[tuple[str, str], ...]]


class Worker(msgspec.Struct, frozen=True):
    """What is shown of an entry of `GET /workers`."""

    url: str
    state: str
    running: int
    sessions: int
    weight_version: str | None = None
    last_error: str | None = None


class _Workers(msgspec.Struct):
    workers: tuple[Worker, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a gateway said: `samples` by name and labels; `workers` is empty where it has none."""

    at: float
    samples: Mapping[_Key, float] = field(default_factory=dict[_Key, float])
    workers: tuple[Worker, ...] = ()

    def value(self, name: str) -> float:
        """All samples of a name together, 0 where there is none."""
        full = f"{_PREFIX}{name}"
        return sum(value for (found, _), value in self.samples.items() if found == full)

    def by(self, name: str, label: str) -> dict[str, float]:
        """All samples of a name, by one label."""
        full = f"{_PREFIX}{name}"
        return {
            dict(labels).get(label, ""): value
            for (found, labels), value in self.samples.items()
            if found == full
        }


def percentile(now: Snapshot, before: Snapshot, share: float, name: str, **labels: str) -> float | None:
    """Seconds below which this share of what came between two snapshots lies; None where nothing came."""
    full, wanted = f"{_PREFIX}{name}_bucket", tuple(sorted(labels.items()))
    buckets: list[tuple[float, float]] = []
    for (found, have), value in now.samples.items():
        rest = tuple(pair for pair in have if pair[0] != "le")
        if found == full and rest == wanted:
            buckets.append((float(dict(have)["le"]), value - before.samples.get((found, have), 0.0)))
    buckets.sort()
    total = buckets[-1][1] if buckets else 0
    return next((limit for limit, count in buckets if count >= share * total), None) if total else None


@click.command()
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--api-key", envvar="TOKENTAPE_API_KEY", help="The gateway's key.")
@click.option("--once", is_flag=True, help="Print one picture and end.")
def top(url: str, api_key: str | None, once: bool) -> None:
    """Watch a running gateway: turns, tokens, latency, branches, failures, engines."""
    if not is_http(url):
        raise ConfigError(f"{url} must look like http://HOST:PORT: give the gateway's URL")
    with contextlib.suppress(KeyboardInterrupt):  # this is how one stops watching
        asyncio.run(_watch(url.rstrip("/"), api_key, once=once))


async def _watch(url: str, api_key: str | None, *, once: bool) -> None:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limit = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(headers=headers, timeout=limit) as client:
        before, now = Snapshot(0.0), await _ask(client, url)
        if once:
            Console().print(picture(url, now, before))
            return
        with Live(picture(url, now, now), auto_refresh=False, screen=True) as live:
            while True:
                await asyncio.sleep(1.0)
                try:
                    before, now = now, await _ask(client, url)
                except ConfigError as error:  # it may come back
                    live.update(Group(picture(url, now, before), _words(str(error), 400)), refresh=True)
                else:
                    live.update(picture(url, now, before), refresh=True)


async def _ask(client: aiohttp.ClientSession, url: str) -> Snapshot:
    try:
        async with client.get(f"{url}/metrics") as response:
            text = await response.text()
            if response.status != 200:
                raise ConfigError(
                    f"{url}/metrics answered {response.status}: {text[:200]}; are "
                    "the gateway's URL and --api-key right?"
                )
        samples = read_samples(text)
        async with client.get(f"{url}/workers") as response:
            there = response.status == 200
            workers = msgspec.json.decode(await response.read(), type=_Workers).workers if there else ()
    except (aiohttp.ClientConnectionError, TimeoutError) as error:
        raise ConfigError(
            f"no gateway answers at {url}: {error}; is `tokentape serve` running there?"
        ) from error
    except (aiohttp.ClientError, ValueError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"what answers at {url} is not a tokentape gateway ({error}): give the URL that "
            "`tokentape serve` says it listens on"
        ) from error
    return Snapshot(time.monotonic(), samples, workers)


def read_samples(text: str) -> Mapping[_Key, float]:
    """The samples of Prometheus' text format; ValueError where it is another text, or not a gateway's."""
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    if not any(name.startswith(_PREFIX) for name, _ in found):
        raise ValueError("its /metrics have none of tokentape's")
    return found


def _words(text: object, most: int = 120) -> Text:
    """What somebody else says, engines among them: no markup, nothing that acts on the terminal."""
    return Text(shown(str(text), most))


def picture(url: str, now: Snapshot, before: Snapshot) -> Group:
    """What is shown: counts since `before`, or all where that is empty."""
    seconds = max(now.at - before.at, 1e-9) if before.samples else None

    def count(name: str) -> str:
        if seconds is None:
            return f"{now.value(name):,.0f}"
        return f"{(now.value(name) - before.value(name)) / seconds:,.1f}/s"

    prompt, cached = now.value("prompt_tokens_total"), now.value("cached_tokens_total")
    figures = Table(title=_words(url), show_header=False, box=None)
    for name, text in (
        ("turns", count("turns_total")),
        ("tokens sampled", count("sampled_tokens_total")),
        (
            "tokens of prompts",
            f"{count('prompt_tokens_total')}, {cached / prompt if prompt else 0:.0%} cached",
        ),
        ("tokens trained", f"{now.value('trained_tokens_total'):,.0f}"),
        ("turns under way", f"{now.value('active_turns'):.0f}, {now.value('waiting_turns'):.0f} waiting"),
        ("sessions in memory", f"{now.value('sessions_in_memory'):,.0f}"),
        ("branches", _listed(now.by("branches_total", "reason"))),
        ("failures", _listed(now.by("failures_total", "kind"))),
    ):
        figures.add_row(name, _words(text, 400))
    return Group(figures, _stages(now, before), *([_workers(now)] if now.workers else []))


def _listed(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{count:.0f} {name}" for name, count in sorted(counts.items())) or "none"


def _stages(now: Snapshot, before: Snapshot) -> Table:
    table = Table("stage", "p50 up to", "p99 up to")
    rows = [(stage, "stage_seconds", {"stage": stage}) for stage in _STAGES]
    for title, name, labels in (
        *rows,
        ("whole turn", "turn_seconds", {}),
        ("first token", "first_token_seconds", {}),
    ):
        values = [percentile(now, before, share, name, **labels) for share in (0.5, 0.99)]
        table.add_row(title, *(_milliseconds(value, now, name) for value in values))
    return table


def _milliseconds(value: float | None, now: Snapshot, name: str) -> str:
    if value is None:
        return "-"
    if math.isfinite(value):
        return f"{1e3 * value:g} ms"
    limits = [float(le) for le in now.by(f"{name}_bucket", "le")]
    most = max(filter(math.isfinite, limits), default=0.0)
    return f"more than {1e3 * most:g} ms"


def _workers(now: Snapshot) -> Table:
    table = Table("engine", "state", "running", "sessions", "weights", "last error")
    for worker in now.workers:
        cells = (worker.url, worker.state, worker.running, worker.sessions, worker.weight_version)
        table.add_row(*map(_words, cells), _words(worker.last_error, 400) if worker.last_error else "")
    return table
