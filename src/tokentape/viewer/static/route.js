// Where the page is, in the part of its address behind #: every view is a link.

/** `#/s/ID?b=TURN&tab=tokens` as `{session, query}`; the table has no session. */
export function here() {
  const [path, text] = location.hash.replace(/^#\/?/, "").split("?");
  const [kind, id] = path.split("/");
  return { session: kind === "s" && id ? decodeURIComponent(id) : null, query: Object.fromEntries(new URLSearchParams(text)) };
}

export function link(session, query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(kept).toString();
  return `#/${session === null ? "" : `s/${encodeURIComponent(session)}`}${text ? `?${text}` : ""}`;
}

/** The table's filter and order, to come back to. */
export const table = { query: {} };

/** Go somewhere; `quietly`: the same view, a little further, which needs no entry in the history. */
export function go(session, query, quietly = false) {
  const to = link(session, query);
  if (to === location.hash) return;
  if (quietly) history.replaceState(null, "", to);
  else location.hash = to;
}
