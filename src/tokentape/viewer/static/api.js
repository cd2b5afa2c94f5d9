// What the page asks its server, with the key where one is needed.

import { h } from "./dom.js";

const KEY = "tokentape-key";
const ROOT = new URL("..", document.baseURI); // the page lies under …/ui/
let asking = null;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The answer as an object; null where `tag` says that nothing has changed. `answer.tag` is the new one. */
export async function get(path, query = {}, tag = null) {
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  while (true) {
    const headers = {};
    const key = sessionStorage.getItem(KEY);
    if (key !== null) headers.Authorization = `Bearer ${key}`;
    if (tag !== null) headers["If-None-Match"] = tag;
    const answer = await fetch(url, { headers, cache: "no-store" });
    if (answer.status === 304) return null;
    if (answer.status === 401) {
      await askKey(key !== null);
      continue;
    }
    const body = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Refused(answer.status, body.error?.message ?? `${answer.status} ${answer.statusText}`);
    if (answer.headers.has("ETag")) body.tag = answer.headers.get("ETag");
    return body;
  }
}

export const info = () => get("ui/api/info");
export const sessions = (after, limit) => get("ui/api/sessions", { after, limit });
export const of = (session, ...rest) => ["sessions", session, "view", ...rest].map(encodeURIComponent).join("/");

/** Asks for the key once, however many questions wait for it; it is kept while this tab is open. */
function askKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("login");
    const field = h("input", { type: "password", "aria-label": "API key", autocomplete: "off", required: true, pattern: "[\\x20-\\x7e]+", title: "Letters without accents, digits and signs" }); // what a header can carry
    const form = h("form", { method: "dialog" }, field, h("button", {}, "Open"));
    dialog.replaceChildren(
      h("h2", { id: "login-title" }, "This gateway asks for its API key"),
      h("p", { class: "quiet" }, wasWrong ? "That key was not right." : "It stays in this tab, and is sent to this address alone."),
      form,
    );
    form.addEventListener("submit", () => {
      sessionStorage.setItem(KEY, field.value);
      asking = null;
      resolve();
    });
    dialog.onclose = () => { if (asking) dialog.showModal(); }; // Esc closes it: without a key there is nothing to see
    if (!dialog.open) dialog.showModal();
  });
  return asking;
}
