"""The page of thoughts: a text colored by what the thought before each token gains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quietstar.reports.pages import asset, render


def render_page(documents: Sequence[dict[str, Any]]) -> str:
    """Render one inspected text, or the same text as two models read it.

    Args:
        documents: Results of `quietstar.evaluation.inspection.inspect_text`. They stand in the page
            as data, which its script turns into text nodes only.
    """
    title = " and ".join(document["model"] for document in documents)
    return render("thoughts.html.j2", [asset("thoughts.js")], documents=documents, title=title)
