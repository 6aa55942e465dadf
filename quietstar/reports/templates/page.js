"use strict";

// A link to a folded section opens it.
function unfold() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}

unfold();
addEventListener("hashchange", unfold);

// A slider shows one row of its table at a time; without a script all are there.
for (const player of document.querySelectorAll(".player")) {
  const rows = player.parentElement.querySelectorAll("tbody tr");
  const slider = player.querySelector("input");
  const show = () => rows.forEach((row, i) => {
    row.hidden = i !== Number(slider.value);
    if (!row.hidden) player.querySelector("output").textContent = row.firstElementChild.textContent.trim();
  });
  slider.addEventListener("input", show);
  player.hidden = false;
  show();
}
