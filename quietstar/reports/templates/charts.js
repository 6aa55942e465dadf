"use strict";

// Figures name their colors by the variables of the style sheet; plotly needs values, and other
// ones when the reader's device goes from light to dark.
const root = document.documentElement;
const figures = JSON.parse(document.getElementById("figures").textContent);
const canZoom = matchMedia("(hover: hover) and (pointer: fine)").matches;
const options = { displayModeBar: false, displaylogo: false, responsive: true, doubleClick: "reset" };

function withColors(value) {
  if (Array.isArray(value)) return value.map(withColors);
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, withColors(item)]));
  }
  const name = typeof value === "string" && value.match(/^var\((--[a-z-]+)\)$/);
  return name ? getComputedStyle(root).getPropertyValue(name[1]).trim() : value;
}

function draw() {
  for (const [name, figure] of Object.entries(figures)) {
    const { data, layout } = withColors(figure);
    layout.dragmode = canZoom ? "zoom" : false; // a finger scrolls the page
    Plotly.react("plot-" + name, data, layout, options);
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// A link to a folded section opens it.
function unfold() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}

unfold();
addEventListener("hashchange", unfold);
