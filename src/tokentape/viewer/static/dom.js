// Elements, made without HTML text: whatever a session says is text, and what cannot be seen is spelled out.

// Runs of controls, bidi marks, zero widths, fillers, lone surrogates; not line feeds, tabs, and what makes an emoji of a sign.
const ODD = /(?:(?![\n\t\ufe0f])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\p{DI}])+/gu;

/** An element. `given`: attributes, `on…` listeners, `class`, `data`; children are nodes, texts or null. */
export function h(name, given = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "data") Object.assign(element.dataset, value);
    else if (key === "class") element.className = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  return more(element, children);
}

/** Appends nodes and texts one by one: there may be more of them than a call can have arguments. */
export function more(element, nodes) {
  for (const node of nodes.flat(Infinity)) if (node !== null && node !== undefined) element.append(node);
  return element;
}

export function fill(element, nodes) {
  element.replaceChildren();
  return more(element, nodes);
}

/** Makes elements an element's children. Those that stay are not touched: they keep focus, selection and a click's begin. */
export function place(parent, children) {
  const stays = new Set(children);
  for (const old of [...parent.children]) if (!stays.has(old)) old.remove();
  let at = parent.firstElementChild;
  for (const child of children) {
    if (child === at) at = at.nextElementSibling;
    else parent.insertBefore(child, at);
  }
}

/** How odd characters are written. */
function spelled(run) {
  return Array.from(run, (character) => `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`).join("");
}

/** A text as nodes, odd characters marked. */
export function shown(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(ODD)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(h("span", { class: "odd" }, spelled(match[0])));
    end = match.index + match[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

/** The same as one text, for attributes and titles. */
export function plain(text) {
  return text.replace(/[\n\t]/g, " ").replace(ODD, spelled);
}

export function chip(text, kind = "") {
  return text === "" ? null : h("span", { class: `chip ${kind}` }, plain(text));
}

export const count = (number) => (number === null || number === undefined ? "" : number.toLocaleString("en"));

export const plural = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;

/** Where the string ends that begins at `at`. */
function afterString(text, at) {
  do at += text[at] === "\\" ? 2 : 1; while (text[at] !== '"');
  return at + 1;
}

/** JSON text, indented where it is JSON. Numbers and names are left as they are written: a parser rounds, and drops what comes twice. */
export function pretty(text) {
  try {
    JSON.parse(text);
  } catch {
    return text;
  }
  const out = [];
  let depth = 0, before = "";
  const other = /[{}[\],:]|[^\s{}[\],:"]+/y;
  for (let at = 0; at < text.length;) {
    if (/\s/.test(text[at])) { at += 1; continue; }
    other.lastIndex = at;
    const piece = text[at] === '"' ? text.slice(at, afterString(text, at)) : other.exec(text)[0];
    at += piece.length;
    const closes = piece === "}" || piece === "]";
    const opened = before === "{" || before === "[";
    if (closes) depth -= 1;
    if (opened !== closes || before === ",") out.push("\n", "  ".repeat(depth)); // {} stays on its line
    out.push(piece === ":" ? ": " : piece);
    if (piece === "{" || piece === "[") depth += 1;
    before = piece;
  }
  return out.join("");
}

/** Calls `work` once nothing has come for so many milliseconds. */
export function later(work, milliseconds) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), milliseconds);
  };
}

/** Calls `work` so many milliseconds after the first call; those that come meanwhile are the same one. */
export function soon(work, milliseconds) {
  let timer = 0;
  return () => { timer ||= setTimeout(() => { timer = 0; work(); }, milliseconds); };
}
