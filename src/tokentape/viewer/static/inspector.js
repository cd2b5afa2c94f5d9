// What is known of one token, and what the colours mean.

import { MODES } from "./colours.js";
import { count, h, plain, plural } from "./dom.js";

const nats = (value) => (value === null ? null : value.toFixed(6));
const KINDS = { prompt: "prompt", bridge: "bridge: between turns", sampled: "sampled, trained here", untrained: "sampled, not trained here" };

export class Inspector {
  constructor(go) {
    this.go = go;
    this.token = h("section", { "aria-live": "polite" });
    this.legend = h("section");
    this.list = h("section");
    this.element = h("aside", { class: "inspector", "aria-label": "Token", tabindex: "0" }, this.token, this.list, this.legend);
    this.look(null);
  }

  look(token) {
    const title = h("h2", {}, "Token");
    if (token === null) {
      this.token.replaceChildren(title, h("p", { class: "quiet" }, "Point at a token, or use the arrow keys."));
      return;
    }
    const share = token.logprob === null ? null : `${(100 * Math.exp(token.logprob)).toPrecision(3)} %`;
    const facts = [
      ["id", token.id], ["bytes", token.hex.replace(/(..)(?=.)/g, "$1 ")], ["place", count(token.at)],
      ["from", KINDS[token.kind]], ["turn", `${token.index + 1}, ${plain(token.turn.turn_id)}`],
      ["log-prob.", token.logprob === null ? null : nats(token.logprob)], ["probability", share],
      ["recomputed", nats(token.recomputed)], ["difference", token.difference === null ? null : token.difference.toExponential(2)],
      ["weights", token.version === null ? null : plain(token.version)],
      ["tool call", token.call ? `${plain(token.call.name ?? "?")}, ${token.call.status}` : null],
    ];
    this.token.replaceChildren(title, h("div", { class: "token-text" }, token.text),
      h("dl", {}, facts.filter(([, value]) => value !== null && value !== "").map(([name, value]) => [h("dt", {}, name), h("dd", { class: "mono" }, String(value))])),
      token.drift ? this.splits(token.drift) : "");
  }

  splits(drift) {
    const facts = [["recorded", split(drift.recorded)], ["encoded again", split(drift.texts)], ["as ids", `${drift.ids.join(" ")}${drift.cut ? ` … ${plural(drift.num_ids, "id")} for ${count(drift.end - drift.start)}` : ""}`]];
    return h("dl", { class: "splits" }, facts.map(([name, value]) => [h("dt", {}, name), h("dd", { class: "mono" }, value)]));
  }

  colours(grid) {
    const mode = MODES[grid.mode];
    this.legend.replaceChildren(h("h2", {}, `Colours: ${mode.title}`), h("ul", { class: "legend" }, mode.legend(grid).map(([kind, example, text]) => h("li", {}, h("span", { class: `t ${kind}`, "aria-hidden": "true" }, example), plain(text)))));
  }

  drifts(drifts) {
    this.list.replaceChildren(h("h2", {}, `${count(drifts.length)} ${drifts.length === 1 ? "place" : "places"} of drift`),
      h("ul", { class: "drift-list" }, drifts.slice(0, 200).map((one) => h("li", {}, h("button", { type: "button", onclick: () => this.go(one.start) }, split(one.recorded), " → ", split(one.texts))))));
  }

  say(...nodes) {
    this.list.replaceChildren(...nodes);
  }
}

function split(texts) {
  return h("span", { class: "split mono" }, texts.map((text) => h("b", {}, text)));
}
