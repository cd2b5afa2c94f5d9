// A branch's tokens in lines. Only lines in view are on the page, tokens come in chunks: length costs nothing.

import { get, of } from "./api.js";
import { MODES, provenance } from "./colours.js";
import { h, later, plain } from "./dom.js";

const ROW = 24; // px, as in style.css
const CHUNK = 2048; // tokens
const SPARE = 12; // lines drawn beyond those in view
export const GUTTER = 132 + 24; // px beside a line's tokens
const AT_ONCE = 3;
const PAUSE_MS = 2000; // before what failed is asked for again
const TALLEST = 8_000_000; // px; browsers know no taller element

let made = 0;

/** The last index whose value is at most `wanted`; values ascend. */
function before(values, wanted) {
  let [low, high] = [0, values.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (values[middle] <= wanted) low = middle;
    else high = middle - 1;
  }
  return low;
}

export class Tokens {
  /** `looked(token)` is told which token the pointer or the keyboard is on, `moved(at)` which one was chosen. */
  constructor({ session, label, columns = null, looked = () => {}, moved = () => {}, scrolled = () => {} }) {
    Object.assign(this, { session, looked, moved, scrolled, fixed: columns });
    this.number = (made += 1); // its tokens' ids stay the same while the branch grows
    this.mode = "provenance";
    this.at = null;
    this.lookedAt = null;
    this.hits = [];
    this.now = null;
    this.differs = null;
    this.scores = null; // Map: token → recomputed
    this.drifts = []; // in order
    this.driftStarts = [];
    this.checked = 0; // tokens whose drift is known
    this.hitStarts = [];
    this.chunks = new Map();
    this.asking = new Set();
    this.pause = 0;
    this.drawn = new Map();
    this.all = h("div", { class: "all", role: "presentation" });
    this.element = h("div", { class: "grid", role: "grid", tabindex: "0", "aria-label": label, "aria-readonly": "true",
      onscroll: () => this.paint(), onkeydown: (event) => this.key(event),
      onpointerover: (event) => this.hover(event), onclick: (event) => this.click(event) }, this.all);
    this.trouble = h("span", { role: "alert" });
    this.watching = new ResizeObserver(later(() => this.resized().catch((error) => this.tell(error.message)), 150));
    this.isGone = false;
    this.frame = 0;
  }

  /** Show a branch; what its last look at the same branch knew is kept where it still holds. */
  async show(head) {
    const grows = this.head && head.turns[0].turn_id === this.head.turns[0].turn_id && head.num_tokens >= this.head.num_tokens
      && this.head.turns.every((turn, index) => head.turns[index]?.turn_id === turn.turn_id);
    if (!grows) this.chunks.clear();
    const kept = grows && this.starts ? this.starts.length - 1 : 0; // lines that stay as they are
    const atEnd = this.head && this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight < 2 * ROW && this.element.scrollTop > 0;
    this.head = head;
    this.versions = [...new Set(head.version_spans.map(([version]) => version))];
    this.edges = head.turns.map((turn) => turn.begin);
    this.spans = head.version_spans.map(([, start]) => start);
    if (await this.layOut(kept) === null) return;
    this.watching.observe(this.element);
    if (grows && atEnd) this.element.scrollTop = this.element.scrollHeight;
  }

  /** The token that was at the top until the new lines came; null where another branch is shown by then. */
  async layOut(kept = 0) {
    this.columns = this.fixed ?? this.fitting();
    const { head, columns } = this;
    const { starts, num_tokens } = await get(of(this.session, head.branch_id, "lines"), { columns });
    if (this.isGone || head !== this.head || columns !== this.columns) return null;
    const top = this.starts ? this.starts[this.topLine()] : 0;
    this.starts = starts;
    this.num_tokens = num_tokens;
    this.height = Math.min(starts.length * ROW, TALLEST);
    this.all.style.height = `${this.height}px`;
    this.element.setAttribute("aria-rowcount", starts.length);
    this.redraw(kept);
    return top;
  }

  /** How many columns there is room for. */
  fitting() {
    const probe = h("span", { class: "t" }, "0".repeat(100));
    this.all.append(probe);
    const letter = probe.getBoundingClientRect().width / 100 || 8;
    probe.remove();
    return Math.max(24, Math.min(400, Math.floor((this.element.clientWidth - GUTTER) / letter)));
  }

  async resized() {
    if (!this.head || !this.element.isConnected || this.fixed || this.fitting() === this.columns) return;
    const top = await this.layOut();
    if (top !== null) this.toLine(before(this.starts, top));
  }

  // -- where things are

  /** Lines above the view where all of them do not fit into the tallest element there can be. */
  topLine() {
    const most = Math.max(1, this.height - this.element.clientHeight);
    const hidden = Math.max(0, this.starts.length * ROW - this.height);
    return Math.min(this.starts.length - 1, Math.max(0, Math.floor((this.element.scrollTop + hidden * (this.element.scrollTop / most)) / ROW)));
  }

  toLine(line) {
    const whole = this.starts.length * ROW;
    const most = Math.max(1, whole - this.element.clientHeight);
    this.element.scrollTop = (line * ROW) * ((this.height - this.element.clientHeight) / most);
    this.paint();
  }

  /** Scroll so that a token is in view, a third from the top where it was not. */
  reveal(at) {
    const line = before(this.starts, at);
    const top = this.topLine();
    const lines = Math.floor(this.element.clientHeight / ROW);
    if (line < top + 1 || line > top + lines - 2) this.toLine(Math.max(0, line - Math.floor(lines / 3)));
  }

  choose(at) {
    this.at = Math.max(0, Math.min(at, this.num_tokens - 1));
    this.reveal(this.at);
    this.redraw();
    this.look(this.at);
    this.moved(this.at);
  }

  /** Tell what is known of a token; of the last one again, where more has become known. */
  look(at = this.lookedAt) {
    this.lookedAt = at;
    const token = at === null ? null : this.token(at);
    if (token) this.looked(token);
  }

  // -- tokens

  /** All that is known of a token; null while its chunk is on its way. */
  token(at) {
    const chunk = this.chunks.get(Math.floor(at / CHUNK));
    if (!chunk || at - chunk.start >= chunk.ids.length) return null;
    const own = at - chunk.start;
    const seen = this.looker()(at);
    return {
      ...seen, id: chunk.ids[own], hex: chunk.hex[own], recomputed: this.scores?.get(at) ?? null,
      call: (seen.turn.attempts ?? []).find((one) => one.tokens && at >= one.tokens[0] && at < one.tokens[1]) ?? null,
    };
  }

  /** What a colour needs to know, of tokens that are asked for one after the other: places are found once. */
  looker() {
    let turn = null, index = 0, span = null, chunk = null, drift = null, nextDrift = -1;
    return (at) => {
      if (chunk === null || at < chunk.start || at >= chunk.start + chunk.ids.length) {
        chunk = this.chunks.get(Math.floor(at / CHUNK)) ?? null;
        if (chunk === null || at - chunk.start >= chunk.ids.length) { chunk = null; return null; }
      }
      if (turn === null || at >= turn.end) { index = before(this.edges, at); turn = this.head.turns[index]; }
      if (span === null || at >= span[2]) span = this.head.version_spans[before(this.spans, at)] ?? [null, 0, Infinity];
      if (this.drifts.length && (nextDrift < 0 || at >= this.drifts[nextDrift].end)) {
        nextDrift = before(this.driftStarts, at);
        drift = this.drifts[nextDrift];
      }
      const logprob = chunk.logprobs[at - chunk.start];
      const recomputed = this.scores === null ? undefined : this.scores.get(at);
      return {
        at, turn, index, logprob, kind: provenance(at, turn, index), text: chunk.texts[at - chunk.start],
        version: at >= span[1] && at < span[2] ? span[0] : null,
        difference: recomputed === undefined || logprob === null ? null : recomputed - logprob,
        drift: drift !== null && at >= drift.start && at < drift.end ? drift : null,
      };
    };
  }

  /** Whether all of a chunk is here: the last one of a branch that has grown is not. */
  has(number) {
    const chunk = this.chunks.get(number);
    return chunk !== undefined && chunk.start + chunk.ids.length >= Math.min((number + 1) * CHUNK, this.num_tokens);
  }

  fetch(number) {
    if (this.pause || this.has(number) || this.asking.has(number) || this.asking.size >= AT_ONCE) return;
    const head = this.head;
    this.asking.add(number);
    get(of(this.session, head.branch_id, "tokens"), { start: number * CHUNK, end: Math.min((number + 1) * CHUNK, this.num_tokens) })
      .then((chunk) => { if (this.head === head) this.chunks.set(number, chunk); this.tell(""); }, (error) => {
        this.tell(error.message);
        this.pause ||= setTimeout(() => { this.pause = 0; this.again(); }, PAUSE_MS);
      })
      .finally(() => {
        this.asking.delete(number);
        this.again();
        if (this.lookedAt !== null && Math.floor(this.lookedAt / CHUNK) === number) this.look();
      });
  }

  /** Draw the lines that wait for their tokens: what is missing is asked for. */
  again() {
    if (this.isGone) return;
    for (const [line, row] of this.drawn) if (row.dataset.waits) { row.remove(); this.drawn.delete(line); }
    this.paint();
  }

  tell(problem) {
    this.trouble.textContent = plain(problem);
    if (problem) this.element.prepend(h("div", { class: "trouble", role: "row" }, h("span", { role: "gridcell" }, this.trouble)));
    else this.trouble.closest(".trouble")?.remove();
  }

  // -- drawing

  redraw(kept = 0) {
    for (const [line, row] of this.drawn) if (line >= kept) { row.remove(); this.drawn.delete(line); }
    this.paint();
  }

  paint() {
    this.frame ||= requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  draw() {
    if (this.isGone || !this.starts?.length || !this.element.isConnected) return;
    const top = this.topLine();
    const offset = this.element.scrollTop - top * ROW - (this.element.scrollTop % ROW); // 0 unless squeezed
    if (offset !== this.offset) {
      this.offset = offset;
      for (const row of this.drawn.values()) row.remove();
      this.drawn.clear();
    }
    const first = Math.max(0, top - SPARE);
    const last = Math.min(this.starts.length, top + Math.ceil(this.element.clientHeight / ROW) + SPARE);
    for (const [line, row] of this.drawn) {
      if (line < first || line >= last) { row.remove(); this.drawn.delete(line); }
    }
    const fresh = document.createDocumentFragment();
    for (let line = first; line < last; line += 1) {
      if (this.drawn.has(line)) continue;
      const row = this.line(line);
      row.style.top = `${line * ROW + offset}px`;
      this.drawn.set(line, row);
      fresh.append(row);
    }
    this.all.append(fresh);
    const cursor = this.at === null ? null : document.getElementById(this.idOf(this.at));
    if (cursor) this.element.setAttribute("aria-activedescendant", cursor.id);
    else this.element.removeAttribute("aria-activedescendant");
    this.scrolled(top);
  }

  idOf(at) {
    return `t-${this.number}-${at}`;
  }

  line(line) {
    const [start, end] = [this.starts[line], this.starts[line + 1] ?? this.num_tokens];
    const row = h("div", { class: "row-of-tokens", role: "row", "aria-rowindex": line + 1 });
    const gutter = h("span", { class: "gutter", role: "rowheader" }, String(start));
    row.append(gutter);
    const mode = MODES[this.mode];
    const look = this.looker();
    for (let at = start; at < end; at += 1) {
      const token = look(at);
      if (!token) {
        row.dataset.waits = "1";
        this.fetch(Math.floor(at / CHUNK));
        break;
      }
      if (at === start) {
        const isNew = token.turn.begin === start || token.turn.start === start;
        const above = start > 0 && line % 16 ? this.looker()(start - 1) : null;
        const word = isNew ? `${token.index + 1} ${mode.word(token)}` : !above || mode.word(above) !== mode.word(token) ? mode.word(token) : "";
        gutter.prepend(h("i", { title: plain(word) }, plain(word)));
      }
      let kind = `t ${mode.of(token, this)}`;
      if (this.hits.length && this.isHit(at)) kind += at >= (this.now?.[0] ?? -1) && at < (this.now?.[1] ?? -1) ? " hit now" : " hit";
      if (at === this.at) kind += " at";
      if (at === this.differs) { kind += " differs"; gutter.prepend(h("b", { title: "the first difference" }, "≠")); }
      const cell = document.createElement("span");
      cell.className = kind;
      cell.textContent = token.text;
      cell.dataset.at = at;
      cell.setAttribute("role", "gridcell");
      if (at === this.at) { cell.id = this.idOf(at); cell.setAttribute("aria-selected", "true"); }
      row.append(cell);
    }
    return row;
  }

  isHit(at) {
    const [start, end] = this.hits[before(this.hitStarts, at)];
    return at >= start && at < end;
  }

  mark(hits, now = null, goes = true) {
    this.hits = hits;
    this.hitStarts = hits.map(([start]) => start);
    this.now = now;
    if (now && goes) this.reveal(now[0]);
    this.redraw();
  }

  drift(drifts, checked) {
    this.drifts = drifts;
    this.checked = checked;
    this.driftStarts = drifts.map((one) => one.start);
    this.redraw();
    this.look();
  }

  colour(mode) {
    if (mode === this.mode) return;
    this.mode = mode;
    this.redraw();
  }

  // -- pointer and keys

  hover(event) {
    const at = event.target.dataset?.at;
    if (at !== undefined) this.look(Number(at));
  }

  click(event) {
    const at = event.target.dataset?.at;
    if (at !== undefined) this.choose(Number(at));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.at ?? this.starts[this.topLine()];
    const line = before(this.starts, at);
    const lines = Math.max(1, Math.floor(this.element.clientHeight / ROW) - 2);
    const step = (by) => {
      const to = Math.max(0, Math.min(line + by, this.starts.length - 1));
      return Math.min(this.starts[to] + at - this.starts[line], (this.starts[to + 1] ?? this.num_tokens) - 1);
    };
    const turn = before(this.edges, at);
    const to = {
      ArrowRight: this.at === null ? at : at + 1, ArrowLeft: at - 1, ArrowDown: step(1), ArrowUp: step(-1), PageDown: step(lines), PageUp: step(-lines),
      Home: 0, End: this.num_tokens - 1,
      "]": this.edges[turn + 1] ?? at, "[": at > this.edges[turn] ? this.edges[turn] : this.edges[turn - 1] ?? 0,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.choose(to);
  }

  close() {
    this.isGone = true;
    clearTimeout(this.pause);
    this.watching.disconnect();
  }
}
