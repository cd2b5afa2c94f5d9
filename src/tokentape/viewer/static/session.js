// One session: its tree, and a branch of it as messages, as tokens, as it was on the wire, or beside another.

import { Refused, get, of } from "./api.js";
import { MODES } from "./colours.js";
import { chip, count, h, later, plain, plural, pretty, shown } from "./dom.js";
import { Inspector } from "./inspector.js";
import { messages } from "./messages.js";
import { go } from "./route.js";
import { Tokens } from "./tokens.js";
import { Tree } from "./tree.js";

const POLL_MS = 1000;
const TABS = [["messages", "Messages"], ["tokens", "Tokens"], ["wire", "Wire"], ["compare", "Side by side"]];

export class Session {
  constructor(root, id, info, live) {
    Object.assign(this, { root, id, info, live, tag: null, isGone: false, grids: [] });
    this.scores = new Map(); // branch → what the engine said
  }

  async open(query) {
    this.query = query;
    this.facts = h("div", { class: "facts" });
    this.tree = new Tree((turn) => this.change({ b: turn, at: null, with: this.query.tab === "compare" ? this.query.with : null }));
    this.tools = h("div", { class: "tools" });
    this.view = h("div", { class: "view" });
    this.root.replaceChildren(h("div", { class: "session" },
      h("div", { class: "side" }, this.facts, this.tree.element),
      h("div", { class: "pane" }, this.tools, this.view)));
    await this.refresh();
    this.follow();
  }

  /** Another view of the same session; what does not change stays. */
  change(query, quietly = false) {
    go(this.id, { ...this.query, ...query }, quietly);
    if (quietly) this.query = { ...this.query, ...query };
  }

  async moved(query) {
    const was = this.query;
    this.query = query;
    const isSame = ["b", "tab", "with"].every((name) => (was[name] ?? null) === (query[name] ?? null));
    if (isSame) this.adjust();
    else await this.draw();
  }

  /** Look at the session again; whether it has changed. */
  async refresh() {
    const session = await get(of(this.id), {}, this.tag);
    if (session === null || this.isGone) return false;
    this.tag = session.tag;
    this.session = session;
    this.parents = new Map(session.turns.map((turn) => [turn.turn_id, turn.parent_id]));
    this.drawFacts();
    await this.draw(true);
    return true;
  }

  get branch() {
    const { branches } = this.session;
    const longest = (some) => some.reduce((a, b) => (b.num_tokens > a.num_tokens ? b : a));
    const wanted = this.query.b;
    if (!wanted || !this.parents.has(wanted)) {
      const main = branches.filter((branch) => branch.label === "main");
      return branches.length ? longest(main.length ? main : branches) : null;
    }
    const through = branches.filter((branch) => this.path(branch.branch_id).includes(wanted));
    return through.find((branch) => branch.branch_id === wanted) ?? longest(through);
  }

  path(turn) {
    const path = [];
    for (let at = turn; at; at = this.parents.get(at)) path.push(at);
    return path.reverse();
  }

  drawFacts() {
    const { summary } = this.session;
    const metadata = Object.keys(summary.metadata).length ? h("details", {}, h("summary", {}, "metadata"), h("pre", {}, shown(JSON.stringify(summary.metadata, null, 2)))) : null;
    const wasOpen = this.facts.querySelector("details")?.open;
    this.facts.replaceChildren(
      chip(summary.state, summary.state), summary.reward === null ? "" : chip(`reward ${summary.reward}`),
      h("span", {}, plural(summary.turns, "turn")), h("span", {}, plural(summary.branches, "branch", "branches")),
      h("span", {}, `${count(summary.sampled)} of ${count(summary.tokens)} tokens sampled`),
      ...Object.entries(summary.failures).map(([kind, number]) => chip(`${kind} ${number}`, "bad")),
      ...(metadata ? [metadata] : []));
    if (wasOpen) this.facts.querySelector("details").open = true;
  }

  // -- the branch

  async draw(grown = false) {
    const branch = this.branch;
    if (!branch) {
      this.tree.draw(this.session, null, []);
      this.tools.replaceChildren();
      this.view.replaceChildren(h("p", { class: "empty" }, "No turns yet."));
      return;
    }
    const selected = this.parents.has(this.query.b) ? this.query.b : branch.branch_id;
    this.tree.draw(this.session, selected, this.path(branch.branch_id));
    const tab = this.query.tab ?? "messages";
    const isSame = this.shownAs?.tab === tab && this.shownAs.with === this.query.with && this.shownAs.turn === selected;
    if (grown && isSame && this.shownAs.num_tokens === branch.num_tokens && this.shownAs.id === branch.branch_id) return;
    this.head = await get(of(this.id, branch.branch_id));
    if (this.isGone) return;
    this.shownAs = { tab, with: this.query.with, id: branch.branch_id, num_tokens: branch.num_tokens, turn: selected };
    if (grown && isSame && tab === "tokens" && this.grid) {
      await this.grid.show(this.head);
      this.inspector.colours(this.grid);
      return;
    }
    if (grown && isSame && tab === "messages" && this.view.firstChild) {
      const top = this.view.firstChild.scrollTop;
      this.view.replaceChildren(messages(this.head, (at) => this.toToken(at)));
      this.view.firstChild.scrollTop = top;
      return;
    }
    this.leave();
    this.drawTools(tab);
    this.view.className = "view";
    await { messages: () => this.showMessages(selected), tokens: () => this.showTokens(selected), wire: () => this.showWire(selected), compare: () => this.showBoth() }[tab]();
  }

  drawTools(tab) {
    const tabs = h("div", { class: "tabs", role: "tablist", "aria-label": "Branch as" }, TABS.map(([name, title]) =>
      h("button", { type: "button", role: "tab", "aria-selected": String(name === tab), data: { tab: name }, onclick: () => this.change({ tab: name }) }, title)));
    this.tools.replaceChildren(tabs);
    if (tab === "tokens" || tab === "compare") {
      const colour = h("select", { id: "colour", onchange: () => { this.change({ colour: colour.value }, true); this.adjust(); } },
        Object.entries(MODES).map(([name, mode], index) => h("option", { value: name, selected: (this.query.colour ?? "provenance") === name }, `${index + 1} ${mode.title}`)));
      this.tools.append(h("label", {}, "colour", colour));
    }
    if (tab === "tokens") {
      this.box = h("input", { type: "search", id: "search", value: this.query.q ?? "", placeholder: this.info.has_texts ? "text, or #id" : "#id", "aria-label": "Search in this branch", spellcheck: "false", autocomplete: "off",
        oninput: later(() => { this.change({ q: this.box.value }, true); this.search(); }, 200),
        onkeydown: (event) => { if (event.key === "Enter") { event.preventDefault(); this.next(event.shiftKey ? -1 : 1); } } });
      this.hitCount = h("span", { class: "hits", role: "status" });
      this.tools.append(h("span", { class: "grow" }), this.box, this.hitCount);
    }
    if (tab === "compare") {
      const others = this.session.branches.filter((branch) => branch.branch_id !== this.head.branch_id);
      const mine = this.path(this.head.branch_id);
      const shared = (branch) => this.path(branch.branch_id).filter((turn, index) => turn === mine[index]).length;
      others.sort((a, b) => shared(b) - shared(a)); // the nearest first
      const pick = h("select", { id: "with", onchange: () => this.change({ with: pick.value }) }, others.map((branch) =>
        h("option", { value: branch.branch_id, selected: branch.branch_id === this.query.with }, plain(`${branch.reason}, ${branch.label}, ${count(branch.num_tokens)} tokens, ${branch.branch_id}`))));
      this.pick = pick;
      this.tools.append(h("label", {}, "with", pick));
    }
  }

  showMessages(selected) {
    const list = messages(this.head, (at) => this.toToken(at));
    this.view.replaceChildren(list);
    if (selected !== this.head.branch_id || this.query.b) document.getElementById(`turn-${selected}`)?.scrollIntoView({ block: "start" });
  }

  toToken(at) {
    this.change({ tab: "tokens", at });
  }

  async showTokens(selected) {
    this.inspector = new Inspector((at) => this.grid.choose(at));
    this.grid = new Tokens({ session: this.id, label: "Tokens", looked: (token) => this.inspector.look(token), moved: (at) => this.change({ at }, true) });
    this.grids = [this.grid];
    this.searched = "";
    this.view.className = "view tokens";
    this.view.replaceChildren(this.grid.element, this.inspector.element);
    await this.grid.show(this.head);
    if (this.isGone || !this.grid) return;
    await this.adjust();
    if (this.query.at === undefined && selected !== this.head.branch_id) this.grid.toLine(Math.max(0, this.grid.starts.indexOf(this.head.turns.find((turn) => turn.turn_id === selected).begin)));
  }

  /** Colours and cursor as the address says. */
  async adjust() {
    const mode = MODES[this.query.colour] ? this.query.colour : "provenance";
    const select = document.getElementById("colour");
    if (select) select.value = mode;
    for (const grid of this.grids) {
      if (grid.mode !== mode) await this.colour(grid, mode);
      if (this.query.at !== undefined && this.query.at !== null && grid === this.grid && grid.at !== Number(this.query.at)) grid.choose(Number(this.query.at));
    }
    if (this.grid && this.inspector) this.inspector.colours(this.grid);
    if (this.grid && (this.query.q ?? "") !== this.searched) {
      this.box.value = this.query.q ?? "";
      await this.search();
    }
  }

  /** Some colours need to be asked for first. */
  async colour(grid, mode) {
    grid.colour(mode);
    const branch = grid.head.branch_id;
    const missing = { drift: !this.info.has_texts && "No tokenizer here: give --model.", difference: !this.info.has_engine && "No engine here: `tokentape view … --engine URL` recomputes log-probabilities." }[mode];
    if (missing) {
      this.inspector?.say(h("p", { class: "quiet", role: "alert" }, missing));
      return;
    }
    try {
      if (mode === "drift") {
        this.inspector?.say(h("p", { class: "quiet" }, "Encoding every turn again …"));
        const { drifts } = await get(of(this.id, branch, "drift"));
        await this.withTexts(grid, drifts);
        grid.drift(drifts);
        this.inspector?.drifts(drifts);
      } else if (mode === "difference") {
        this.inspector?.say(h("p", { class: "quiet" }, "The engine computes …"));
        const key = `${branch} ${grid.head.num_tokens}`;
        if (!this.scores.has(key)) this.scores.set(key, await get(of(this.id, branch, "scores")));
        const { spans, not_compared, weight_version } = this.scores.get(key);
        grid.scores = new Map(spans.flatMap(([start, values]) => values.map((value, index) => [start + index, value])));
        grid.redraw();
        this.inspector?.say(h("h2", {}, "Recomputed"), h("p", {}, `${plural(grid.scores.size, "token")} by weights ${plain(String(weight_version ?? "(it does not say)"))}`),
          ...Object.entries(not_compared).map(([why, number]) => h("p", { class: "quiet" }, `${count(number)} not compared: ${why}`)));
      } else this.inspector?.say();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.inspector?.say(h("p", { class: "quiet", role: "alert" }, plain(error.message)));
    }
  }

  /** What was recorded at the places of drift: a few tokens each, asked for in one piece where they lie together. */
  async withTexts(grid, drifts) {
    for (const one of drifts.slice(0, 200)) {
      const chunk = [...grid.chunks.values()].find((piece) => one.start >= piece.start && one.end <= piece.start + piece.ids.length)
        ?? await get(of(this.id, grid.head.branch_id, "tokens"), { start: one.start, end: one.end });
      one.recorded = chunk.texts.slice(one.start - chunk.start, one.end - chunk.start);
    }
  }

  async search() {
    const q = this.box.value;
    this.searched = q;
    this.found = null;
    if (!q || (!this.info.has_texts && !/^#\d+$/.test(q))) {
      this.hitCount.textContent = "";
      this.grid.mark([]);
      return;
    }
    try {
      const { hits, num_hits } = await get(of(this.id, this.head.branch_id, "search"), { q });
      if (this.box.value !== q || !this.grid) return;
      this.found = { hits, num_hits, at: -1 };
      if (hits.length) this.next(1);
      else { this.hitCount.textContent = "none"; this.grid.mark([]); }
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.hitCount.textContent = error.message;
    }
  }

  next(by) {
    if (!this.found?.hits.length) return;
    const { hits, num_hits } = this.found;
    this.found.at = (this.found.at + by + hits.length) % hits.length;
    this.grid.mark(hits, hits[this.found.at]);
    this.hitCount.textContent = `${count(this.found.at + 1)} of ${count(num_hits)}`;
  }

  async showWire(selected) {
    const pick = h("select", { id: "turn", onchange: () => this.change({ b: pick.value }) }, this.head.turns.map((turn, index) => h("option", { value: turn.turn_id, selected: turn.turn_id === selected }, `turn ${index + 1}, ${plain(turn.turn_id)}`)));
    this.tools.append(h("label", {}, "of", pick));
    const wire = await get(of(this.id, selected, "wire"));
    const box = h("div", { class: "wire", tabindex: "0", role: "region", "aria-label": "Wire" });
    if (wire.kept) {
      const parts = [wire.request, wire.reply].map((text) => [text, h("pre", { tabindex: "0" })]);
      const indent = h("input", { type: "checkbox", checked: true, onchange: () => fill() });
      const fill = () => parts.forEach(([text, pre]) => pre.replaceChildren(...shown(indent.checked ? pretty(text) : text)));
      fill();
      this.tools.append(h("label", {}, indent, "indented; else as it was sent"));
      box.append(h("h2", {}, "Request, POST ", h("code", {}, shown(wire.path))), parts[0][1], h("h2", {}, "Reply"), parts[1][1]);
    } else {
      const why = this.info.has_wire ? "It was too long ago, or before the gateway started: only the last requests are kept (--keep-wire-mb)." : "Only a running gateway has the last requests as they were on the wire; a store and a file keep what they meant.";
      box.append(h("p", { class: "empty" }, `Not kept. ${why}`));
    }
    this.view.replaceChildren(box);
  }

  async showBoth() {
    const other = this.session.branches.find((branch) => branch.branch_id === this.pick.value);
    if (!other) {
      this.view.replaceChildren(h("p", { class: "empty" }, "There is no other branch."));
      return;
    }
    const second = await get(of(this.id, other.branch_id));
    const { at } = await get(of(this.id, this.head.branch_id, "difference"), { other: other.branch_id });
    if (this.isGone) return;
    const box = h("div", { class: "compare" });
    this.view.replaceChildren(box);
    const heads = [this.head, second];
    const columns = Math.max(24, Math.floor((this.view.clientWidth / 2 - 142) / 8));
    let leader = null;
    this.grids = heads.map((head, side) => new Tokens({ session: this.id, columns, label: side ? "Other branch" : "This branch", scrolled: (top) => {
      const mine = this.grids[side], its = this.grids[1 - side];
      if (leader === null || leader === mine) { if (its?.starts && its.topLine() !== top) { leader = mine; its.toLine(top); requestAnimationFrame(() => requestAnimationFrame(() => { leader = null; })); } }
    } }));
    const where = at === null ? "the same tokens" : `first difference at token ${count(at)}`;
    box.append(...heads.map((head, side) => h("header", {}, chip(head.reason, "reason"), chip(head.label), `${count(head.num_tokens)} tokens`, h("b", { class: side ? "" : "where" }, side ? "" : where))), ...this.grids.map((grid) => grid.element));
    for (const [side, grid] of this.grids.entries()) {
      grid.differs = at;
      await grid.show(heads[side]);
    }
    await this.adjust();
    if (at !== null) for (const grid of this.grids) grid.reveal(Math.min(at, grid.num_tokens - 1));
  }

  // -- time, keys

  follow() {
    if (this.info.kind === "file") return;
    this.live(this.session.summary.state === "open");
    const tick = async () => {
      if (this.isGone) return;
      if (document.visibilityState === "visible" && this.session.summary.state === "open") {
        try {
          await this.refresh();
          this.live(this.session.summary.state === "open");
        } catch (error) {
          this.live(false, error.message);
        }
      }
      this.timer = setTimeout(tick, POLL_MS);
    };
    this.timer = setTimeout(tick, POLL_MS);
  }

  key(event) {
    const tab = { m: "messages", t: "tokens", w: "wire", c: "compare" }[event.key];
    const colour = Object.keys(MODES)[Number(event.key) - 1];
    if (tab) this.change({ tab });
    else if (colour && this.grids.length) { this.change({ colour }, true); this.adjust(); }
    else if (event.key === "n" || event.key === "N") this.next(event.key === "n" ? 1 : -1);
    else if (event.key === "g") (this.grid?.element ?? this.tree.element.querySelector("[tabindex='0']"))?.focus();
    else if (event.key === "b") this.tree.element.querySelector("[tabindex='0']")?.focus();
    else if (event.key === "Escape") go(null, {});
    else return false;
    return true;
  }

  first() {
    this.tree.element.querySelector("[tabindex='0']")?.focus();
  }

  leave() {
    for (const grid of this.grids) grid.close();
    this.grids = [];
    this.grid = null;
    this.inspector = null;
  }

  close() {
    this.isGone = true;
    clearTimeout(this.timer);
    this.leave();
    this.live(false);
  }
}
