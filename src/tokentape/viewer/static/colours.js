// What a token's colour says. Each mode gives a token a class, and a line a word in its margin.

export const LOGPROB = [[0.05, "≥ 95 %"], [0.35, "≥ 70 %"], [1.2, "≥ 30 %"], [2.5, "≥ 8 %"], [5, "≥ 0.7 %"], [Infinity, "less"]];
export const DIFFERENCE = [[1e-5, "≤ 1e-5"], [1e-3, "≤ 0.001"], [1e-2, "≤ 0.01"], [0.1, "≤ 0.1"], [0.5, "≤ 0.5"], [Infinity, "more"]];
const level = (value, steps) => steps.findIndex(([most]) => value <= most);

const WORDS = { prompt: "prompt", bridge: "bridge", sampled: "sampled", untrained: "context" };

/** Where a token comes from. `stretch` is its turn in the branch, `index` that turn's number. */
export function provenance(at, stretch, index) {
  if (at < stretch.start) return index ? "bridge" : "prompt";
  return stretch.trained ? "sampled" : "untrained";
}

export const MODES = {
  provenance: {
    title: "provenance",
    of: (token) => token.kind,
    word: (token) => WORDS[token.kind],
    legend: () => [["prompt", "abc", "the first turn's prompt"], ["bridge", "abc", "between turns, never sampled"], ["sampled", "abc", "sampled and trained here"], ["untrained", "abc", "sampled, not trained here"]],
  },
  logprob: {
    title: "log-probability",
    of: (token) => (token.logprob === null ? "none" : `l${level(-token.logprob, LOGPROB)}`),
    word: (token) => WORDS[token.kind],
    legend: () => [...LOGPROB.map(([, text], index) => [`l${index}`, "abc", `probability ${text}`]), ["none", "abc", "none recorded"]],
  },
  version: {
    title: "weight version",
    of: (token, grid) => (token.version === null ? "none" : `v${grid.versions.indexOf(token.version) % 6}`),
    word: (token) => (token.version === null ? WORDS[token.kind] : `@ ${token.version}`),
    legend: (grid) => [...grid.versions.map((version, index) => [`v${index % 6}`, "abc", version]), ["none", "abc", "not sampled, or not known"]],
  },
  difference: {
    title: "recorded and recomputed",
    of: (token) => (token.difference === null ? "none" : `l${level(Math.abs(token.difference), DIFFERENCE)}`),
    word: (token) => WORDS[token.kind],
    legend: () => [...DIFFERENCE.map(([, text], index) => [`l${index}`, "abc", `${text} nats apart`]), ["none", "abc", "not compared"]],
  },
  drift: {
    title: "drift",
    of: (token, grid) => (token.drift ? "drifts" : token.at >= grid.checked || token.kind === "prompt" || token.kind === "bridge" ? "none" : "same"),
    word: (token) => (token.drift ? "drift" : WORDS[token.kind]),
    legend: () => [["drifts", "abc", "re-encoding would split otherwise"], ["same", "abc", "sampled, the same ids again"], ["none", "abc", "not sampled, or not checked"]],
  },
};
