// A session's turns as a tree: branches are indented where they leave, and say why.

import { chip, count, h, plain } from "./dom.js";

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
  }

  draw(session, selected, path) {
    const ends = new Map(session.branches.map((branch) => [branch.branch_id, branch]));
    const on = new Set(path);
    const focused = this.element.contains(document.activeElement);
    this.items = new Map(laidOut(session.turns).map(([turn, depth]) => [turn.turn_id, this.item(turn, depth, ends.get(turn.turn_id), turn.turn_id === selected, on)]));
    this.element.replaceChildren(...this.items.values());
    const now = this.items.get(selected) ?? this.element.firstElementChild;
    if (now) {
      now.tabIndex = 0;
      if (focused) now.focus({ preventScroll: true });
    }
  }

  item(turn, depth, end, selected, on) {
    const item = h("div", {
      class: `turn ${end ? "end" : ""} ${on.has(turn.turn_id) ? "on-path" : ""}`, role: "treeitem", tabindex: "-1",
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
      end ? h("span", { class: "head preview" }, `branch of ${count(end.num_tokens)} tokens, ${count(end.num_trained)} trained`) : null);
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
