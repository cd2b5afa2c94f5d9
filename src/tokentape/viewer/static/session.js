// One session: its tree, and a branch of it as messages, as tokens, as it was on the wire, or beside another.

import { get, of } from "./api.js";
import { MODES } from "./colours.js";
import { chip, count, fill, h, later, place, plain, plural, pretty, shown } from "./dom.js";
import { Inspector } from "./inspector.js";
import { addTurns, messages } from "./messages.js";
import { go, table } from "./route.js";
import { GUTTER, Tokens } from "./tokens.js";
import { Tree } from "./tree.js";

const POLL_MS = 1000;
const longest = (some) => some.reduce((a, b) => (a && a.num_tokens >= b.num_tokens ? a : b), null);
const TABS = [["messages", "Messages"], ["tokens", "Tokens"], ["wire", "Wire"], ["compare", "Side by side"]];

export class Session {
  constructor(root, id, info, live) {
    Object.assign(this, { root, id, info, live, tag: null, isGone: false, grids: [], drawing: 0, shownAs: null, seeks: false });
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
    if (!this.isGone) this.follow();
  }

  /** Whether what begins now has been overtaken: by another view of this session, or of something else. */
  watch() {
    const now = this.drawing;
    return () => this.isGone || now !== this.drawing;
  }

  /** Work that nobody waits for: what goes wrong is said, where it still matters. */
  async tell(work) {
    const isOver = this.watch();
    try {
      await work();
    } catch (error) {
      if (!isOver()) this.trouble(error.message);
    }
  }

  trouble(text) {
    const nodes = h("p", { class: "quiet", role: "alert" }, plain(text));
    if (this.inspector) this.inspector.say(nodes);
    else this.said.replaceChildren(nodes);
  }

  /** Another view of the same session; what does not change stays. */
  change(query, quietly = false) {
    if (this.isGone) return;
    go(this.id, { ...this.query, ...query }, quietly);
    if (quietly) this.query = { ...this.query, ...query };
  }

  async moved(query) {
    const was = this.query;
    this.query = query;
    if (!this.session) return; // it is drawn as soon as it is there
    const isSame = ["b", "tab", "with"].every((name) => (was[name] ?? null) === (query[name] ?? null));
    if (isSame && this.shownAs) this.tell(() => this.adjust());
    else await this.draw();
  }

  /** Look at the session again; whether it has changed. */
  async refresh() {
    const session = await get(of(this.id), {}, this.tag);
    if (session === null || this.isGone) return false;
    this.session = session;
    this.parents = new Map(session.turns.map((turn) => [turn.turn_id, turn.parent_id]));
    this.drawFacts();
    await this.draw(true);
    this.tag = session.tag; // only now: what could not be drawn is asked for again
    return true;
  }

  /** The branch that the address means: the longest one that goes on from the one shown, while the address is the same. */
  get branch() {
    const { branches } = this.session;
    const wanted = this.parents.has(this.query.b) ? this.query.b : null;
    const main = branches.filter((branch) => branch.label === "main");
    const meant = wanted ? this.through(wanted) : main.length ? main : branches;
    const kept = this.shownAs?.b === (this.query.b ?? null) ? this.through(this.shownAs.id).filter((branch) => meant.includes(branch)) : [];
    return meant.find((branch) => branch.branch_id === wanted) ?? longest(kept) ?? longest(meant);
  }

  through(turn) {
    return this.session.branches.filter((branch) => this.path(branch.branch_id).includes(turn));
  }

  path(turn) {
    const path = [];
    for (let at = turn; at; at = this.parents.get(at)) path.push(at);
    return path.reverse();
  }

  drawFacts() {
    const { summary } = this.session;
    const metadata = JSON.stringify(summary.metadata, null, 2);
    if (metadata !== this.told) this.metadata = metadata === "{}" ? null : h("details", {}, h("summary", {}, "metadata"), h("pre", {}, shown(metadata)));
    this.told = metadata;
    place(this.facts, [
      chip(summary.state, summary.state), summary.reward === null ? null : chip(`reward ${summary.reward}`),
      h("span", {}, plural(summary.turns, "turn")), h("span", {}, plural(summary.branches, "branch", "branches")),
      h("span", {}, `${count(summary.sampled)} of ${count(summary.tokens)} tokens sampled`),
      ...Object.entries(summary.failures).map(([kind, number]) => chip(`${kind} ${number}`, "bad")),
      this.metadata].filter(Boolean)); // the metadata stay where they are, open or not
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
    this.tree.draw(this.session, selected, this.path(branch.branch_id), grown);
    const tab = TABS.some(([name]) => name === this.query.tab) ? this.query.tab : "messages";
    const other = tab === "compare" ? this.other(branch) : null;
    const now = { tab, b: this.query.b ?? null, with: this.query.with ?? null, id: branch.branch_id, turn: selected, other: other?.branch_id ?? null };
    const was = this.shownAs;
    const isSame = grown && was !== null && ["tab", "b", "with"].every((name) => was[name] === now[name]);
    if (isSame && was.id === now.id && was.other === now.other) return;
    const grows = isSame && this.goesOn(was.id, now.id) && this.goesOn(was.other, now.other) && (tab !== "wire" || was.turn === selected);
    this.drawing += 1;
    const isOver = this.watch();
    const heads = await Promise.all([branch, other].filter(Boolean).map((one) => get(of(this.id, one.branch_id))));
    if (isOver()) return;
    this.head = heads[0];
    if (!grows) {
      this.leave();
      this.shownAs = null; // until it is there
      this.view.className = "view";
    }
    if (!grows || tab === "wire" || tab === "compare") this.drawTools(tab, selected, other); // else nothing is new in them
    await { messages: () => this.showMessages(grows, selected), tokens: () => this.showTokens(isOver, grows, selected), wire: () => this.showWire(isOver, grows, selected), compare: () => this.showBoth(isOver, grows, heads) }[tab]();
    if (!isOver()) this.shownAs = now;
  }

  /** Whether one branch is another one's beginning. */
  goesOn(before, after) {
    return before === after || (before !== null && after !== null && this.path(after).includes(before));
  }

  /** The tools of a view; what has the keyboard keeps it. */
  drawTools(tab, selected, other) {
    const focused = this.tools.contains(document.activeElement) ? document.activeElement : null;
    const tabs = h("div", { class: "tabs", role: "tablist", "aria-label": "Branch as" }, TABS.map(([name, title]) =>
      h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-selected": String(name === tab), data: { tab: name }, onclick: () => this.change({ tab: name }) }, title)));
    const some = (value, text, isPicked) => h("option", { value, selected: isPicked }, text);
    const tools = [tabs];
    if (tab === "tokens" || tab === "compare") {
      const colour = h("select", { id: "colour", onchange: () => { this.change({ colour: colour.value }, true); this.tell(() => this.adjust()); } },
        Object.entries(MODES).map(([name, mode], index) => some(name, `${index + 1} ${mode.title}`, this.mode === name)));
      tools.push(h("label", {}, "colour", colour));
    }
    if (tab === "tokens") {
      this.box = this.searchBox();
      this.hitCount = h("span", { class: "hits", role: "status" });
      tools.push(h("span", { class: "grow" }), this.box, this.hitCount);
    }
    if (tab === "wire") {
      const pick = h("select", { id: "turn", onchange: () => this.change({ b: pick.value }) }, this.head.turns.map((turn, index) => some(turn.turn_id, `turn ${index + 1}, ${plain(turn.turn_id)}`, turn.turn_id === selected)));
      this.indent ??= h("input", { type: "checkbox", id: "indent", checked: true });
      tools.push(h("label", {}, "of", pick), h("label", {}, this.indent, "indented; else as it was sent"));
    }
    if (tab === "compare") {
      const pick = h("select", { id: "with", onchange: () => this.change({ with: pick.value }) }, this.others(this.head).map((branch) =>
        some(branch.branch_id, plain(`${branch.reason}, ${branch.label}, ${count(branch.num_tokens)} tokens, ${branch.branch_id}`), branch === other)));
      tools.push(h("label", {}, "with", pick));
    }
    this.said = h("span", { class: "bad" });
    this.tools.replaceChildren(...tools, this.said);
    if (tab === "tokens" && this.seeks) { this.seeks = false; this.box.focus(); }
    else if (focused) document.getElementById(focused.id)?.focus();
  }

  searchBox() {
    const box = h("input", { type: "search", id: "search", value: this.query.q ?? "", placeholder: this.info.has_texts ? "text, or #id" : "#id", "aria-label": "Search in this branch", spellcheck: "false", autocomplete: "off" });
    const apply = () => {
      if (this.box !== box || box.value === this.searched) return false; // the view was left, or Enter was faster
      this.change({ q: box.value }, true);
      this.tell(() => this.search());
      return true;
    };
    box.addEventListener("input", later(apply, 200));
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      if (!apply()) this.next(event.shiftKey ? -1 : 1);
    });
    return box;
  }

  showMessages(grows, selected) {
    if (grows) return addTurns(this.view.firstChild, this.head, (at) => this.toToken(at));
    this.view.replaceChildren(messages(this.head, (at) => this.toToken(at)));
    if (this.query.b) document.getElementById(`turn-${selected}`)?.scrollIntoView({ block: "start" });
  }

  toToken(at) {
    this.change({ tab: "tokens", at });
  }

  async showTokens(isOver, grows, selected) {
    if (!grows) {
      this.inspector = new Inspector((at) => this.grid.choose(at));
      this.grid = new Tokens({ session: this.id, label: "Tokens", looked: (token) => this.inspector?.look(token), moved: (at) => this.change({ at }, true) });
      this.grids = [this.grid];
      this.view.className = "view tokens";
      this.view.replaceChildren(this.grid.element, this.inspector.element);
    }
    await this.grid.show(this.head);
    if (isOver()) return;
    if (!grows && this.query.at === undefined && selected !== this.head.branch_id) this.grid.toLine(Math.max(0, this.grid.starts.indexOf(this.head.turns.find((turn) => turn.turn_id === selected).begin)));
    await this.adjust(grows);
  }

  get mode() {
    return MODES[this.query.colour] ? this.query.colour : "provenance";
  }

  /** Colours, search and cursor as the address says; `grows`: of a branch that has become longer. */
  async adjust(grows = false) {
    const { mode, grid, grids } = this;
    const select = document.getElementById("colour");
    if (select) select.value = mode;
    const at = Number(this.query.at ?? NaN);
    if (grid && Number.isInteger(at) && grid.at !== at) grid.choose(at);
    const work = grids.filter((one) => grows || one.mode !== mode).map((one) => this.colour(one, mode));
    if (grid && (grows || (this.query.q ?? "") !== this.searched)) {
      if (!grows) this.box.value = this.query.q ?? "";
      work.push(this.search(grows));
    }
    if (grid) this.inspector.colours(grid);
    await Promise.all(work);
  }

  /** Some colours need to be asked for first. */
  async colour(grid, mode) {
    grid.colour(mode);
    const branch = grid.head.branch_id;
    const say = (...nodes) => this.inspector?.say(...nodes);
    const missing = { drift: !this.info.has_texts && "No tokenizer here: give --model.", difference: !this.info.has_engine && "No engine here: `tokentape view … --engine URL` recomputes log-probabilities." }[mode];
    this.said.replaceChildren();
    if (missing) return this.trouble(missing);
    const isOver = this.watch();
    const isOld = () => isOver() || grid.mode !== mode;
    try {
      if (mode === "drift") {
        if (!grid.checked) say(h("p", { class: "quiet" }, "Encoding every turn again …"));
        const { num_tokens } = grid;
        const { drifts } = await get(of(this.id, branch, "drift"));
        if (isOld()) return;
        grid.drift(drifts, num_tokens);
        this.inspector?.drifts(drifts);
      } else if (mode === "difference") {
        if (grid.scores === null) say(h("p", { class: "quiet" }, "The engine computes …"));
        if (!this.scores.has(branch)) this.scores.set(branch, await get(of(this.id, branch, "scores")));
        if (isOld()) return;
        const { spans, not_compared, weight_version } = this.scores.get(branch);
        grid.scores = new Map(spans.flatMap(([start, values]) => values.map((value, index) => [start + index, value])));
        grid.redraw();
        grid.look();
        say(h("h2", {}, "Recomputed"), h("p", {}, `${plural(grid.scores.size, "token")} by weights ${plain(String(weight_version ?? "(it does not say)"))}`),
          ...Object.entries(not_compared).map(([why, number]) => h("p", { class: "quiet" }, `${count(number)} not compared: ${why}`)));
      } else say();
    } catch (error) {
      if (!isOld()) this.trouble(error.message);
    }
  }

  /** Goes to the first hit from the cursor on; `grows`: the hits of a longer branch, nothing moves. */
  async search(grows = false) {
    const { grid } = this;
    const q = (grows ? this.searched : null) ?? this.box.value;
    const was = grows ? this.found?.hits[this.found.at] : null;
    this.searched = q;
    if (!grows) this.found = null;
    if (!q || (!this.info.has_texts && !/^#\d+$/.test(q))) {
      this.hitCount.textContent = "";
      grid.mark([]);
      return;
    }
    const isOver = this.watch();
    try {
      const { hits, num_hits } = await get(of(this.id, this.head.branch_id, "search"), { q });
      if (isOver() || this.searched !== q) return;
      const from = was?.[0] ?? Number(this.query.at ?? 0);
      this.found = { hits, num_hits, at: Math.max(0, hits.findIndex(([start]) => start >= from)) };
      this.show(!grows);
    } catch (error) {
      if (isOver() || this.searched !== q) return;
      this.searched = null; // Enter asks again
      this.hitCount.textContent = error.message;
    }
  }

  next(by) {
    if (!this.found?.hits.length) return;
    this.found.at = (this.found.at + by + this.found.hits.length) % this.found.hits.length;
    this.show();
  }

  /** The hit one is at. */
  show(goes = true) {
    const { hits, num_hits, at } = this.found;
    this.grid.mark(hits, hits[at] ?? null, goes);
    this.hitCount.textContent = hits.length ? `${count(at + 1)} of ${count(num_hits)}` : "none";
  }

  async showWire(isOver, grows, selected) {
    if (grows) return; // of this turn there is nothing new
    const wire = await get(of(this.id, selected, "wire"));
    if (isOver()) return;
    const box = h("div", { class: "wire", tabindex: "0", role: "region", "aria-label": "Wire" });
    this.indent.disabled = !wire.kept;
    if (wire.kept) {
      const parts = [wire.request, wire.reply].map((text) => [text, h("pre", { tabindex: "0" })]);
      const draw = () => parts.forEach(([text, pre]) => fill(pre, shown(this.indent.checked ? pretty(text) : text)));
      this.indent.onchange = draw;
      draw();
      box.append(h("h2", {}, "Request, POST ", h("code", {}, shown(wire.path))), parts[0][1], h("h2", {}, "Reply"), parts[1][1]);
    } else {
      const why = this.info.has_wire ? "It was too long ago, or before the gateway started: only the last requests are kept (--keep-wire-mb)." : "Only a running gateway has the last requests as they were on the wire; a store and a file keep what they meant.";
      box.append(h("p", { class: "empty" }, `Not kept. ${why}`));
    }
    this.view.replaceChildren(box);
  }

  /** The other branches, the nearest first. */
  others(branch) {
    const mine = this.path(branch.branch_id);
    const shared = new Map(this.session.branches.map((one) => [one, this.path(one.branch_id).filter((turn, index) => turn === mine[index]).length]));
    return this.session.branches.filter((one) => one.branch_id !== branch.branch_id).sort((a, b) => shared.get(b) - shared.get(a));
  }

  /** The branch beside this one: the one of the address, or what it has become; else the one shown, or the nearest. */
  other(branch) {
    const others = this.others(branch);
    const wanted = this.query.with ?? (this.shownAs?.b === (this.query.b ?? null) ? this.shownAs?.other : null);
    return others.find((one) => one.branch_id === wanted) ?? longest(others.filter((one) => this.path(one.branch_id).includes(wanted))) ?? others[0] ?? null;
  }

  async showBoth(isOver, grows, heads) {
    if (heads.length < 2) {
      this.view.replaceChildren(h("p", { class: "empty" }, "There is no other branch."));
      return;
    }
    const { at } = await get(of(this.id, heads[0].branch_id, "difference"), { other: heads[1].branch_id });
    if (isOver()) return;
    if (!grows) {
      const columns = Math.max(24, Math.floor((this.view.clientWidth / 2 - GUTTER) / 8));
      this.grids = heads.map((_, side) => new Tokens({ session: this.id, columns, label: side ? "Other branch" : "This branch", scrolled: (top) => this.together(side, top) }));
      this.titles = heads.map(() => h("header"));
      this.view.replaceChildren(h("div", { class: "compare" }, this.titles, this.grids.map((grid) => grid.element)));
    }
    const where = at === null ? "the same tokens" : `first difference at token ${count(at)}`;
    for (const [side, head] of heads.entries()) {
      fill(this.titles[side], [chip(head.reason, "reason"), chip(head.label), `${count(head.num_tokens)} tokens`, h("b", { class: side ? "" : "where" }, side ? "" : where)]);
      this.grids[side].differs = at;
      await this.grids[side].show(head);
      if (isOver()) return;
    }
    if (!grows && at !== null) {
      for (const grid of this.grids) grid.reveal(Math.min(at, grid.num_tokens - 1));
      const top = Math.min(...this.grids.map((grid) => grid.topLine())); // the shorter one cannot go farther
      for (const grid of this.grids) grid.toLine(top);
    }
    await this.adjust(grows);
  }

  /** Both sides scroll together; who was scrolled by the other one does not answer. */
  together(side, top) {
    const [mine, its] = [this.grids[side], this.grids[1 - side]];
    if ((this.leader ?? mine) !== mine || !its?.starts || its.topLine() === top) return;
    this.leader = mine;
    its.toLine(top);
    requestAnimationFrame(() => requestAnimationFrame(() => { this.leader = null; }));
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
          if (!this.isGone) this.live(this.session.summary.state === "open");
        } catch (error) {
          if (!this.isGone) this.live(false, error.message);
        }
      }
      if (!this.isGone) this.timer = setTimeout(tick, POLL_MS);
    };
    this.timer = setTimeout(tick, POLL_MS);
  }

  key(event) {
    if (event.key === "Escape") { go(null, table.query); return true; }
    if (!this.session) return false;
    const tab = { m: "messages", t: "tokens", w: "wire", c: "compare" }[event.key];
    const colour = Object.keys(MODES)[Number(event.key) - 1];
    if (tab) this.change({ tab });
    else if (colour && this.grids.length) { this.change({ colour }, true); this.tell(() => this.adjust()); }
    else if (event.key === "n" || event.key === "N") this.next(event.key === "n" ? 1 : -1);
    else if (event.key === "g") (this.grid?.element ?? this.tree.element.querySelector("[tabindex='0']"))?.focus();
    else if (event.key === "b") this.first();
    else return false;
    return true;
  }

  first() {
    this.tree.element.querySelector("[tabindex='0']")?.focus();
  }

  /** To the search, which tokens have. */
  seek() {
    if (this.box) { this.box.focus(); return; }
    this.seeks = true;
    this.change({ tab: "tokens" });
  }

  leave() {
    for (const grid of this.grids) grid.close();
    this.grids = [];
    this.grid = this.inspector = this.box = this.found = null;
    this.searched = "";
  }

  close() {
    this.isGone = true;
    clearTimeout(this.timer);
    this.leave();
    this.live(false);
  }
}
