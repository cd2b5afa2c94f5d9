"""`tokentape report`: every figure against counting by hand, hostile texts, the page as it is read."""

import contextlib
import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from rich.console import Console
from samples import Json, many, sample, write

import tokentape
from tokentape.cli import main
from tokentape.engines.local import LocalEngine
from tokentape.engines.server import make_app, serve
from tokentape.errors import ConfigError
from tokentape.model import TINY_MODEL
from tokentape.report import Report, report
from tokentape.report.links import checked_viewer, sample_link
from tokentape.report.page import POLICY, page
from tokentape.report.show import summary
from tokentape.report.spread import OTHERS, Names, Spread
from tokentape.schema import SAMPLES, SCHEMA_VERSION, VERSION_KEY
from tokentape.shown import shown
from tokentape.testing import byte_level_tokenizer, write_model_dir
from tokentape.tokenizer import Tokenizer

VOID = {"meta", "br", "line", "rect", "circle"}


class Page(HTMLParser):
    """Every tag with its attributes, every piece of text; tags must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID or tag in ("rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attrs for name, attrs in self.tags if name == tag)


@pytest.fixture(scope="module")
def rows() -> list[Json]:
    return many(200, seed=1)


@pytest.fixture(scope="module")
def found(rows: list[Json], tmp_path_factory: pytest.TempPathFactory) -> Report:
    return report(write(tmp_path_factory.mktemp("report") / "f.parquet", rows))


def test_figures_are_what_counting_gives(rows: list[Json], found: Report) -> None:
    turns = [turn for row in rows for turn in row["turns"] if turn["trained"]]
    assert (found.num_samples, found.num_turns) == (len(rows), len(turns))
    assert found.num_sessions == len({row["session_id"] for row in rows}) == 200
    assert found.num_truncated == sum(row["truncated"] for row in rows)
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    assert found.rewards.mean == pytest.approx(statistics.fmean(rewards))
    assert found.rewards.deviation == pytest.approx(statistics.pstdev(rewards))
    assert (found.rewards.count, found.rewards.missing) == (len(rewards), len(rows) - len(rewards))
    assert {b.low: b.count for b in found.rewards.bins} == Counter(rewards)
    lengths = sorted(len(row["token_ids"]) for row in rows)
    assert (found.tokens.smallest, found.tokens.largest) == (lengths[0], lengths[-1])
    assert found.tokens.median == pytest.approx(statistics.median_low(lengths), rel=0.005)
    assert sum(b.count for b in found.tokens.bins) == len(rows)
    for one in found.tokens.bins:
        assert one.count == pytest.approx(sum(one.low <= n < one.high for n in lengths), abs=2)
    means = [statistics.fmean(x) for row in rows if (x := [v for v in row["logprobs"] if v is not None])]
    assert found.logprobs.mean == pytest.approx(statistics.fmean(means), rel=1e-5)
    assert found.branch_reasons == Counter(row["branch_reason"] for row in rows)
    assert found.parse_statuses == Counter(turn["parse_status"] for turn in turns)
    assert found.finish_reasons == Counter(turn["finish_reason"] for turn in turns)
    assert found.completions.mean == pytest.approx(statistics.fmean(t["end"] - t["start"] for t in turns))


def test_the_budget_adds_up(rows: list[Json], found: Report) -> None:
    budget = found.budget
    assert budget.total == sum(len(row["token_ids"]) for row in rows)
    assert budget.trained == sum(sum(row["loss_mask"]) for row in rows)
    assert budget.prompts == sum(row["num_prompt_tokens"] for row in rows)
    shared = [t for row in rows for t in row["turns"] if not t["trained"]]
    assert budget.repeated == sum(t["end"] - t["start"] for t in shared) > 0


def test_groups(tmp_path: Path) -> None:
    rewards = {"a": [1.0, 1.0, 1.0], "b": [0.0, 1.0], "c": [1.0], "d": [None, 0.5]}
    rows = [
        sample(f"{g}{n}", group=g, reward=r) for g, all_of in rewards.items() for n, r in enumerate(all_of)
    ]
    found = report(write(tmp_path / "f.parquet", [*rows, sample("alone")]))
    assert (found.groups.num_groups, found.groups.num_equal, found.groups.num_ungrouped) == (4, 1, 1)
    assert found.groups.sizes.largest == 3


def test_branches_of_one_session_are_no_group(tmp_path: Path) -> None:
    rows = [sample(f"a{n}", session="A", group="g") for n in range(3)]
    rows += [sample("b", group="h"), sample("c", group="h"), sample("d", group="h", session="s-c")]
    found = report(write(tmp_path / "f.parquet", rows))
    assert (found.groups.num_groups, found.groups.num_equal) == (2, 1)
    assert "2 groups of 3 samples. In 1 (50%) all rewards are equal" in page(found)


@pytest.mark.parametrize("size", [4, 5, 6, 8])
def test_a_reward_far_from_its_groups(tmp_path: Path, size: int) -> None:
    rows = [sample(f"g{g}m{m}", group=f"g{g}", reward=g / 10) for g in range(20) for m in range(size)]
    rows[0]["reward"] = 100.0
    (odd,) = report(write(tmp_path / "f.parquet", rows)).odd
    assert (odd.sample_id, [one.fact for one in odd.oddities]) == ("g0m0", ["reward"])
    rows[1]["reward"] = 100.0  # two of so few are no outliers
    assert report(write(tmp_path / "f.parquet", rows)).odd == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_says_nothing_of_its_group(tmp_path: Path, bad: float) -> None:
    rows = [sample(f"g{g}m{m}", group=f"g{g}", reward=g / 10) for g in range(5) for m in range(8)]
    rows[0]["reward"] = bad
    found = report(write(tmp_path / "f.parquet", rows))
    assert found.odd == ()
    assert (found.groups.num_equal, found.rewards.missing) == (5, 1)


@pytest.mark.parametrize(
    "rewards",
    [
        [1.7976931348623157e308, -1.7976931348623157e308, 0.0],
        [1e200, 1.0, 2.0],
        [5e-324, 0.0, 1e-323],
        [1.7e308, 1e300, 3.0],
        [1e-300, 1e-200, 1e300],
    ],
)
def test_rewards_of_any_size(tmp_path: Path, rewards: list[float]) -> None:
    rows = [sample(f"r{n}", group="g", reward=r) for n, r in enumerate(3 * rewards)]
    found = report(write(tmp_path / "f.parquet", rows))
    assert sum(one.count for one in found.rewards.bins) == 9
    assert len(max(re.findall(r"[\d,.e+-]+", Page(page(found)).text), key=len)) < 30
    assert len(max(re.findall(r"[\d,.e+-]+", printed(found)), key=len)) < 30


def test_a_spread_far_from_zero() -> None:
    spread = Spread()
    for value in (1e9 + 1, 1e9 + 2, 1e9 + 3):
        spread.add(value)
    assert spread.distribution().deviation == pytest.approx(math.sqrt(2 / 3))


def test_older_and_newer_files(tmp_path: Path, rows: list[Json], found: Report) -> None:
    """One of version 1 is read; one of a version that is not known yet might mean something else."""
    path, newer = tmp_path / "f.parquet", str(SCHEMA_VERSION + 1)
    later = ("group_id", "label", "label_by", "sampling_logprobs", "support", "routed_experts")
    gone = ("label", "logprob_basis", "reward")
    turns = [[{k: v for k, v in turn.items() if k not in gone} for turn in row["turns"]] for row in rows]
    table = pa.Table.from_pylist(rows, schema=SAMPLES).drop_columns([*later, "turns"])
    table = table.append_column("turns", pa.array(turns))
    pq.write_table(table.replace_schema_metadata({VERSION_KEY: "1"}), path)
    read = report(path)
    assert (read.rewards, read.staleness, read.turns) == (found.rewards, found.staleness, found.turns)
    assert read.labels == {"(not recorded)": len(rows)}
    assert (read.groups.num_groups, [*read.logprob_bases]) == (0, ["sampled"])
    current = pa.Table.from_pylist(rows, schema=SAMPLES)
    pq.write_table(current.replace_schema_metadata({VERSION_KEY: newer}), path)
    with pytest.raises(ConfigError, match="use a newer tokentape"):
        report(path)


def test_staleness(tmp_path: Path) -> None:
    rows = [
        sample("a", versions=("9",)),
        sample("b", versions=("9", "10")),
        sample("c", versions=("12",), turns=1),
        sample("d", turns=1, shared=1),  # nothing is trained: of no version
    ]
    stale = report(write(tmp_path / "f.parquet", rows)).staleness
    assert [(v.version, v.age, v.num_tokens, v.num_samples) for v in stale.versions] == [
        ("9", 2, 15, 2),  # by number: 10 is newer than 9, whatever came first
        ("10", 1, 5, 1),
        ("12", 0, 5, 1),
    ]
    assert stale.num_mixed == 1
    assert stale.mean_age == pytest.approx((2 * 15 + 5) / 25)
    assert {b.low: b.count for b in stale.ages.bins} == {0: 1, 2: 2}  # of the oldest token
    assert {b.low: b.count for b in stale.spans.bins} == {0: 2, 1: 1}


@pytest.mark.parametrize("form", ["step-{}", "v{}", "run1.{}", "{}"])
def test_versions_are_ordered_by_the_numbers_in_their_names(tmp_path: Path, form: str) -> None:
    """Rows come by session: their order says nothing of the weights'."""
    rows = [sample(f"t{n}", turns=1, versions=(form.format(n),)) for n in (20, 4, 8, 100)]
    stale = report(write(tmp_path / "f.parquet", rows)).staleness
    expected = [(form.format(n), age) for n, age in ((4, 3), (8, 2), (20, 1), (100, 0))]
    assert [(v.version, v.age) for v in stale.versions] == expected
    assert stale.mean_age == 1.5


def test_versions_without_an_order_have_no_ages(tmp_path: Path) -> None:
    named = [sample("a", versions=("warm",)), sample("b", versions=("default", "warm"))]
    found = report(write(tmp_path / "g.parquet", named))
    stale = found.staleness
    assert [(v.version, v.age) for v in stale.versions] == [("warm", None), ("default", None)]
    assert (stale.mean_age, stale.ages.count, stale.spans.count, stale.num_mixed) == (None, 0, 0, 1)
    assert "Which is older nobody knows" in page(found)
    assert "in no known order" in printed(found)


def printed(found: Report) -> str:
    console = Console(record=True, width=200)
    console.print(summary(found))
    return console.export_text()


def test_oddities_are_found_and_explained(tmp_path: Path) -> None:
    usual = [sample(f"u{n:02}", group="g", logprob=-0.25 - n / 1000, reward=0.0) for n in range(60)]
    odd = {
        "reward": sample("reward", group="g", reward=1.0),
        "long": sample("long", group="g", reward=0.0, prompt=900),
        "short": sample("short", group="g", reward=0.0, prompt=1, sampled=2),
        "many_turns": sample("turns", group="g", reward=0.0, turns=9),
        "unlikely": sample("unlikely", group="g", reward=0.0, logprob=-3.0),
        "malformed": sample("malformed", group="g", reward=0.0, statuses=("invalid_json",)),
        "truncated": sample("truncated", group="g", reward=0.0, truncated=True),
        "mixed_weights": sample("mixed", group="g", reward=0.0, versions=("1", "2")),
        "untrained": sample("untrained", group="g", reward=0.0, shared=2),
    }
    branches = [sample(f"b{n}", session="many", group="g", reward=0.0) for n in range(3)]
    found = report(write(tmp_path / "f.parquet", [*usual, *odd.values(), *branches]))
    facts = {one.sample_id: {each.fact for each in one.oddities} for one in found.odd}
    assert len(found.odd) == 10
    for fact, row in odd.items():
        assert fact in facts[row["sample_id"]]
    [branch] = [one for one in found.odd if one.session_id == "many"]
    assert [each.words for each in branch.oddities] == ["its session has 3 branches; at least half have 1"]
    words = {each.fact: each.words for one in found.odd for each in one.oddities}
    assert words["reward"].startswith("reward 1: 8.")
    assert "(invalid_json)" in words["malformed"]
    total = len(usual) + len(odd) + len(branches)
    for one in found.odd:
        assert one.bits == pytest.approx(sum(math.log2(1 / each.share) for each in one.oddities))
        assert all(each.share * total == pytest.approx(round(each.share * total)) for each in one.oddities)
    assert [one.bits for one in found.odd] == sorted((one.bits for one in found.odd), reverse=True)


def test_what_most_samples_have_is_not_odd(tmp_path: Path) -> None:
    rows = [sample(f"s{n}", truncated=n < 6, reward=None) for n in range(10)]
    assert report(write(tmp_path / "f.parquet", rows)).odd == ()
    rows = [sample(f"s{n}", truncated=n < 5, reward=None) for n in range(10)]
    assert len(report(write(tmp_path / "f.parquet", rows)).odd) == 5


def test_of_those_that_are_alike_the_farthest_out_are_told(tmp_path: Path) -> None:
    usual = [sample(f"u{n:02}") for n in range(50)]
    long = [sample(f"l{n:02}", prompt=500 + 7 * n % 15) for n in range(15)]
    found = report(write(tmp_path / "f.parquet", [*usual, *long]))
    lengths = sorted((len(row["token_ids"]) for row in long), reverse=True)
    assert sorted((one.num_tokens for one in found.odd), reverse=True) == lengths[:10]


def test_order_of_rows_does_not_matter(rows: list[Json], found: Report, tmp_path: Path) -> None:
    again = report(write(tmp_path / "f.parquet", rows[::-1]))
    assert again.odd == found.odd
    assert again.tokens.bins == found.tokens.bins


def test_drift(tmp_path: Path) -> None:
    write_model_dir(tmp_path)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = byte_level_tokenizer().encode("hello").ids
    split = [i for c in "hello" for i in byte_level_tokenizer().encode(c).ids]
    assert len(ids) == 1 < len(split)
    rows = [sample("good", sampled=1, turns=1), sample("drifts", sampled=5, turns=1), sample("x", turns=1)]
    rows[0]["token_ids"][-1:] = ids
    rows[1]["token_ids"][-5:] = split
    rows[2]["token_ids"][-1] = 10**6
    drift = report(write(tmp_path / "f.parquet", rows), tokenizer=tokenizer).drift
    assert drift is not None
    assert (drift.num_turns, drift.num_drifted, drift.num_tokens_in_drifted) == (3, 1, 5)
    assert (drift.num_unknown, drift.num_tokens) == (1, 11)


def test_tokens_without_a_logprob_are_told(tmp_path: Path) -> None:
    rows = [sample("a", turns=1), sample("b", turns=1)]
    rows[0]["logprobs"][-1] = None
    rows[1]["logprobs"][-2] = float("nan")
    found = report(write(tmp_path / "f.parquet", rows))
    assert found.num_without_logprob == 2
    assert found.logprobs.mean == pytest.approx(-0.25)  # NaN spoils nothing
    assert "no finite log-probability" in page(found)


HOSTILE = (
    '</style><script>alert(1)</script><img src=x onerror="alert(1)">&amp;\x1b[31m\x00\u202egnp.exe\n"\'`'
)


def hostile_rows() -> list[Json]:
    names = ("session_id", "group_id", "branch_reason", "label")
    rows = [sample(f"s{n:02}") for n in range(12)]
    odd = sample(HOSTILE, statuses=(HOSTILE,), versions=(HOSTILE, "javascript:alert(1)"), truncated=True)
    odd |= dict.fromkeys(names, HOSTILE)
    for turn in odd["turns"]:
        turn["finish_reason"] = turn["logprob_basis"] = HOSTILE
    return [*rows, odd]


def test_hostile_texts_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "<b>&.parquet", hostile_rows())
    found = report(path)
    html = page(found)
    seen = Page(html)
    tags = {name for name, _ in seen.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "input", "b"}
    assert sum(name == "style" for name, _ in seen.tags) == 1
    for _, attrs in seen.tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs)
    links = [str(attrs["href"]) for attrs in seen.named("a")]
    assert all(link.startswith(("#", "http://127.0.0.1:8000/ui/#/s/")) for link in links)
    assert not any(set(link) & set("<>\"' \n\x00\u202e") for link in links)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)
    assert "<script>alert(1)</script>" in seen.text  # to be read, not to be run
    assert "⟨U+202E⟩gnp.exe" in seen.text
    assert "⟨U+001B⟩[31m" in seen.text
    policy = next(a["content"] for a in seen.named("meta") if a.get("http-equiv"))
    assert policy == POLICY
    assert "default-src 'none'" in POLICY
    assert "unsafe" not in POLICY
    done = CliRunner().invoke(main, ["report", str(path), "--out", str(tmp_path / "r.html")])
    assert "\x1b[31m" not in done.output
    assert "\u202e" not in done.output


def test_a_text_that_is_not_escaped_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentape.report.sections.escape", lambda text: text)
    html = page(report(write(tmp_path / "f.parquet", hostile_rows())))
    with pytest.raises(AssertionError):
        assert not any(name == "script" for name, _ in Page(html).tags)


def test_every_chart_has_its_text_and_its_table(found: Report) -> None:
    seen = Page(page(found))
    charts = [attrs for attrs in seen.named("svg") if attrs.get("class") != "share"]
    assert len(charts) >= 9
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    assert all(attrs["aria-hidden"] == "true" for attrs in seen.named("svg") if attrs.get("class") == "share")
    tables = sum(1 for _ in seen.named("table"))
    assert tables >= len(charts)
    assert "NaN" not in page(found)
    ids = [attrs["id"] for _, attrs in seen.tags if "id" in attrs and attrs["id"] not in ("lines", "dots")]
    assert len(ids) == len(set(ids))
    anchors = {str(a["href"]).removeprefix("#") for a in seen.named("a") if str(a["href"]).startswith("#")}
    assert anchors == set(ids)


def test_thin_files(tmp_path: Path) -> None:
    """One sample, one without a turn's tokens, no reward, nothing trained: a page all the same."""
    for row in (sample("a", reward=None), sample("b", turns=1, sampled=0, prompt=0), sample("c", shared=2)):
        Page(page(report(write(tmp_path / "f.parquet", [row]))))
    with pytest.raises(ConfigError, match="has no samples"):
        report(write(tmp_path / "f.parquet", []))


def test_other_writers_types(rows: list[Json], found: Report, tmp_path: Path) -> None:
    """What DuckDB or Polars make of a file: large lists, wider integers, one row group."""
    table = pa.Table.from_pylist(rows, schema=SAMPLES)
    wide = pa.schema(
        [
            f.with_type(pa.large_list(pa.int64())) if f.name in ("token_ids", "loss_mask") else f
            for f in SAMPLES
        ]
    )
    pq.write_table(table.cast(wide), tmp_path / "wide.parquet")
    assert report(tmp_path / "wide.parquet").budget == found.budget


@pytest.mark.parametrize("damage", ["text", "cut", "column", "null", "type", "turn"])
def test_a_file_that_is_none(damage: str, tmp_path: Path, rows: list[Json]) -> None:
    path = write(tmp_path / "f.parquet", rows[:5])
    table = pq.read_table(path)
    if damage == "text":
        path.write_text("no")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "column":
        pq.write_table(table.drop_columns(["turns"]), path)
    elif damage == "null":
        at = table.schema.get_field_index("loss_mask")
        nothing = pa.nulls(5, SAMPLES.field("loss_mask").type)
        pq.write_table(table.set_column(at, "loss_mask", nothing), path)
    elif damage == "type":
        at = table.schema.get_field_index("loss_mask")
        pq.write_table(table.set_column(at, "loss_mask", pa.array(["x"] * 5)), path)
    else:
        broken = [dict(row, turns=[{**row["turns"][0], "end": None}]) for row in rows[:5]]
        write(path, broken)
    with pytest.raises(ConfigError, match="is not a Parquet file of samples"):
        report(path)


def test_spread_does_not_grow() -> None:
    spread = Spread()
    for n in range(200_000):
        spread.add(math.sin(n) * 10 ** (n % 7))
    assert len(spread._seen) < 14_000
    assert spread.distribution().count == 200_000
    for bins in (spread.distribution().bins,):
        assert 2 <= len(bins) <= 22
        assert sum(one.count for one in bins) == 200_000
    names = Names()
    for n in range(5000):
        names.add(f"n{n}")
    assert len(names.counts()) == 1001
    assert names.counts()[OTHERS] == 4000


def test_bins_hold_every_value() -> None:
    for values in (
        [0.0, 1e-12, 1.0], [-5.0, 3.5, 100.0], [1, 10, 100, 10**7], [3.25], [*range(15)],
        [1e300, -1e300, 0.5], [x / 7 for x in range(-30, 90)],
        [1e-9 * x for x in range(1, 60)], [10.0**x for x in range(-8, 9)],
    ):  # fmt: skip
        spread = Spread()
        for value in values:
            spread.add(value)
        bins = spread.distribution().bins
        assert sum(one.count for one in bins) == len(values)
        assert all(a.high <= b.low or a.low == a.high for a, b in itertools.pairwise(bins))
    spread = Spread()
    spread.add(float("nan"))
    spread.add(None)
    assert (spread.distribution().count, spread.distribution().missing) == (0, 2)


def test_links() -> None:
    assert sample_link("https://h/ui/", "a b/#", "é") == "https://h/ui/#/s/a%20b%2F%23?b=%C3%A9&tab=tokens"
    for url in (
        "javascript:alert(1)",
        "file:///etc/passwd",
        "h/ui",
        "http://h/#x",
        "",
        "http://[::1",
        "http://h:99999/",
    ):
        with pytest.raises(ConfigError, match="links only to http"):
            checked_viewer(url)


def test_shown() -> None:
    assert shown("naïve 日本 עברית") == "naïve 日本 עברית"
    assert shown("") == "⟨empty⟩"
    assert shown("  ") == "⟨blank⟩"
    assert shown("x" * 500) == "x" * 120 + "…"


def test_the_command(
    found: Report, rows: list[Json], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "f.parquet", rows)
    done = CliRunner().invoke(main, ["report", "f.parquet", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert said["num_samples"] == found.num_samples
    assert said["mismatch"] is said["drift"] is None
    assert len(said["not_recomputed"]) == 2
    assert not (tmp_path / "report.html").exists()
    done = CliRunner().invoke(main, ["report", "f.parquet", "--viewer", "https://v.example/ui/"])
    assert done.exit_code == 0, done.output
    assert "not recomputed" in done.output
    html = (tmp_path / "report.html").read_text()
    assert 'href="https://v.example/ui/#/s/' in html
    assert "Not recomputed" in html
    done = CliRunner().invoke(main, ["report", "f.parquet", "--viewer", "javascript:x"])
    assert (done.exit_code, "give the viewer's own URL" in done.output) == (2, True)


async def test_an_engine_recomputes(tmp_path: Path) -> None:
    import asyncio

    local = LocalEngine(TINY_MODEL)
    question: Any = {"role": "user", "content": "What is 17 * 23 + 5?"}
    try:
        async with serve(make_app(local)) as url:
            recorded = list[Json]()
            async with contextlib.AsyncExitStack() as stack:
                tape = await stack.enter_async_context(tokentape.open(model=TINY_MODEL, engine=url))
                for n in range(3):
                    session = tape.session(f"s{n}")
                    await session.chat([question], max_tokens=10, seed=n)
                    recorded += await session.samples()
            path = write(tmp_path / "f.parquet", recorded)
            args = ["report", str(path), "--json", "--engine", url, "--model", str(TINY_MODEL)]
            run = asyncio.create_task(_run([*args, "--engine-sessions", "2"]))
            said = json.loads(await run)
            assert said["mismatch"]["num_sessions"] == said["mismatch"]["verified"]["num_samples"] == 2
            assert said["mismatch"]["problems"] == said["not_recomputed"] == []
            assert 0 < said["mismatch"]["verified"]["whole"]["largest"] < 1e-3
            assert said["drift"]["num_turns"] == 3
            at = next(n for n, m in enumerate(recorded[0]["loss_mask"]) if m)
            for row in recorded:
                row["logprobs"][at] = -9.0
            out = tmp_path / "r.html"
            await _run(["report", str(write(path, recorded)), *args[3:], "--out", str(out)])
            assert "These sessions are not verified" in out.read_text()
    finally:
        local.close()


async def _run(args: list[str]) -> str:
    import asyncio
    import sys

    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tokentape",
        *args,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()
