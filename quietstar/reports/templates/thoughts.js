"use strict";

// Texts and thoughts are data: they only ever become text nodes.
const documents = JSON.parse(document.getElementById("documents").textContent);
const byId = (id) => document.getElementById(id);
const LEVELS = [0.02, 0.1, 0.5, 1.5];
const small = matchMedia("(max-width: 60rem)"); // there the detail lies over the text
let chosen = -1;
let pinned = false;
const picked = documents.map(() => 0); // the thought whose details are shown
const end = documents[0].tokens.length; // the index of what comes next

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// A token of a part of a character's bytes has no text of its own.
// Control characters become their pictures; a line break keeps breaking the line.
function visible(text) {
  if (text === "") return "▯";
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (c) => {
    const code = c.codePointAt(0);
    return String.fromCodePoint(code === 0x7f ? 0x2421 : 0x2400 + code);
  }).replace(/[\u0080-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, "\u25cc").replace(/\n/g, "⏎\n");
}

const shown = (text) => make("code", { class: "token", dir: "auto" }, visible(text).replace(/ /g, "␣").replace(/\n/g, ""));
const nats = (x) => x === null ? "–" : (Number(x.toFixed(3)) < 0 ? "−" : "+") + Math.abs(x).toFixed(3);
const percent = (p) => (p < 0.001 ? (100 * p).toPrecision(2) : (100 * p).toFixed(p < 0.1 ? 2 : 1)) + "%";

function level(gain) {
  const size = LEVELS.filter((edge) => Math.abs(gain) >= edge).length;
  return size === 0 ? "z" : (gain > 0 ? "g" : "l") + size;
}

// A table of rows of cells, which are elements, texts, or null; from column `numbers` on, numbers.
function table(headings, rows, numbers, attributes = {}) {
  const cells = (row, tag) => row.map((cell, i) => make(i ? tag : "th",
    i >= numbers ? { class: "number" } : {}, ...[cell].flat()));
  return make("table", attributes,
    ...(headings ? [make("thead", {}, make("tr", {}, ...cells(headings, "th")))] : []),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells(row, "td")))));
}

// A box for each model, with its name if there are several.
const named = (doc) => documents.length > 1 ? [make("p", { class: "model" }, visible(doc.model))] : [];

// --- Summary: means over the text ----------------------------------------------------------------

function tile(label, value, color, note) {
  return make("li", { class: "tile", style: `--color: var(--${color})` }, make("p", { class: "label" }, label), make("p", { class: "value" }, value), make("p", { class: "note" }, note));
}

// Hard tokens are those whose NLL without thoughts is above the median.
function summary(doc) {
  const s = doc.summary;
  const halves = (metric) => ["hard", "easy"].filter((half) => s[half] !== null)
    .map((half) => `${half} tokens ${nats(s[half][metric])}`).join(", ");
  const tiles = make("ul", { class: "tiles" },
    tile("Gain", nats(s.all.gain), "mixed", halves("gain")),
    tile("Gain of content", nats(s.all.gain_of_content), "content", halves("gain_of_content")),
    tile("Mixing weight", s.mixing_weight.toFixed(3), "mixed", "mean weight of the thought"),
    tile("Surprisal", s.entropy.toFixed(2), "thought", "mean over thought tokens"),
    tile("Distinct tokens", percent(s.distinct_token_ratio), "thought", "of a thought's length"));
  const over = Object.entries(doc.controls).filter(([name]) => name !== "swapped")
    .map(([name, text]) => `${text} ${nats(s.all["gain_over_" + name])}`).join(", ");
  return make("div", {}, ...named(doc), tiles,
    ...(over ? [make("p", { class: "hint" }, "Gain over other thoughts, nats: " + over)] : []));
}

// --- The text ------------------------------------------------------------------------------------

function textBox(doc, which) {
  const box = make("div", { class: "reader", role: "listbox", tabindex: "0", dir: "auto",
    "aria-label": "Text as read by " + doc.model });
  doc.tokens.forEach((token, index) => {
    const span = make("span", { role: "option", id: `t${which}-${index}`, "data-i": index,
      class: token.gain === undefined ? "z" : level(token.gain), "aria-selected": "false" }, visible(token.text));
    box.append(span);
  });
  box.append(make("span", { role: "option", id: `t${which}-${end}`, "data-i": end, class: "next",
    "aria-selected": "false", "aria-label": "what comes next" }, " ▸ " + visible(doc.next.thoughts[0].mixed_top[0].text)));
  box.addEventListener("pointerover", (event) => {
    if (!pinned && event.pointerType === "mouse" && event.target.dataset.i) choose(Number(event.target.dataset.i));
  });
  box.addEventListener("click", (event) => {
    if (!event.target.dataset.i) return;
    const index = Number(event.target.dataset.i);
    if (pinned && index === chosen && small.matches) return hide(); // a second tap gives room
    pinned = true;
    choose(index);
  });
  box.addEventListener("keydown", keys);
  return box;
}

function keys(event) {
  const count = end + 1;
  const moves = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: count - 1,
    ArrowDown: nextHit(1), ArrowUp: nextHit(-1) };
  if (event.key === "Escape") return small.matches ? hide() : void (pinned = false);
  if (!(event.key in moves)) return;
  event.preventDefault();
  pinned = true;
  choose(Math.min(count - 1, Math.max(0, moves[event.key])), true);
}

function nextHit(step) {
  const doc = documents[0];
  for (let i = chosen + step; i >= 0 && i < doc.tokens.length; i += step) {
    if (isHit(doc.tokens[i])) return i;
  }
  return chosen;
}

function choose(index, scroll = false) {
  documents.forEach((doc, which) => {
    const old = byId(`t${which}-${chosen}`);
    if (old) { old.classList.remove("on"); old.setAttribute("aria-selected", "false"); }
    const span = byId(`t${which}-${index}`);
    span.classList.add("on");
    span.setAttribute("aria-selected", "true");
    span.parentElement.setAttribute("aria-activedescendant", span.id);
    if (scroll) span.scrollIntoView({ block: "nearest" });
  });
  chosen = index;
  documents.forEach((doc, which) => { picked[which] = strongestThought(doc, index); });
  if (pinned) history.replaceState(null, "", "#t" + index);
  detail();
  if (small.matches) { // the sheet must not cover the token that it is about
    const below = byId(`t0-${index}`).getBoundingClientRect().bottom + 8 - byId("detail").getBoundingClientRect().top;
    if (below > 0) scrollBy(0, below);
  }
}

function strongestThought(doc, index) {
  const thoughts = (doc.tokens[index] ?? doc.next).thoughts ?? [];
  return thoughts.reduce((best, thought, i) => (thought.gain > thoughts[best].gain ? i : best), 0);
}

function hide() {
  pinned = false;
  byId("detail").replaceChildren();
}

// --- Colors --------------------------------------------------------------------------------------

function measured(token, name) {
  if (token.gain === undefined) return null;
  if (name === "weight") return token.thoughts.reduce((sum, t) => sum + t.mixing_weight, 0) / token.thoughts.length;
  return name === "nll" ? -token.base_logprob : token[name];
}

function color() {
  const name = byId("measure").value;
  const isSigned = name === "gain" || name === "gain_of_content";
  byId("legend").hidden = !isSigned;
  byId("quintiles").hidden = isSigned;
  documents.forEach((doc, which) => {
    const values = doc.tokens.map((token) => measured(token, name));
    const sorted = values.filter((x) => x !== null).sort((a, b) => a - b);
    values.forEach((value, index) => {
      const rank = () => Math.floor(5 * sorted.filter((x) => x < value).length / sorted.length);
      const kind = value === null ? "z" : isSigned ? level(value) : rank() ? "g" + rank() : "z";
      const { classList } = byId(`t${which}-${index}`);
      for (const old of [...classList]) if (/^[glz]\d?$/.test(old)) classList.remove(old);
      classList.add(kind);
    });
  });
}

// --- Filter --------------------------------------------------------------------------------------

function isHit(token) {
  const mode = byId("mode").value;
  const least = Number(byId("least").value);
  if (token.gain === undefined) return false;
  if (mode === "all") return true;
  return (mode !== "loss" && token.gain >= least) || (mode !== "gain" && token.gain <= -least);
}

function filter() {
  const isAll = byId("mode").value === "all";
  byId("least-out").textContent = Number(byId("least").value).toFixed(2) + " nats";
  byId("least").disabled = isAll;
  const counts = documents.map((doc, which) => {
    byId(`t${which}-0`).parentElement.classList.toggle("filtered", !isAll);
    return doc.tokens.filter((token, index) => {
      const hit = isHit(token);
      byId(`t${which}-${index}`).classList.toggle("hit", hit && !isAll);
      return hit;
    }).length;
  });
  byId("matches").textContent = isAll ? "" : counts.join(" and ") + " tokens (↑ ↓ go from one to the next)";
}

// --- The chosen token ----------------------------------------------------------------------------

function bar(p, color) {
  const inner = make("i");
  inner.style.width = (100 * p).toFixed(1) + "%";
  return make("span", { class: "chart-bar", style: `--color: var(--${color})`, "aria-hidden": "true" }, inner);
}

// Without a thought, with the thought alone, with both mixed, and mixed with others': one start.
function chances(doc, token, thought) {
  const rows = [["base", token.base_logprob], ["thought", thought.thought_logprob], ["mixed", thought.mixed_logprob]]
    .map(([name, logprob]) => [name, logprob, name]);
  for (const [name, logprob] of Object.entries(thought.controls)) {
    rows.push([doc.controls[name], logprob, ["swapped", "pause"].includes(name) ? name : "other"]);
  }
  return table(null, rows.map(([label, logprob, color]) =>
    [label, percent(Math.exp(logprob)), bar(Math.exp(logprob), color)]), 9, { class: "chances" });
}

function topTable(token, thought) {
  const columns = [["base", token.base_top], ["thought", thought.thought_top], ["mixed", thought.mixed_top]];
  return table(columns.map(([name]) => name), token.base_top.map((_, row) =>
    columns.map(([, tops]) => [shown(tops[row].text), " ", make("span", { class: "p" }, percent(tops[row].probability))])), 9);
}

// All thoughts of the position, a row each; the details below are of the one that is picked.
function samples(doc, which, token) {
  const isNext = token === doc.next;
  return table(["thought", ...(isNext ? ["next"] : ["p", "gain"]), "weight"], token.thoughts.map((thought, i) => {
    const pick = make("button", { type: "button", "aria-pressed": String(i === picked[which]) }, ...thought.texts.map(shown));
    pick.addEventListener("click", () => { pinned = true; picked[which] = i; detail(); });
    const top = thought.mixed_top[0];
    const metrics = isNext ? [[shown(top.text), " ", make("span", { class: "p" }, percent(top.probability))]]
      : [percent(Math.exp(thought.mixed_logprob)), nats(thought.gain)];
    return [pick, ...metrics, thought.mixing_weight.toFixed(2)];
  }), isNext ? 2 : 1, { class: "several" });
}

function thoughtView(doc, which, token) {
  const several = token.thoughts.length > 1;
  const thought = token.thoughts[picked[which]];
  const list = make("ol", { class: "chips" }, ...thought.texts.map((text, i) =>
    make("li", {}, shown(text), percent(thought.probabilities[i]))));
  const weight = `mixing weight ${thought.mixing_weight.toFixed(3)}`;
  const heading = (text) => make("h3", {}, text);
  return make("div", { class: "one" },
    ...(several ? [heading(`${token.thoughts.length} thoughts`), samples(doc, which, token)] : []),
    heading(several ? `Thought ${picked[which] + 1}, token by token` : "Thought"), list,
    ...(token === doc.next ? [make("p", {}, weight)] : [
      make("p", {}, `${weight}, gain ${nats(thought.gain)} nats`),
      heading("Probability of the text's token"), chances(doc, token, thought)]),
    heading("Most likely tokens"), topTable(token, thought));
}

function tokenView(doc, which, index) {
  const token = doc.tokens[index] ?? doc.next;
  if (token === doc.next) {
    return make("div", {}, ...named(doc), make("h2", {}, `What comes next, token ${token.position}`),
      make("p", {}, "The text ends here, so there is no gain to measure."), thoughtView(doc, which, token));
  }
  const heading = make("h2", {}, shown(token.text), ` token ${token.position}`);
  if (token.gain === undefined) {
    return make("div", {}, ...named(doc), heading, make("p", { class: "hint" }, "The first token is not predicted."));
  }
  return make("div", {}, ...named(doc), heading, make("p", {}, `Gain ${nats(token.gain)} nats (content ${nats(token.gain_of_content)}); NLL without thoughts ${(-token.base_logprob).toFixed(3)}`),
    thoughtView(doc, which, token));
}

function detail() {
  const views = documents.map((doc, which) => tokenView(doc, which, chosen));
  byId("detail").replaceChildren(make("div", { class: "columns" }, ...views));
}

// --- Below ---------------------------------------------------------------------------------------

function frequent(doc) {
  return make("div", { class: "card" }, make("h2", {}, "Most frequent thoughts"), ...named(doc),
    make("div", { class: "scroll" }, table(["thought", "count", "mean gain"], doc.summary.frequent.map((thought) =>
      [thought.texts.map(shown), String(thought.count), nats(thought.gain)]), 1)));
}

// Bins differ in width, so each names its range.
function histogram(doc) {
  const filled = doc.summary.histogram.map((bin) => bin.count > 0);
  const bins = doc.summary.histogram.slice(filled.indexOf(true), filled.lastIndexOf(true) + 1);
  const most = Math.max(...bins.map((bin) => bin.count));
  const number = (x) => String(x).replace("-", "−");
  return make("div", { class: "card" }, make("h2", {}, "Distribution of token gains (nats)"), ...named(doc),
    table(null, bins.map(({ low, high, count }) => {
      const range = low === null ? "below " + number(high) : high === null ? number(low) + " or more"
        : `${number(low)} to ${number(high)}`;
      const fill = make("i", { class: low === null || low < 0 ? "loss" : "", "aria-hidden": "true" });
      fill.style.width = (100 * count / most).toFixed(1) + "%";
      return [range, String(count), fill];
    }), 9, { class: "histogram" }));
}

byId("summary").append(make("div", { class: "pair" }, ...documents.map(summary)));
document.querySelector(".reading").classList.toggle("two", documents.length > 1);
byId("texts").append(...documents.map(textBox));
byId("frequent").append(make("div", { class: "pair" }, ...documents.map(frequent)));
byId("histograms").append(make("div", { class: "pair" }, ...documents.map(histogram)));
byId("measure").addEventListener("change", color);
byId("mode").addEventListener("change", filter);
byId("least").addEventListener("input", filter);
filter();
const linked = /^#t(\d+)$/.exec(location.hash);
if (linked && Number(linked[1]) <= end) {
  pinned = true;
  choose(Number(linked[1]), true);
} else if (!small.matches) {
  const { tokens } = documents[0];
  const best = tokens.reduce((soFar, token, i) => ((token.gain ?? -Infinity) > (tokens[soFar].gain ?? -Infinity) ? i : soFar), 0);
  choose((tokens[best].gain ?? 0) >= LEVELS[1] ? best : end);
}
