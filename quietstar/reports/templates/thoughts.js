"use strict";

// Texts and thoughts are data: they only ever become text nodes.
const documents = JSON.parse(document.getElementById("documents").textContent);
const byId = (id) => document.getElementById(id);
const LEVELS = [0.02, 0.1, 0.5, 1.5];
const small = matchMedia("(max-width: 60rem)"); // there the detail lies over the text
let chosen = -1;
let pinned = false;

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

// --- Summary -------------------------------------------------------------------------------------

function tile(label, value, color, ...notes) {
  return make("li", { class: "tile " + color }, make("p", { class: "label" }, label), make("p", { class: "value" }, value), make("p", { class: "note" }, ...notes));
}

// Hard tokens are those whose NLL without thoughts is above the median.
function summary(doc) {
  const s = doc.summary;
  const halves = (figure) => ["hard", "easy"].filter((half) => s[half] !== null)
    .map((half) => `${half} tokens ${nats(s[half][figure])}`).join(", ");
  const tiles = make("ul", { class: "tiles more" },
    tile("Gain", nats(s.all.gain), "mixed", halves("gain")),
    tile("Gain of content", nats(s.all.gain_of_content), "content", halves("gain_of_content")),
    tile("Mixing weight", s.mixing_weight.toFixed(3), "mixed", "mean weight of the thought"),
    tile("Surprisal", s.entropy.toFixed(2), "thought", "mean over thought tokens"),
    tile("Distinct tokens", percent(s.distinct_token_ratio), "thought", "of a thought's length"));
  const over = Object.entries(doc.controls).filter(([name]) => name !== "swapped")
    .map(([name, text]) => `${text} ${nats(s.all["gain_over_" + name])}`).join(", ");
  return make("div", {}, ...(documents.length > 1 ? [make("p", { class: "model" }, visible(doc.model))] : []), tiles,
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
  const count = documents[0].tokens.length;
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
  detail();
  if (small.matches) { // the sheet must not cover the token that it is about
    const below = byId(`t0-${index}`).getBoundingClientRect().bottom + 8 - byId("detail").getBoundingClientRect().top;
    if (below > 0) scrollBy(0, below);
  }
}

function hide() {
  pinned = false;
  byId("detail").replaceChildren();
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
  inner.style.background = `var(--${color})`;
  inner.style.width = (100 * p).toFixed(1) + "%";
  return make("span", { class: "chart-bar", "aria-hidden": "true" }, inner);
}

function chance(label, logprob, color = label) {
  const p = Math.exp(logprob);
  return make("tr", {}, make("th", { scope: "row" }, label),
    make("td", { class: "number" }, percent(p)), make("td", {}, bar(p, color)));
}

function topTable(token, thought) {
  const columns = [["base", token.base_top], ["thought", thought.thought_top], ["mixed", thought.mixed_top]];
  const table = make("table", {}, make("thead", {}, make("tr", {},
    ...columns.map(([name]) => make("th", { scope: "col" }, name)))));
  const body = make("tbody");
  token.base_top.forEach((_, row) => {
    body.append(make("tr", {}, ...columns.map(([, tops]) =>
      make("td", {}, shown(tops[row].text), " ", make("span", { class: "p" }, percent(tops[row].probability))))));
  });
  table.append(body);
  return table;
}

function thoughtView(doc, token, thought, number, count) {
  const list = make("ol", { class: "chips" }, ...thought.texts.map((text, i) =>
    make("li", {}, shown(text), percent(thought.probabilities[i]))));
  const rows = make("table", { class: "chances" }, make("tbody", {},
    chance("base", token.base_logprob), chance("thought", thought.thought_logprob),
    chance("mixed", thought.mixed_logprob)));
  const others = Object.entries(thought.controls).map(([name, logprob]) =>
    chance(doc.controls[name], logprob, ["swapped", "pause"].includes(name) ? name : "other"));
  return make("div", { class: "one" },
    make("h3", {}, count > 1 ? `Thought ${number + 1} of ${count}` : "Thought"), list,
    make("p", {}, `mixing weight ${thought.mixing_weight.toFixed(3)}, gain ${nats(thought.gain)} nats`),
    make("h3", {}, "Probability of the text's token"), rows,
    ...(others.length ? [make("h3", {}, "The same, mixed with other thoughts"),
      make("table", { class: "chances" }, make("tbody", {}, ...others))] : []),
    make("h3", {}, "Most likely tokens"), topTable(token, thought));
}

function tokenView(doc, index) {
  const token = doc.tokens[index];
  const box = make("div", {});
  if (documents.length > 1) box.append(make("p", { class: "model" }, visible(doc.model)));
  box.append(make("h2", {}, shown(token.text), ` token ${token.position}`));
  if (token.gain === undefined) {
    box.append(make("p", { class: "hint" }, "The first token is not predicted."));
    return box;
  }
  box.append(make("p", {}, `Gain ${nats(token.gain)} nats (content ${nats(token.gain_of_content)}); NLL without thought ${(-token.base_logprob).toFixed(3)}`));
  token.thoughts.forEach((thought, i) => box.append(thoughtView(doc, token, thought, i, token.thoughts.length)));
  return box;
}

function detail() {
  const views = documents.map((doc) => tokenView(doc, chosen));
  byId("detail").replaceChildren(make("div", { class: "columns" }, ...views));
}

// --- Below ---------------------------------------------------------------------------------------

function frequent(doc) {
  const body = make("tbody");
  for (const thought of doc.summary.frequent) {
    body.append(make("tr", {}, make("td", {}, ...thought.texts.map(shown)),
      make("td", { class: "number" }, String(thought.count)), make("td", { class: "number" }, nats(thought.gain))));
  }
  return make("div", { class: "card" }, make("h2", {}, "Most frequent thoughts"),
    ...(documents.length > 1 ? [make("p", { class: "model" }, visible(doc.model))] : []),
    make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {},
      make("th", { scope: "col" }, "thought"), make("th", { scope: "col", class: "number" }, "count"),
      make("th", { scope: "col", class: "number" }, "mean gain"))), body)));
}

// Bins differ in width, so each names its range.
function histogram(doc) {
  const bins = doc.summary.histogram;
  const most = Math.max(...bins.map((bin) => bin.count));
  const body = make("tbody");
  for (const { low, high, count } of bins) {
    const number = (x) => String(x).replace("-", "−");
    const range = low === null ? "below " + number(high) : high === null ? number(low) + " or more"
      : `${number(low)} to ${number(high)}`;
    const middle = low === null ? high * 1.01 : high === null ? low * 1.01 : (low + high) / 2;
    const fill = make("i", { class: level(middle), "aria-hidden": "true" });
    fill.style.width = (100 * count / most).toFixed(1) + "%";
    body.append(make("tr", {}, make("th", { scope: "row" }, range),
      make("td", { class: "number" }, String(count)), make("td", {}, ...(count ? [fill] : []))));
  }
  return make("div", { class: "card" }, make("h2", {}, "Distribution of token gains (nats)"),
    ...(documents.length > 1 ? [make("p", { class: "model" }, visible(doc.model))] : []),
    make("table", { class: "histogram" }, body));
}

byId("summary").append(make("div", { class: "pair" }, ...documents.map(summary)));
document.querySelector(".reading").classList.toggle("two", documents.length > 1);
byId("texts").append(...documents.map(textBox));
byId("frequent").append(make("div", { class: "pair" }, ...documents.map(frequent)));
byId("histograms").append(make("div", { class: "pair" }, ...documents.map(histogram)));
byId("mode").addEventListener("change", filter);
byId("least").addEventListener("input", filter);
filter();
const strongest = documents[0].tokens.reduce((best, token, i, all) =>
  ((token.gain ?? -Infinity) > (all[best].gain ?? -Infinity) ? i : best), 0);
if (!small.matches) choose(strongest);
