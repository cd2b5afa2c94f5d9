// A branch as the messages that the agent saw, turn by turn.

import { chip, count, fill, h, more, plain, plural, pretty, shown } from "./dom.js";

const CALLS = ["ok", "unknown_tool"]; // attempts that became calls; one in a thought may look the same
const LONG = 6000; // characters of a text that are shown at first

function text(content, kind = "body") {
  const box = h("div", { class: kind }, shown(content.slice(0, LONG)));
  if (content.length <= LONG) return box;
  const whole = h("button", { type: "button", class: "more", onclick: () => { fill(box, shown(content)); whole.remove(); } }, `All ${count(content.length)} characters`);
  return [box, whole];
}

function call(one, attempt, toTokens) {
  const { name, arguments: given } = one.function;
  return h("div", { class: "call" },
    h("div", { class: "row" }, h("b", {}, "calls ", h("code", {}, shown(name))), attempt ? status(attempt, toTokens) : null, h("span", { class: "quiet mono" }, plain(one.id ?? ""))),
    h("pre", {}, shown(pretty(given))));
}

function status(attempt, toTokens) {
  const span = `characters ${count(attempt.start)}–${count(attempt.end)}`;
  return [
    chip(attempt.status, attempt.status === "ok" ? "open" : "bad"),
    attempt.tokens
      ? h("a", { href: "#", onclick: (event) => { event.preventDefault(); toTokens(attempt.tokens[0]); } }, `${span}, tokens ${count(attempt.tokens[0])}–${count(attempt.tokens[1])}`)
      : h("span", { class: "quiet" }, span),
    attempt.error ? h("span", { class: "quiet" }, shown(attempt.error)) : null,
  ];
}

function message(one, ...more) {
  return h("article", { class: `message ${["system", "user", "assistant", "tool"].includes(one.role) ? one.role : ""}` },
    h("header", {}, h("b", {}, plain(one.role)), one.name ? h("span", {}, shown(one.name)) : null, one.tool_call_id ? h("span", { class: "mono" }, plain(one.tool_call_id)) : null, ...more),
    one.reasoning_content ? text(one.reasoning_content, "body reasoning") : null,
    one.content ? text(typeof one.content === "string" ? one.content : JSON.stringify(one.content)) : null);
}

/** All turns of a branch; `toTokens(at)` shows a token. */
export function messages(head, toTokens) {
  const list = h("div", { class: "messages", tabindex: "0", role: "region", "aria-label": "Messages" });
  addTurns(list, head, toTokens);
  return list;
}

/** The turns that are not in the list yet; the others stay as they are: scrolled, selected, expanded. */
export function addTurns(list, head, toTokens) {
  const known = list.querySelectorAll(".turn-rule").length;
  more(list, head.turns.slice(known).map((turn, index) => oneTurn(turn, known + index, toTokens)));
}

function oneTurn(turn, index, toTokens) {
  const rule = h("div", { class: "turn-rule", id: `turn-${turn.turn_id}` },
    h("b", {}, `turn ${index + 1}`), turn.reason ? chip(turn.reason, "reason") : null, turn.label === "main" ? null : chip(turn.label),
    turn.wire ? h("span", {}, plain(turn.wire)) : null,
    h("a", { href: "#", onclick: (event) => { event.preventDefault(); toTokens(turn.begin); } }, `tokens ${count(turn.begin)}–${count(turn.end)}`));
  const reply = message(turn.reply,
    chip(turn.trained ? "trained here" : "context here"),
    h("span", {}, `${plural(turn.num_sampled, "token")}, ${plain(turn.finish_reason)}`),
    turn.versions.length ? h("span", {}, plain(`weights ${turn.versions.join(", ")}`)) : null,
    h("span", { title: plain(JSON.stringify(turn.sampling)) }, plain(turn.logprob_basis)),
    turn.reward === null ? null : h("span", {}, `reward ${turn.reward}`));
  const calls = turn.reply.tool_calls ?? [];
  const attempts = [...(turn.attempts ?? [])];
  for (const one of calls) {
    const at = attempts.findIndex((attempt) => CALLS.includes(attempt.status) && attempt.name === one.function.name);
    reply.append(call(one, at < 0 ? null : attempts.splice(at, 1)[0], toTokens));
  }
  for (const attempt of attempts) {
    reply.append(h("div", { class: "call" }, h("div", { class: "row" }, h("b", {}, "tried to call ", h("code", {}, shown(attempt.name ?? "?"))), status(attempt, toTokens)), attempt.arguments ? h("pre", {}, shown(attempt.arguments)) : null));
  }
  if (Object.keys(turn.notes).length) reply.append(h("div", { class: "call" }, h("b", {}, "noted"), h("pre", {}, shown(JSON.stringify(turn.notes, null, 2)))));
  return [rule, turn.given.map((one) => message(one)), reply];
}
