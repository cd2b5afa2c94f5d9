// The page: which view is shown, the keys, light and dark.

import { info as askInfo } from "./api.js";
import { h, plain } from "./dom.js";
import { here, link, table } from "./route.js";
import { Session } from "./session.js";
import { Sessions } from "./sessions.js";

const KEYS = [
  ["/", "filter or search"], ["? ", "these keys"], ["↑ ↓ or j k", "up and down in table and tree"], ["Enter", "open"],
  ["m t w c", "messages, tokens, wire, side by side"], ["1 … 5", "colours: provenance, log-probability, version, difference, drift"],
  ["b g", "to the tree, to the tokens"], ["← → ↑ ↓", "from token to token"], ["[ ]", "turn before, next turn"], ["n N", "next hit, hit before"], ["Esc", "back to the table"],
];

const main = document.getElementById("main");
const crumbs = document.getElementById("crumbs");
const liveMark = document.getElementById("live");
let info = null;
let view = null;

function live(isOn, problem = "") {
  liveMark.className = isOn ? "live on" : "live";
  liveMark.textContent = isOn ? "live" : problem;
}

/** Instead of the view, which is broken: the next one, or another try, begins anew. */
function problem(error) {
  view?.close();
  view = null;
  main.replaceChildren(h("div", { class: "problem" }, h("p", { role: "alert" }, plain(error.message || String(error))), h("button", { type: "button", onclick: route }, "Try again")));
}

async function route() {
  let mine = view;
  try {
    info ??= await askInfo();
    mine = view;
    const { session, query } = here();
    if (mine && (session === null ? mine instanceof Sessions : mine instanceof Session && mine.id === session)) {
      await mine.moved(query);
      return;
    }
    view?.close();
    crumbs.replaceChildren(session === null ? h("h1", {}, plain(`${info.kind} ${info.name}`)) : h("a", { href: link(null, table.query) }, "sessions"), ...(session === null ? [] : [h("h1", { class: "mono" }, plain(session))]));
    document.title = session === null ? `${plain(info.name)} · tokentape` : `${plain(session)} · tokentape`;
    view = mine = session === null ? new Sessions(main, info, live) : new Session(main, session, info, live);
    const opens = mine.open(query);
    main.focus({ preventScroll: true }); // what had the focus is gone
    await opens;
    document.documentElement.dataset.ready = "1";
  } catch (error) {
    if (view === mine) problem(error); // another view is none the worse
  }
}

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
}

function toggleTheme() {
  const isDark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  theme(isDark ? "light" : "dark");
  localStorage.setItem("tokentape-theme", isDark ? "light" : "dark");
}

function showKeys() {
  const dialog = document.getElementById("keys");
  dialog.replaceChildren(h("h2", { id: "keys-title" }, "Keys"), h("dl", {}, KEYS.map(([key, text]) => [h("dt", {}, h("kbd", {}, key.trim())), h("dd", {}, text)])), h("form", { method: "dialog" }, h("span", { class: "grow" }), h("button", {}, "Close")));
  dialog.showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  const field = event.target.closest("input, select, textarea");
  if (field) {
    if (event.key === "Escape") { field.blur(); view?.first(); event.preventDefault(); }
    if (event.key === "Enter" && field.id === "filter") { view?.first(); event.preventDefault(); }
    return;
  }
  if (event.key === "/") view?.seek();
  else if (event.key === "?") showKeys();
  else if (view instanceof Session ? !view.key(event) : !["j", "k"].includes(event.key)) return;
  else if (view instanceof Sessions) view.first();
  event.preventDefault();
});

document.getElementById("theme").addEventListener("click", toggleTheme);
document.getElementById("help").addEventListener("click", showKeys);
addEventListener("hashchange", route);
theme(localStorage.getItem("tokentape-theme"));
await route();
