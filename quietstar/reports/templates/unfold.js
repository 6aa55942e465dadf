"use strict";

// A link to a folded section opens it.
function unfold() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}

unfold();
addEventListener("hashchange", unfold);
