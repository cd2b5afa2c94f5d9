"""The viewer in a real browser: what is shown is what is recorded, however one looks at it."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from viewerkit import HOSTILE, Beside, Page, World, grow, long_store

from gatewaykit import gateway_for
from tokentape.engines.server import serve
from tokentape.engines.sglang_score import Scores
from tokentape.report.links import sample_link
from tokentape.store import SQLiteStore
from tokentape.tokenizer import Tokenizer
from tokentape.viewer.app import make_app
from tokentape.viewer.desk import Desk
from tokentape.viewer.stored import StoreSource

REPAIR = "#/s/repair-0412"
LONG = "#/s/long?b=t39&tab=tokens"
ROWS = "[...document.querySelectorAll('tbody tr')]"
SCROLL = """async () => {  // the longest frame in ms, of slow scrolling and of jumps through all of it
  const grid = document.querySelector('.grid');
  const most = grid.scrollHeight - grid.clientHeight;
  let worst = 0, last = await new Promise(requestAnimationFrame);
  for (let step = 0; step <= 240; step += 1) {
    grid.scrollTop = step < 120 ? step * 90 : most * ((step - 120) / 120);
    const now = await new Promise(requestAnimationFrame);
    worst = Math.max(worst, now - last);
    last = now;
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def long(beside: Beside, model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A viewer of a store whose session has a tape of 100,000 tokens."""
    path = beside.run(long_store(tmp_path_factory.mktemp("long") / "long.sqlite", model))

    async def desk() -> Desk:
        source = StoreSource(SQLiteStore(path, readonly=True), "long.sqlite")
        return Desk(source, Tokenizer(model / "tokenizer.json"), Shifted())

    return beside.enter(serve(make_app(beside.run(desk())), drain_s=0.1))


class Shifted:
    """An engine that finds every token half a nat less likely than a coin's side."""

    async def score(self, ids: Any, start: int, temperature: float = 1.0) -> Scores:
        return Scores([-0.5] * (len(ids) - start), temperature, "7")


def samples(beside: Beside, shared: World, session_id: str) -> dict[str, Any]:
    """A session's samples by id."""
    return {row["sample_id"]: row for row in beside.run(shared.gateway.samples(session_id))}


def main_sample(beside: Beside, shared: World) -> Any:
    rows = samples(beside, shared, "repair-0412").values()
    return max((row for row in rows if row["label"] == "main"), key=lambda row: len(row["token_ids"]))


# -- the table


def test_the_table_shows_filters_and_sorts(page: Page, shared: World, beside: Beside) -> None:
    page.open(shared.gateway.url)
    page.until("document.querySelectorAll('tbody tr').length >= 7")
    row = page.find("tr[data-id='repair-0412']")
    page.until("document.querySelector(\"tr[data-id='repair-0412']\").innerText.includes('subagent')")
    shown = beside.run(shared.gateway.show("repair-0412"))
    cells = row.locator("td").all_inner_texts()
    assert cells[:2] == ["repair-0412", "finished"]
    assert cells[3:5] == [str(shown["turns"]), str(shown["branches"])]
    assert cells[6] == "0.85"
    assert cells[8] == "12, 13"

    def listed() -> list[str]:
        return page.find("tbody tr").evaluate_all("rows => rows.map(row => row.dataset.id)")

    for text, wanted in (
        ("state:finished reward>0.5", ["greet-0", "repair-0412"]),
        ("label:subagent", ["repair-0412"]),
        ("turns>5 state:finished", ["repair-0412"]),
        ("failures>0", ["fails-1"]),
        ("version:11", ["greet-0", "greet-1"]),
        ("flaky", ["fails-1"]),
    ):
        page.find("#filter").fill(text)
        page.until(
            f"wanted => {ROWS}.map(row => row.dataset.id).join() === wanted",
            ",".join(wanted),
        )
    page.find("#filter").fill("greet")
    page.find("th[data-name='reward'] button").click()
    page.until("document.querySelector('th[data-name=reward]').getAttribute('aria-sort') === 'ascending'")
    page.until("document.querySelectorAll('tbody tr').length === 4")
    assert listed() == ["greet-1", "greet-2", "greet-0", "greet-3"]
    page.find("th[data-name='reward'] button").click()
    assert listed() == ["greet-0", "greet-2", "greet-1", "greet-3"]
    assert "q=greet" in page.own.url
    page.own.reload()  # the address is the view
    page.until("document.querySelectorAll('tbody tr').length === 4")
    assert listed() == ["greet-0", "greet-2", "greet-1", "greet-3"]


def test_the_table_is_live(page: Page, shared: World, beside: Beside) -> None:
    page.open(shared.gateway.url, "#/?q=live-")
    page.until("document.querySelector('.empty') !== null")
    session_id = beside.run(shared.gateway.create(session_id="live-row"))
    page.until("document.querySelector(\"tr[data-id='live-row']\") !== null")
    beside.run(grow(shared, session_id))
    page.until("document.querySelector(\"tr[data-id='live-row'] td:nth-child(4)\").innerText === '1'")
    beside.run(shared.gateway.ok("DELETE", f"/sessions/{session_id}"))
    page.until("document.querySelector(\"tr[data-id='live-row']\") === null")


# -- a session


def test_a_tree_of_branches_with_reasons(page: Page, shared: World) -> None:
    page.open(shared.gateway.url)
    page.find(
        "a",
    ).get_by_text("repair-0412").click()
    page.until("document.querySelectorAll('[role=treeitem]').length === 6")
    levels = page.find("[role=treeitem]").evaluate_all("items => items.map(item => item.ariaLevel)")
    assert levels == ["1", "1", "2", "1", "1", "1"]
    text = page.find("[role=tree]").inner_text()
    assert all(word in text for word in ("root", "resampled", "new_conversation", "subagent", "invalid_json"))
    page.find("[role=treeitem]").nth(2).click()
    page.until("document.querySelector('.messages')?.innerText.includes('I add 1 to the range')")
    assert "context here" in page.find(".messages").inner_text()
    attempt = (
        page.find(
            ".call",
        )
        .filter(has_text="tried to call")
        .inner_text()
    )
    assert "invalid_json" in attempt
    assert re.search(r"characters \d+.\d+, tokens \d+.\d+", attempt)


def test_hover_tells_everything_of_a_token(page: Page, shared: World, beside: Beside, model: Path) -> None:
    sample, tokenizer = main_sample(beside, shared), Tokenizer(model / "tokenizer.json")
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens&at=300")
    turn = sample["turns"][0]
    for at in (turn["start"] + 3, turn["start"] - 1, turn["end"] + 2):
        page.token(at).hover()
        page.until("at => document.querySelector('.inspector dl').innerText.includes('place\\n' + at)", at)
        facts = page.find(".inspector dl").inner_text().split("\n")
        told = dict(zip(facts[::2], facts[1::2], strict=True))
        token_id = sample["token_ids"][at]
        assert told["id"] == str(token_id)
        assert bytes.fromhex(told["bytes"]) == tokenizer.token_bytes(token_id)
        logprob = sample["logprobs"][at]
        assert ("log-prob." in told) == (logprob is not None)
        if logprob is not None:
            assert float(told["log-prob."]) == pytest.approx(logprob, abs=1e-5)
            assert told["weights"] == "12"
            assert told["turn"] == f"1, {turn['turn_id']}"


def test_colours(page: Page, shared: World, beside: Beside) -> None:
    sample = main_sample(beside, shared)
    turns, versions = sample["turns"], sample["weight_versions"]
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens&at={turns[2]['start']}")

    def kind(at: int) -> str:
        page.until("at => document.querySelector(`.t[data-at='${at}']`) !== null", at)
        return page.token(at).get_attribute("class").split()[1]

    assert kind(turns[2]["start"]) == "sampled"
    assert kind(turns[2]["start"] - 1) == "bridge"
    page.press("2")
    page.until("document.getElementById('colour').value === 'logprob'")
    logprob = sample["logprobs"][turns[2]["start"]]
    steps = [0.05, 0.35, 1.2, 2.5, 5, float("inf")]
    assert kind(turns[2]["start"]) == f"l{next(n for n, most in enumerate(steps) if -logprob <= most)}"
    assert kind(turns[2]["start"] - 1) == "none"
    page.press("3")
    page.until("document.getElementById('colour').value === 'version'")
    cut = next(span["start"] for span in versions if span["version"] == "13")
    assert (kind(cut - 1), kind(cut)) == ("v0", "v1")
    page.press("4")
    page.until("document.querySelector('.inspector').innerText.includes('No engine here')")
    page.find("[role=treeitem]").nth(2).click()  # the fork: its first turns are trained elsewhere
    page.press("1")
    page.own.wait_for_selector(".t.sampled")
    page.find(".grid").focus()
    page.press("Home", "]")
    page.own.wait_for_selector(".t.untrained")


def test_drift_shows_both_splits(page: Page, shared: World, beside: Beside, model: Path) -> None:
    sample, tokenizer = main_sample(beside, shared), Tokenizer(model / "tokenizer.json")
    drifted = 0
    for turn in sample["turns"]:
        ids = sample["token_ids"][turn["start"] : turn["end"]]
        drifted += tokenizer.encode(tokenizer.decode(ids)).tolist() != ids
    assert drifted
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens&colour=drift")
    page.own.wait_for_selector(".drift-list button")
    first = page.find(".drift-list button").first
    recorded, again = first.locator(".split").all()
    assert recorded.inner_text() == again.inner_text()
    assert recorded.locator("b").count() != again.locator("b").count()
    first.click()
    page.own.wait_for_selector(".t.drifts.at")
    assert "encoded again" in page.find(".inspector").inner_text()
    turns = {answer["turn_id"] for answer in _drifts(beside, shared, sample["sample_id"])}
    assert len(turns) == drifted


def _drifts(beside: Beside, shared: World, branch: str) -> Any:
    return beside.run(shared.gateway.ok("GET", f"/sessions/repair-0412/view/{branch}/drift"))["drifts"]


def test_search_by_text_and_by_id(page: Page, shared: World, beside: Beside, model: Path) -> None:
    sample, tokenizer = main_sample(beside, shared), Tokenizer(model / "tokenizer.json")
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens")
    page.press("/")
    page.own.keyboard.type("REMAINDER")
    page.own.wait_for_selector(".t.hit.now")
    found = tokenizer.decode(sample["token_ids"]).lower().count("remainder")
    assert page.find(".hits").inner_text() == f"1 of {found}"
    assert "remainder" in "".join(page.find(".t.hit.now").all_inner_texts())
    page.press("Enter")
    page.until("found => document.querySelector('.hits').innerText === `2 of ${found}`", found)
    wanted = sample["token_ids"][300]
    page.find("#search").fill(f"#{wanted}")
    page.until(
        "text => document.querySelector('.hits').innerText === text",
        f"1 of {sample['token_ids'].count(wanted)}",
    )
    page.find("#search").fill("no such text")
    page.until("document.querySelector('.hits').innerText === 'none'")


def test_two_branches_side_by_side(page: Page, shared: World, beside: Beside) -> None:
    rows = samples(beside, shared, "repair-0412")
    mine = main_sample(beside, shared)
    other = next(row for row in rows.values() if row["branch_reason"] == "resampled")
    at = next(
        n for n, (a, b) in enumerate(zip(mine["token_ids"], other["token_ids"], strict=False)) if a != b
    )
    page.open(shared.gateway.url, REPAIR)
    page.press("c")
    page.until("document.querySelectorAll('.t.differs').length === 2")
    assert f"first difference at token {at}" in page.find(".compare").inner_text()
    places = page.find(".t.differs").evaluate_all("tokens => tokens.map(token => token.dataset.at)")
    assert places == [str(at)] * 2
    tops = page.find(".t.differs").evaluate_all(
        "tokens => tokens.map(token => token.getBoundingClientRect().top)"
    )
    assert tops[0] == tops[1]
    page.find("#with").select_option(index=1)
    page.until("location.hash.includes('with=')")
    page.until("document.querySelector('.compare')?.innerText.includes('subagent')")


def test_keys(page: Page, shared: World) -> None:
    page.open(shared.gateway.url)
    page.until("document.querySelectorAll('tbody tr').length >= 7")
    page.press("/")
    page.own.keyboard.type("repair")
    page.until("document.querySelectorAll('tbody tr').length === 1")
    page.press("Enter", "Enter")
    page.own.wait_for_selector(".messages")
    page.press("b", "ArrowUp", "Enter")
    page.until("document.querySelector('[aria-selected=true][role=treeitem]') !== null")
    page.press("t")
    page.own.wait_for_selector(".grid .t")
    page.press("g", "Home", "ArrowRight", "ArrowRight")
    page.until("document.querySelector('.t.at')?.dataset.at === '2'")
    at = int(page.find(".t.at").get_attribute("data-at"))
    page.press("ArrowDown")
    page.until("at => Number(document.querySelector('.t.at')?.dataset.at) > at", at)
    page.press("]")
    page.until("document.querySelector('.inspector').innerText.includes('bridge')")
    active = page.find(".grid").get_attribute("aria-activedescendant")
    assert page.find(f"[id='{active}']").get_attribute("class").endswith("at")
    page.press("w")
    page.own.wait_for_selector(".wire pre")
    assert "/v1/chat/completions" in page.find(".wire").inner_text()
    page.press("?")
    page.own.wait_for_selector("#keys[open]")
    page.press("Escape")
    page.press("Escape")
    page.own.wait_for_selector("table")


def test_a_link_leads_to_a_token(page: Page, shared: World) -> None:
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens&colour=version&at=402")
    page.own.wait_for_selector(".t.at[data-at='402']")
    page.token(405).click()
    page.until("location.hash.includes('at=405')")
    page.own.reload()
    page.own.wait_for_selector(".t.at[data-at='405']")
    assert page.find("#colour").input_value() == "version"


def test_the_raw_wire(page: Page, shared: World) -> None:
    page.open(shared.gateway.url, f"{REPAIR}?tab=wire")
    page.own.wait_for_selector(".wire pre")
    request, reply = page.find(".wire pre").all_inner_texts()
    assert json.loads(request)["messages"][0]["role"] == "system"
    assert json.loads(reply)["object"] == "chat.completion"
    page.find("input[type=checkbox]").click()
    assert "\n" not in page.find(".wire pre").first.inner_text().strip()


# -- hostile content, keys of the gateway


def test_hostile_content_is_text(page: Page, shared: World) -> None:
    page.open(shared.gateway.url)
    page.until("document.querySelectorAll('tbody tr').length >= 7")
    assert "<script>" in page.find("tr[data-id='hostile-1']").inner_text()
    page.open(shared.gateway.url, "#/s/hostile-1")
    page.own.wait_for_selector(".message")
    page.find("summary").click()
    for where in (".messages", ".facts"):
        text = page.find(where).inner_text()
        assert "<script>document.title='owned'</script>" in text
        assert "⟨U+202E⟩" in text
        assert "⟨U+0000⟩" in text or "\\u0000" in text
        assert not set(text) & set("\u202e\u202c\u200b\x07\x1b\x00")
    assert "<b>bold</b>" in page.find(".messages").inner_text()
    page.press("t")
    page.own.wait_for_selector(".grid .t")
    page.find("#search").fill("<script>")
    page.own.wait_for_selector(".t.hit")
    texts = "".join(page.find(".grid .t").all_inner_texts())
    assert "<script>" in texts.replace("⏎", "")
    assert not set(texts) & set("\u202e\u202c\u200b\x07\x1b\x00")
    assert page.own.title().endswith("tokentape")
    assert page.find("script").count() == 1
    assert page.find("img").count() == 0
    assert HOSTILE


def test_a_lone_surrogate_is_text(page: Page, beside: Beside, long: str) -> None:
    """Only a file of somebody else's can hold one: here it is put where the page reads."""
    page.open(long)
    row = {"session_id": "long", "state": "open", "created_at": 1, "reward": None, "group_id": None}
    row |= {"metadata": {"a": "\ud800x"}, "turns": 1, "branches": 1, "tokens": 1, "labels": {"\udfff": 1}}
    body = json.dumps({**row, "versions": {}, "failures": {}})
    page.own.route("**/view/summary", lambda route: route.fulfill(body=body, content_type="application/json"))
    page.own.reload()
    page.until("document.querySelector('tbody')?.innerText.includes('⟨U+DFFF⟩')")


def test_inline_script_and_style_are_refused(page: Page, shared: World) -> None:
    page.open(shared.gateway.url)
    page.own.evaluate(
        "text => document.body.append(Object.assign(document.createElement('script'), { text }))",
        "window.owned = 1",
    )
    assert page.own.evaluate("window.owned") is None
    assert len(page.problems) == 1
    assert "Content Security Policy" in page.problems.pop()


def test_the_key_is_asked_for(page: Page, beside: Beside, shared: World, model: Path, tmp_path: Path) -> None:
    gateway = beside.enter(
        gateway_for(shared.fake.url, model, tmp_path / "s.sqlite", http={"api_key": "sesame"})
    )
    page.own.goto(f"{gateway.url}/ui/")
    for key in ("wrong", "sesame"):
        page.own.wait_for_selector("#login[open]")
        page.find("#login input").fill(key)
        page.press("Enter")
    page.own.wait_for_selector("html[data-ready]")
    assert page.find(".empty").inner_text() == "No sessions yet."
    assert all("401" in problem for problem in page.problems)
    page.problems.clear()


# -- length, time


def test_a_report_links_to_what_the_page_shows(page: Page, long: str) -> None:
    """Two parts that were made apart: the link of one is a view of the other."""
    page.own.goto(sample_link(f"{long}/ui/", "long", "t39"))
    page.own.wait_for_selector("html[data-ready]")
    page.own.wait_for_selector(".grid .t")
    assert page.own.url.endswith(LONG)


def test_a_long_tape_opens_and_scrolls(page: Page, long: str) -> None:
    opened: list[float] = []
    for _ in range(3):  # others may use the machine, too
        page.own.goto("about:blank")
        began = time.monotonic()
        page.open(long, LONG)
        page.own.wait_for_selector(".grid .t")
        opened.append(time.monotonic() - began)
    frames = [page.own.evaluate(SCROLL) for _ in range(3)]
    assert min(opened) < 2
    assert min(frames) < 200
    page.until("document.querySelector(\".grid .t[data-at='99999']\") !== null")
    assert page.find(".grid .t").count() < 4000


def test_recomputed_log_probabilities(page: Page, long: str) -> None:
    page.open(long, f"{LONG}&colour=difference&at=2000")
    page.until("document.querySelector('.inspector').innerText.includes('by weights 7')")
    page.own.wait_for_selector(".t.at")
    told = page.find(".inspector dl").inner_text()
    assert "recomputed\n-0.500000" in told
    recorded = float(told.split("log-prob.\n")[1].split("\n")[0])
    assert f"difference\n{-0.5 - recorded:.2e}".replace("e-0", "e-") in told


def test_a_long_tape_is_searched_and_compared(page: Page, long: str) -> None:
    page.open(long, f"{LONG}&q=class Tree")
    page.own.wait_for_selector(".t.hit.now")
    page.press("c")
    page.until("document.querySelectorAll('.t.differs').length === 2")
    assert page.find(".compare b.where").inner_text() == "first difference at token 98,850"


# -- for everybody


@pytest.mark.parametrize("scheme", ["page", "dark"])
def test_axe_finds_nothing_serious(scheme: str, shared: World, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(scheme)
    for where, there in (
        ("#/", "tbody tr a"),
        (REPAIR, ".message"),
        *(
            (f"{REPAIR}?tab=tokens&colour={mode}&at=500", ".grid .t.at")
            for mode in ("provenance", "logprob", "version", "drift")
        ),
        (f"{REPAIR}?tab=tokens&q=pages", ".t.hit"),
        (f"{REPAIR}?tab=compare", ".t.differs"),
        (f"{REPAIR}?tab=wire", ".wire pre"),
        ("#/s/hostile-1", ".message"),
    ):
        page.open(shared.gateway.url, where)
        page.own.wait_for_selector(there)
        found = Axe().run(page.own).response["violations"]
        serious = [
            (one["id"], one["nodes"][0]["html"][:200], one["nodes"][0]["failureSummary"])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == [], where
