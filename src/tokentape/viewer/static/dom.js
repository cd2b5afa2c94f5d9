// Elements, made without HTML text: whatever a session says is text, and what cannot be seen is spelled out.

const ODD = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu; // controls, bidi marks, zero widths, lone surrogates

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
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** How one odd character is written; line feeds and tabs are not odd. */
function spelled(character) {
  return `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** A text as nodes, odd characters marked. */
export function shown(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(ODD)) {
    if (match[0] === "\n" || match[0] === "\t") continue;
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(h("span", { class: "odd" }, spelled(match[0])));
    end = match.index + match[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

/** The same as one text, for attributes and titles. */
export function plain(text) {
  return text.replace(ODD, (character) => (character === "\n" || character === "\t" ? " " : spelled(character)));
}

export function chip(text, kind = "") {
  return text === "" ? null : h("span", { class: `chip ${kind}` }, plain(text));
}

export const count = (number) => (number === null || number === undefined ? "" : number.toLocaleString("en"));

export const plural = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;

/** JSON text, indented where it is JSON. */
export function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** Calls `work` once nothing has come for so many milliseconds. */
export function later(work, milliseconds) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), milliseconds);
  };
}
