"""The viewer's page while sessions run, answers are late or do not come, and people are quick."""

from pathlib import Path
from typing import Any

import pytest
from viewerkit import TOOLS, Beside, Page, World, calls, grow

from gatewaykit import Agent, gateway_for

REPAIR = "#/s/repair-0412"
ITEMS = "document.querySelectorAll('[role=treeitem]').length"


def grown(beside: Beside, shared: World, session_id: str, turns: int) -> Agent:
    """A running session of one branch with so many turns."""
    agent = beside.run(grow(shared, beside.run(shared.gateway.create(session_id=session_id))))
    for _ in range(turns - 1):
        beside.run(grow(shared, session_id, agent))
    return agent


def tops(page: Page, *selectors: str) -> list[int]:
    """Scroll each a little, and say where it is then: 0 where it does not scroll itself."""
    return page.own.evaluate(
        "all => all.map(one => document.querySelector(one)).map(it => (it.scrollTop = 90, it.scrollTop))",
        selectors,
    )


def more(beside: Beside, shared: World, page: Page, session_id: str, agent: Agent) -> None:
    """One more turn, and wait until the page has it."""
    number = page.own.evaluate(ITEMS)
    beside.run(grow(shared, session_id, agent))
    page.until(f"n => {ITEMS} === n", number + 1)


class Held:
    """Answers that a page waits for, until they are let go."""

    def __init__(self, page: Page, pattern: str) -> None:
        self.routes: list[Any] = []
        self._page, self._holds = page, True
        page.own.route(pattern, self._hold)

    def _hold(self, route: Any) -> None:
        if self._holds:
            self.routes.append(route)
        else:
            route.continue_()

    def wait(self) -> None:
        while not self.routes:
            self._page.own.wait_for_timeout(20)

    def let_go(self) -> None:
        """Let them come, and give the page time to make something of them."""
        self._holds = False
        for route in self.routes:
            route.continue_()
        self._page.own.wait_for_timeout(500)


def fetch_failed(page: Page) -> None:
    """What the console says of failed requests is no problem; all else is one."""
    assert page.problems
    assert all("Failed to load resource" in problem for problem in page.problems)
    page.problems.clear()


# -- growth


@pytest.mark.parametrize("width", [1360, 800])
def test_panes_scroll_and_the_page_does_not(page: Page, shared: World, beside: Beside, width: int) -> None:
    grown(beside, shared, f"panes-{width}", 30)
    page.own.set_viewport_size({"width": width, "height": 700})
    for tab, pane in (("messages", ".messages"), ("tokens", ".grid"), ("wire", ".wire")):
        page.open(shared.gateway.url, f"#/s/panes-{width}?tab={tab}")
        page.own.wait_for_selector(pane)
        page.own.wait_for_selector({"tokens": ".grid .t"}.get(tab, f"{pane} > *"))
        assert tops(page, ".side", pane) == [90, 90], tab
        assert page.own.evaluate("document.documentElement.scrollHeight") == 700, tab


def test_a_running_session_grows(page: Page, shared: World, beside: Beside) -> None:
    session_id = beside.run(shared.gateway.create(session_id="grows"))
    agent = beside.run(grow(shared, session_id))
    page.open(shared.gateway.url, "#/s/grows?tab=tokens")
    page.until("document.querySelectorAll('[role=treeitem]').length === 1")
    page.own.evaluate("window.same = document.querySelector('.grid')")
    for number in range(2, 5):
        beside.run(grow(shared, session_id, agent))
        page.until("n => document.querySelectorAll('[role=treeitem]').length === n", number)
        shown = beside.run(shared.gateway.show(session_id))
        assert (shown["turns"], shown["branches"]) == (number, 1)
        page.until("text => document.querySelector('.facts').innerText.includes(text)", f"{number} turns")
        assert page.own.evaluate("window.same === document.querySelector('.grid')")
    page.press("m")
    page.until("document.querySelector('.messages')?.innerText.includes('Answer number 6')")
    beside.run(shared.gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 0.5}))
    page.until("document.querySelector('.facts').innerText.includes('finished')")


def test_messages_keep_their_place_while_a_session_grows(page: Page, shared: World, beside: Beside) -> None:
    session_id = beside.run(shared.gateway.create(session_id="reads"))
    agent = beside.run(grow(shared, session_id))
    shared.fake.script(shared.policy.says("one"))
    beside.run(agent.turn({"role": "user", "content": "word " * 3000}))
    for _ in range(10):
        beside.run(grow(shared, session_id, agent))
    page.open(shared.gateway.url, "#/s/reads")
    page.own.wait_for_selector(".messages")
    page.find("button.more").click()
    place = "() => { window.same = document.querySelector('.messages'); window.same.scrollTop = 700 }"
    page.own.evaluate(place)
    page.find(".messages").focus()
    for _ in range(2):
        more(beside, shared, page, session_id, agent)
        page.until(f"document.querySelectorAll('.turn-rule').length === {ITEMS}")
        assert page.own.evaluate("document.querySelector('.messages') === window.same")
        assert page.own.evaluate("document.activeElement === window.same")
        assert page.own.evaluate("window.same.scrollTop") == 700
        assert page.find("button.more").count() == 0


def test_tokens_keep_their_place_while_a_session_grows(page: Page, shared: World, beside: Beside) -> None:
    agent = grown(beside, shared, "scrolls", 14)
    page.open(shared.gateway.url, "#/s/scrolls?tab=tokens&q=Answer&colour=drift")
    page.own.wait_for_selector(".t.hit.now")
    page.until("document.querySelector('.inspector').innerText.includes('of drift')")
    page.own.evaluate("() => { window.same = document.querySelector('.grid'); window.same.scrollTop = 240 }")
    page.own.wait_for_selector(".grid .t[data-at='0']")
    page.own.evaluate("window.first = document.querySelector(\".t[data-at='0']\")")
    page.find("#search").focus()
    more(beside, shared, page, "scrolls", agent)
    page.until("document.querySelector('.hits').innerText === '1 of 15'")
    assert page.own.evaluate("document.querySelector('.grid') === window.same")
    assert page.own.evaluate("window.same.scrollTop") == 240
    assert page.own.evaluate("document.activeElement.id") == "search"
    page.find(".grid").focus()
    page.press("End")
    page.own.wait_for_selector(".t.at.same")  # what was added has been checked, too


def test_a_running_tree_keeps_focus_and_shows_the_selected_turn(
    page: Page, shared: World, beside: Beside
) -> None:
    agent = grown(beside, shared, "climbs", 40)
    page.open(shared.gateway.url, "#/s/climbs")
    page.own.wait_for_selector(".messages")
    bottom = "document.querySelector('[role=treeitem][aria-selected=true]').getBoundingClientRect().bottom"
    assert page.own.evaluate(bottom) <= 820
    page.press("b", "k", "k", "k")
    at = "[...document.querySelectorAll('[role=treeitem]')].indexOf(document.activeElement)"
    assert page.own.evaluate(at) == 36
    more(beside, shared, page, "climbs", agent)
    page.own.wait_for_timeout(300)
    assert page.own.evaluate(at) == 36


def test_side_by_side_while_a_session_grows(page: Page, shared: World, beside: Beside) -> None:
    agent = grown(beside, shared, "forks", 3)
    other = Agent(shared.gateway, "forks", {}, list(agent.messages[:3]))
    beside.run(grow(shared, "forks", other))
    seen = beside.run(shared.gateway.ok("GET", "/sessions/forks/view"))
    mine = max(seen["branches"], key=lambda branch: branch["num_tokens"])["branch_id"]
    page.open(shared.gateway.url, f"#/s/forks?tab=compare&b={mine}")
    page.own.wait_for_selector(".t.differs")
    page.own.evaluate("window.same = document.querySelector('.grid')")
    titles = page.find(".compare header").all_inner_texts()
    more(beside, shared, page, "forks", other)
    page.until("was => document.querySelectorAll('.compare header')[1].innerText !== was", titles[1])
    assert page.find(".compare header").first.inner_text() == titles[0]
    assert page.own.evaluate("document.querySelector('.grid') === window.same")


def test_the_wire_of_a_turn_stays_while_its_session_grows(page: Page, shared: World, beside: Beside) -> None:
    agent = grown(beside, shared, "wired", 3)
    turn = beside.run(shared.gateway.ok("GET", "/sessions/wired/view"))["turns"][0]["turn_id"]
    page.open(shared.gateway.url, f"#/s/wired?tab=wire&b={turn}")
    page.own.wait_for_selector(".wire pre")
    page.own.evaluate("window.same = document.querySelector('.wire pre')")
    page.find("#indent").click()
    more(beside, shared, page, "wired", agent)
    page.until("document.querySelectorAll('#turn option').length === 4")
    assert page.own.evaluate("document.querySelector('.wire pre') === window.same")
    assert not page.find("#indent").is_checked()


def test_the_table_leaves_alone_what_does_not_change(page: Page, shared: World, beside: Beside) -> None:
    agent = grown(beside, shared, "counted", 1)
    page.open(shared.gateway.url)
    count = "document.querySelector(\"tr[data-id='counted'] td:nth-child(4)\")?.innerText"
    page.until(f"{count} === '1'")
    page.own.evaluate("getSelection().selectAllChildren(document.querySelector(\"[data-id='greet-0'] a\"))")
    for number in range(3):  # sessions come all the while
        beside.run(shared.gateway.create(session_id=f"comes-{number}"))
        beside.run(grow(shared, "counted", agent))
        page.until(f"document.querySelector(\"tr[data-id='comes-{number}']\") !== null")
    page.until(f"{count} === '4'")
    assert page.own.evaluate("getSelection().toString()") == "greet-0"


# -- late answers


def test_a_view_that_was_left_stays_left(page: Page, shared: World) -> None:
    page.open(shared.gateway.url)
    page.own.wait_for_selector("tbody tr a")
    held = Held(page, "**/sessions/repair-0412/view")
    page.own.evaluate("location.hash = '#/s/repair-0412'")
    held.wait()
    page.press("t", "n", "2")  # of a session that is not there yet
    page.own.evaluate("history.back()")
    page.own.wait_for_selector("tbody tr a")
    held.let_go()
    assert page.find("tbody tr a").count() > 0
    assert page.find(".session, .problem").count() == 0
    held = Held(page, "**/api/sessions?*")
    page.own.reload()
    held.wait()
    page.own.evaluate("location.hash = '#/s/repair-0412'")
    page.own.wait_for_selector(".messages")
    held.let_go()
    assert page.find(".messages").count() == 1
    assert page.find("#live").inner_text() == ""  # this session has ended


def test_a_failure_of_a_view_that_was_left_is_nobodys(page: Page, shared: World) -> None:
    page.open(shared.gateway.url)
    held = Held(page, "**/sessions/repair-0412/view")
    page.own.evaluate("location.hash = '#/s/repair-0412'")
    held.wait()
    page.own.evaluate("history.back()")
    page.own.wait_for_selector("tbody tr a")
    held.routes[0].abort()
    page.own.wait_for_timeout(400)
    assert page.find("tbody tr a").count() > 0
    fetch_failed(page)


def test_the_last_view_wins(page: Page, shared: World, beside: Beside) -> None:
    page.open(shared.gateway.url, REPAIR)
    page.own.wait_for_selector(".messages")
    held = Held(page, "**/wire")
    page.press("w")
    held.wait()
    page.press("t")
    page.own.wait_for_selector(".grid .t")
    held.let_go()
    assert page.find(".grid").count() == 1
    assert page.find(".wire").count() == 0
    seen = beside.run(shared.gateway.ok("GET", "/sessions/repair-0412/view"))
    slow = next(one["branch_id"] for one in seen["branches"] if one["reason"] == "resampled")
    wanted = next(one["branch_id"] for one in seen["branches"] if one["label"] == "subagent")
    page.press("m")
    page.own.wait_for_selector(".messages")
    held = Held(page, f"**/view/{slow}")
    page.find(f"[data-turn='{slow}']").click()
    held.wait()
    page.find(f"[data-turn='{wanted}']").click()
    page.until("document.querySelector('.messages').innerText.includes('You write tests.')")
    held.let_go()
    assert "You write tests." in page.find(".messages").inner_text()


# -- answers that do not come


def test_a_page_recovers_from_a_failed_fetch(page: Page, shared: World) -> None:
    page.open(shared.gateway.url, REPAIR)
    page.own.wait_for_selector(".messages")
    pattern = "**/sessions/repair-0412/view/*"
    page.own.route(pattern, lambda route: route.abort())
    page.find("[role=treeitem]").nth(2).click()
    page.own.wait_for_selector(".problem [role=alert]")
    page.own.unroute(pattern)
    page.find(".problem button").click()
    page.until("document.querySelector('.messages')?.innerText.includes('I add 1 to the range')")
    page.own.route(pattern, lambda route: route.abort())
    page.press("w")
    page.own.wait_for_selector(".problem")
    page.own.unroute(pattern)
    page.own.evaluate("history.back()")
    page.own.wait_for_selector(".messages")
    fetch_failed(page)


def test_a_growth_that_failed_is_looked_at_again(page: Page, shared: World, beside: Beside) -> None:
    agent = grown(beside, shared, "stumbles", 1)
    page.open(shared.gateway.url, "#/s/stumbles")
    page.own.wait_for_selector(".messages")
    pattern = "**/sessions/stumbles/view/t-*"
    page.own.route(pattern, lambda route: route.abort())
    more(beside, shared, page, "stumbles", agent)
    page.until("document.getElementById('live').innerText === 'Failed to fetch'")
    page.own.unroute(pattern)
    page.until("document.querySelector('.messages').innerText.includes('Answer number 2')")
    fetch_failed(page)


def test_tokens_that_do_not_come_are_said_and_asked_for_again(page: Page, shared: World) -> None:
    asked: list[str] = []

    def refuse(route: Any) -> None:
        asked.append(route.request.url)
        route.abort()

    page.own.route("**/tokens?*", refuse)
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens")
    page.own.wait_for_selector(".grid [role=alert]:not(:empty)")
    page.own.wait_for_timeout(1000)
    assert len(asked) == 1
    page.own.unroute("**/tokens?*")
    page.own.wait_for_selector(".grid .t")
    assert page.find(".grid [role=alert]").count() == 0
    fetch_failed(page)


def test_errors_of_colours_and_searches_are_said(page: Page, shared: World) -> None:
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens")
    page.own.wait_for_selector(".grid .t")
    for pattern in ("**/drift", "**/search?*"):
        page.own.route(pattern, lambda route: route.abort())
    page.press("5")
    page.own.wait_for_selector(".inspector [role=alert]")
    assert page.find(".grid .t.same").count() == 0  # nobody knows
    page.find("#search").fill("pager")
    page.until("document.querySelector('.hits').innerText === 'Failed to fetch'")
    page.own.unroute("**/search?*")
    page.find("#search").press("Enter")
    page.own.wait_for_selector(".t.hit.now")
    fetch_failed(page)


def test_counts_that_did_not_come_are_asked_for_again(page: Page, shared: World) -> None:
    asked: list[str] = []

    def refuse_once(route: Any) -> None:
        asked.append(route.request.url)
        if len(asked) > 1:
            route.continue_()
        else:
            body = '{"error": {"message": "busy"}}'
            route.fulfill(status=503, body=body, content_type="application/json")

    page.own.route("**/sessions/repair-0412/view/summary", refuse_once)
    page.open(shared.gateway.url, "#/?q=turns>5 state:finished")
    page.until("document.querySelector('.bar .quiet').innerText.includes('counting')")
    page.own.wait_for_selector("tr[data-id='repair-0412']")
    page.until("!document.querySelector('.bar .quiet').innerText.includes('counting')")
    fetch_failed(page)


@pytest.mark.parametrize("key", ["ключ", "sesame"])
def test_the_keys_dialog_stays(
    page: Page, beside: Beside, shared: World, model: Path, tmp_path: Path, key: str
) -> None:
    gateway = beside.enter(
        gateway_for(shared.fake.url, model, tmp_path / "s.sqlite", http={"api_key": "sesame"})
    )
    page.own.goto(f"{gateway.url}/ui/")
    page.own.wait_for_selector("#login[open]")
    page.press("Escape", "Escape", "Escape")
    page.own.wait_for_selector("#login[open]")
    page.find("#login input").fill(key)
    page.press("Enter")
    if key != "sesame":  # no header can carry it
        page.own.wait_for_timeout(300)
        page.own.reload()
        page.own.wait_for_selector("#login[open]")
        page.find("#login input").fill("sesame")
        page.press("Enter")
    page.own.wait_for_selector("html[data-ready]")
    assert all("401" in problem for problem in page.problems)
    page.problems.clear()


# -- texts


def test_a_call_in_a_thought_is_not_the_call(page: Page, shared: World, beside: Beside) -> None:
    session_id = beside.run(shared.gateway.create(session_id="thinks"))
    call = calls("read_file", path="a.py")
    long = call.replace('"a.py"', "12345678901234567890")
    shared.fake.script(shared.policy.says(f"<think>\nMaybe {call} is right.\n</think>\n\n{long}"))
    beside.run(Agent(shared.gateway, session_id, {"tools": TOOLS}).turn({"role": "user", "content": "x"}))
    page.open(shared.gateway.url, "#/s/thinks")
    page.own.wait_for_selector(".call")
    called, tried = page.find(".call").all_inner_texts()
    assert "calls read_file\nok" in called
    assert '"path": 12345678901234567890' in called  # a parser would round it
    assert "tried to call read_file\nin_reasoning" in tried


def test_any_number_of_odd_characters(page: Page, shared: World, beside: Beside) -> None:
    odd = {"many": "x\u200b" * 70_000, "run": "\u200b\u3164\u034f", "emoji": "\u2764\ufe0f"}
    beside.run(shared.gateway.create(session_id="odd", metadata=odd))
    page.open(shared.gateway.url, "#/s/odd")
    page.own.wait_for_selector("summary")
    assert page.find(".problem").count() == 0
    text = page.own.evaluate("document.querySelector('.facts pre').textContent")
    assert "⟨U+200B⟩⟨U+3164⟩⟨U+034F⟩" in text
    assert "\u2764\ufe0f" in text


# -- quick people


def test_enter_is_not_faster_than_the_filter(page: Page, shared: World) -> None:
    page.open(shared.gateway.url)
    page.own.wait_for_selector("tr[data-id='repair-0412']")
    page.press("/")
    page.own.keyboard.type("session:repair")
    page.press("Enter", "Enter")
    page.own.wait_for_selector(".messages")
    assert "#/s/repair-0412" in page.own.url
    page.press("Escape")
    page.own.wait_for_selector("tr[data-id='repair-0412']")
    assert "q=session%3Arepair" in page.own.url
    assert page.find("tbody tr").count() == 1
    page.find("#filter").fill("reward=1.00")
    page.until("document.querySelector('tbody tr')?.dataset.id === 'greet-0'")


def test_what_was_typed_does_not_follow_one_out(page: Page, shared: World) -> None:
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens")
    page.own.wait_for_selector(".grid .t")
    page.find("#search").focus()
    page.own.keyboard.type("pag")
    page.press("Escape", "Escape")
    page.own.wait_for_selector("table")
    page.own.wait_for_timeout(400)
    assert page.own.url.endswith("#/")
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens&q=pages")
    page.own.wait_for_selector(".t.hit.now")
    page.press("m")
    page.own.wait_for_selector(".messages")
    page.press("n")


def test_the_keyboard_stays_where_it_was(page: Page, shared: World) -> None:
    page.open(shared.gateway.url, "#/?q=repair")
    page.own.wait_for_selector("tbody a")
    page.find("tbody a").focus()
    page.press("Enter")
    page.own.wait_for_selector(".messages")
    assert page.own.evaluate("document.activeElement.id") == "main"
    page.find("[data-tab=tokens]").focus()
    page.press("Enter")
    page.own.wait_for_selector(".grid .t")
    assert page.own.evaluate("document.activeElement.dataset.tab") == "tokens"
    page.press("w")
    page.own.wait_for_selector(".wire pre")
    page.press("/")
    page.own.wait_for_selector(".grid .t")
    assert page.own.evaluate("document.activeElement.id") == "search"
    assert "reward 0.85" in page.find("[role=tree]").inner_text()


def test_a_search_begins_at_the_token_of_the_address(page: Page, shared: World, beside: Beside) -> None:
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens&q=pages")
    page.own.wait_for_selector(".t.hit.now")
    hits = int(page.find(".hits").inner_text().split(" of ")[1])
    assert hits > 2
    page.press("n", "n")
    at = page.find(".t.hit.now").first.get_attribute("data-at")
    page.open(shared.gateway.url, "#/")
    page.open(shared.gateway.url, f"{REPAIR}?tab=tokens&q=pages&at={at}")
    page.until("text => document.querySelector('.hits')?.innerText === text", f"3 of {hits}")
