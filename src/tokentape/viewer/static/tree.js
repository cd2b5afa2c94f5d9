// A session's turns as a tree: branches are indented where they leave, and say why.

import { chip, count, h, place, plain } from "./dom.js";

/** Turns in the order in which they are shown, each with its depth: forks come before what simply goes on. */
function laidOut(turns) {
  const children = new Map([[null, []]]);
  for (const turn of turns) {
    if (!children.has(turn.parent_id)) children.set(turn.parent_id, []);
    children.get(turn.parent_id).push(turn);
  }
  const out = [];
  const waiting = children.get(null).map((turn) => [turn, 0]).reverse();
  while (waiting.length) {
    const [turn, depth] = waiting.pop();
    out.push([turn, depth]);
    const below = children.get(turn.turn_id) ?? [];
    const goesOn = below.filter((one) => one.reason === null);
    const forks = below.filter((one) => one.reason !== null);
    const next = [...forks.map((one) => [one, depth + 1]), ...goesOn.map((one) => [one, depth])];
    waiting.push(...next.reverse());
  }
  return out;
}

export class Tree {
  /** `choose(turn_id)` is called for the turn that is clicked or entered. */
  constructor(choose) {
    this.choose = choose;
    this.element = h("div", { class: "tree", role: "tree", "aria-label": "Turns", onkeydown: (event) => this.key(event) });
    this.items = new Map();
    this.looks = new Map(); // turn → what its item was made of
    this.selected = null;
  }

  /** `grown`: nobody went anywhere, so the selected turn is followed only where it was in view. */
  draw(session, selected, path, grown = false) {
    const ends = new Map(session.branches.map((branch) => [branch.branch_id, branch]));
    const on = new Set(path);
    const focused = this.element.contains(document.activeElement) ? document.activeElement.dataset.turn : null;
    const follows = selected !== this.selected && (!grown || this.isSeen(this.items.get(this.selected)));
    const items = new Map();
    for (const [turn, depth] of laidOut(session.turns)) {
      const facts = [turn, depth, ends.get(turn.turn_id), turn.turn_id === selected, on.has(turn.turn_id)];
      const look = JSON.stringify(facts);
      items.set(turn.turn_id, this.looks.get(turn.turn_id) === look ? this.items.get(turn.turn_id) : this.item(...facts));
      this.looks.set(turn.turn_id, look);
    }
    this.items = items;
    this.selected = selected;
    place(this.element, [...items.values()]);
    const current = items.get(focused) ?? items.get(selected) ?? this.element.firstElementChild;
    for (const item of items.values()) item.tabIndex = item === current ? 0 : -1;
    if (focused) current.focus({ preventScroll: true });
    if (follows) items.get(selected)?.scrollIntoView({ block: "nearest" });
  }

  isSeen(item) {
    if (!item) return true;
    const [its, pane] = [item.getBoundingClientRect(), this.element.parentElement.getBoundingClientRect()];
    return its.bottom > pane.top && its.top < pane.bottom;
  }

  item(turn, depth, end, selected, isOn) {
    const item = h("div", {
      class: `turn ${end ? "end" : ""} ${isOn ? "on-path" : ""}`, role: "treeitem", tabindex: "-1",
      "aria-level": depth + 1, "aria-selected": String(selected), data: { turn: turn.turn_id },
      onclick: () => this.choose(turn.turn_id),
    },
      h("span", { class: "dot", "aria-hidden": "true" }),
      h("span", { class: "head" },
        turn.reason === null ? null : chip(turn.reason, "reason"),
        turn.label === "main" ? null : chip(turn.label),
        `+${count(turn.num_given)} → ${count(turn.num_sampled)}`,
        turn.parse_status === "ok" ? null : chip(turn.parse_status, "bad"),
        turn.finish_reason === "length" ? chip("cut: length", "bad") : null,
        turn.reward === null ? null : chip(`reward ${turn.reward}`)),
      h("span", { class: "preview" }, plain(turn.preview) || "(nothing said)"),
      end ? h("span", { class: "head preview" }, `branch of ${count(end.num_tokens)} tokens, ${count(end.num_trained)} trained`,
        end.reward === null ? null : chip(`reward ${end.reward}`)) : null);
    item.style.paddingInlineStart = `${14 + 18 * Math.min(depth, 8)}px`;
    return item;
  }

  key(event) {
    const items = [...this.items.values()];
    const at = items.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, j: at + 1, ArrowUp: at - 1, k: at - 1, Home: 0, End: items.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") this.choose(document.activeElement.dataset.turn);
    else if (to !== undefined && items[to]) {
      for (const item of items) item.tabIndex = -1;
      items[to].tabIndex = 0;
      items[to].focus();
    } else return;
    event.preventDefault();
  }
}
