// The table of sessions: filtered, sorted, and followed while they run.

import { get, of, sessions as ask } from "./api.js";
import { chip, count, h, later, place, plain, plural, soon } from "./dom.js";
import { go, link, table } from "./route.js";

const PAGE = 500;
const MOST = 20000; // sessions that are loaded
const SHOWN = 200; // rows at first, and at each "more"
const POLL_MS = 1500;
const AT_ONCE = 4; // questions for counts
const AGAIN_MS = 3000; // before counts that did not come are asked for again

const sum = (counts) => Object.values(counts ?? {}).reduce((total, one) => total + one, 0);
const listed = (counts) => Object.keys(counts ?? {}).join(", ");
const told = (metadata) => Object.entries(metadata).map(([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join(", ");

// name, title, what it is sorted by, whether it is known only once the turns were read
const COLUMNS = [
  ["session_id", "session", (row) => row.session_id, false],
  ["state", "state", (row) => row.state, false],
  ["labels", "label", (row) => listed(row.labels), true],
  ["turns", "turns", (row) => row.turns, true],
  ["branches", "branches", (row) => row.branches, true],
  ["tokens", "tokens", (row) => row.tokens, true],
  ["reward", "reward", (row) => row.reward, false],
  ["failures", "failures", (row) => row.failures && sum(row.failures), true],
  ["versions", "versions", (row) => listed(row.versions), true],
  ["created_at", "created", (row) => row.created_at, false],
  ["metadata", "metadata", (row) => JSON.stringify(row.metadata), false],
];
const BY_NAME = new Map(COLUMNS.map((column) => [column[0], column]));
const ALIASES = { id: "session_id", session: "session_id", label: "labels", version: "versions", created: "created_at" };
const TERM = /^([a-z_]+)(:|>=|<=|>|<|=)(.+)$/;

/** One word of a filter as a test of a row, and whether it needs counts. Words without a column look everywhere. */
function term(word) {
  const match = TERM.exec(word);
  const column = match && BY_NAME.get(ALIASES[match[1]] ?? match[1]);
  if (!column) {
    const wanted = word.toLowerCase();
    return [(row) => `${row.session_id} ${row.state} ${row.group_id ?? ""} ${JSON.stringify(row.metadata)} ${listed(row.labels)}`.toLowerCase().includes(wanted), false];
  }
  const [, , valueOf, counted] = column;
  const [, , sign, text] = match;
  const wanted = Number(text);
  const tests = {
    ":": (value) => String(value ?? "").toLowerCase().includes(text.toLowerCase()),
    "=": (value) => (typeof value === "number" ? value === wanted : String(value) === text),
    ">": (value) => value > wanted,
    "<": (value) => value < wanted,
    ">=": (value) => value >= wanted,
    "<=": (value) => value <= wanted,
  };
  return [(row) => { const value = valueOf(row); return value !== null && value !== undefined && tests[sign](value); }, counted];
}

export class Sessions {
  constructor(root, info, live) {
    this.root = root;
    this.info = info;
    this.live = live;
    this.rows = new Map();
    this.tags = new Map();
    this.elements = new Map(); // id → [its row as JSON, its element, whether its counts were known]
    this.numShown = SHOWN;
    this.isGone = false;
    this.wanted = []; // ids whose counts are to be asked for, the next one last
    this.queued = new Set(); // the same; `wanted` may have one twice
    this.failed = new Set();
    this.asking = 0;
    this.isCut = false;
  }

  async open(query) {
    this.query = table.query = query;
    this.filter = h("input", {
      type: "search", id: "filter", value: query.q ?? "", "aria-label": "Filter", autocomplete: "off", spellcheck: "false",
      placeholder: "filter: text, state:open, label:subagent, turns>3, reward<0.5",
      oninput: later(() => this.apply(), 120),
    });
    this.total = h("span", { class: "quiet", role: "status" });
    this.body = h("tbody");
    this.heads = COLUMNS.map(([name, title]) =>
      h("th", { scope: "col", data: { name } }, h("button", { type: "button", onclick: () => this.sort(name) }, title)));
    this.more = h("button", { type: "button", class: "more", onclick: () => { this.numShown += SHOWN; this.draw(); } }, "More rows");
    this.root.replaceChildren(
      h("div", { class: "sessions" },
        h("div", { class: "bar" }, this.filter, this.total),
        h("div", { class: "scroll", onkeydown: (event) => this.key(event) },
          h("table", {}, h("caption", { class: "visually-hidden" }, "Sessions"), h("thead", {}, h("tr", {}, this.heads)), this.body), this.more)),
    );
    await this.load();
    if (!this.isGone) this.follow();
  }

  moved(query) {
    if (JSON.stringify(query) === JSON.stringify(this.query)) return;
    this.filter.value = query.q ?? "";
    this.query = table.query = query;
    this.draw();
  }

  /** What is typed is the filter. */
  apply() {
    if (!this.isGone && this.filter.value !== (this.query.q ?? "")) this.change({ q: this.filter.value });
  }

  /** The same view with another filter or order. */
  change(query) {
    this.query = table.query = { ...this.query, ...query };
    this.numShown = SHOWN;
    go(null, this.query, true);
    this.draw();
  }

  sort(name) {
    this.change({ sort: this.query.sort === name ? `-${name}` : this.query.sort === `-${name}` ? null : name });
  }

  async load() {
    let after = "";
    const seen = new Set();
    while (true) {
      const page = await ask(after, PAGE);
      if (this.isGone) return;
      for (const row of page.sessions) {
        const known = this.rows.get(row.session_id);
        if (known && known.state !== row.state) this.tags.delete(row.session_id);
        this.rows.set(row.session_id, { ...known, ...row });
        seen.add(row.session_id);
        after = row.session_id;
      }
      this.isCut = page.has_more && seen.size >= MOST;
      if (!page.has_more || !page.sessions.length || this.isCut) break;
      if (seen.size === PAGE) this.draw(); // something to look at, meanwhile
    }
    for (const id of this.rows.keys()) if (!seen.has(id)) this.rows.delete(id);
    this.draw();
  }

  draw() {
    if (this.isGone) return;
    const terms = (this.query.q ?? "").split(/\s+/).filter(Boolean).map(term);
    const [order, name] = this.query.sort?.startsWith("-") ? [-1, this.query.sort.slice(1)] : [1, this.query.sort];
    const column = BY_NAME.get(name);
    const isCounted = terms.some(([, counted]) => counted) || column?.[3];
    if (isCounted) this.count([...this.rows.keys()].filter((id) => !this.tags.has(id) && !this.queued.has(id)));
    let found = [...this.rows.values()].filter((row) => terms.every(([test]) => test(row)));
    if (column) {
      const missing = (value) => value === null || value === undefined;
      found.sort((a, b) => {
        const [x, y] = [column[2](a), column[2](b)];
        if (missing(x) || missing(y)) return missing(x) - missing(y);
        return order * (typeof x === "string" ? x.localeCompare(String(y), "en", { numeric: true }) : x - y);
      });
    }
    for (const head of this.heads) {
      if (head.dataset.name === name) head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
    const uncounted = isCounted ? [...this.rows.values()].filter((row) => row.turns === undefined).length : 0;
    const all = `${this.isCut ? "the first " : ""}${plural(this.rows.size, "session")}`;
    this.total.textContent = `${found.length === this.rows.size ? all : `${count(found.length)} of ${all}`}${uncounted ? `, counting ${count(uncounted)}` : ""}`;
    const now = found.slice(0, this.numShown);
    this.more.hidden = now.length === found.length;
    this.count(now.map((row) => row.session_id).filter((id) => !this.tags.has(id)));
    const focused = document.activeElement?.closest("tr")?.dataset.id;
    this.elements = new Map(now.map((row) => [row.session_id, this.element(row)]));
    place(this.body, now.length ? [...this.elements.values()].map(([, element]) => element) : [h("tr", {}, h("td", { colspan: COLUMNS.length, class: "empty" }, this.rows.size ? "No session is like that." : "No sessions yet."))]);
    if (focused && !this.body.contains(document.activeElement)) this.elements.get(focused)?.[1].querySelector("a").focus({ preventScroll: true });
  }

  /** A row's element: the one that is there, unless something in it has changed. */
  element(row) {
    const known = this.elements.get(row.session_id);
    const text = JSON.stringify(row);
    return known?.[0] === text ? known : [text, this.row(row, known?.[2]), row.turns !== undefined];
  }

  row(row, changed = false) {
    const created = row.created_at === null ? "" : new Date(row.created_at * 1000).toISOString().slice(0, 19).replace("T", " ");
    const cells = {
      session_id: h("td", { class: "wide mono" }, h("a", { href: link(row.session_id) }, plain(row.session_id))),
      state: h("td", {}, chip(row.state, row.state)),
      labels: h("td", {}, Object.entries(row.labels ?? {}).map(([label, number]) => [chip(number > 1 ? `${label} ${number}` : label), " "])),
      turns: h("td", { class: "number" }, count(row.turns)),
      branches: h("td", { class: "number" }, count(row.branches)),
      tokens: h("td", { class: "number" }, count(row.tokens)),
      reward: h("td", { class: "number" }, row.reward === null ? "" : String(Math.round(row.reward * 1e4) / 1e4)),
      failures: h("td", {}, Object.entries(row.failures ?? {}).map(([kind, number]) => [chip(`${kind} ${number}`, "bad"), " "])),
      versions: h("td", { class: "wide mono" }, plain(listed(row.versions))),
      created_at: h("td", { class: "quiet" }, created),
      metadata: h("td", { class: "rest quiet mono", title: plain(JSON.stringify(row.metadata)) }, plain(told(row.metadata) + (row.metadata_cut ? " …" : ""))),
    };
    return h("tr", { data: { id: row.session_id }, class: changed ? "changed" : null }, COLUMNS.map(([name]) => cells[name]));
  }

  /** Ask for the counts of these sessions, a few at a time; what is asked for last comes first. */
  count(ids) {
    for (const id of ids.reverse()) {
      this.wanted.push(id);
      this.queued.add(id);
    }
    while (this.asking < AT_ONCE && this.wanted.length) {
      const id = this.wanted.pop();
      if (this.queued.delete(id)) this.one(id);
    }
  }

  async one(id) {
    this.asking += 1;
    try {
      const known = this.tags.get(id) ?? null;
      this.tags.set(id, known);
      const answer = await get(of(id, "summary"), {}, known);
      const listed = this.rows.get(id);
      if (answer !== null && listed && !this.isGone) {
        const { tag, metadata: _, ...counts } = answer; // the list's metadata may be cut: a row must not change to and fro
        this.tags.set(id, tag);
        this.rows.set(id, { ...listed, ...counts });
        this.redraw();
      }
    } catch {
      this.failed.add(id); // deleted meanwhile, or there is no answer for the moment
      this.retry();
    } finally {
      this.asking -= 1;
      if (!this.isGone) this.count([]);
    }
  }

  redraw = soon(() => this.draw(), 250);

  retry = soon(() => {
    for (const id of this.failed) this.tags.delete(id);
    this.failed.clear();
    this.draw();
  }, AGAIN_MS);

  /** Look again while the page can be seen. */
  follow() {
    if (this.info.kind === "file") return;
    this.live(true);
    let ticks = 0;
    const tick = async () => {
      if (this.isGone) return;
      if (document.visibilityState === "visible") {
        try {
          ticks += 1;
          if (this.rows.size <= PAGE || ticks % 10 === 0) await this.load();
          this.count([...this.elements.keys()].filter((id) => this.rows.get(id)?.state === "open"));
          if (!this.isGone) this.live(true);
        } catch (error) {
          if (!this.isGone) this.live(false, error.message);
        }
      }
      if (!this.isGone) this.timer = setTimeout(tick, POLL_MS);
    };
    this.timer = setTimeout(tick, POLL_MS);
  }

  key(event) {
    const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    const links = [...this.body.querySelectorAll("a")];
    if (!step || !links.length) return;
    const at = links.indexOf(document.activeElement);
    links[Math.min(Math.max(at + step, 0), links.length - 1)].focus();
    event.preventDefault();
  }

  seek() {
    this.filter.focus();
  }

  first() {
    this.apply(); // Enter may be faster than what is typed
    this.body.querySelector("a")?.focus();
  }

  close() {
    this.isGone = true;
    clearTimeout(this.timer);
    this.live(false);
  }
}
