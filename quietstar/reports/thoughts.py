"""The page: one file that opens without a network, with texts and thoughts as data in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from quietstar.reports.page import environment, hash_source, normal, packaged


def render_page(documents: Sequence[dict[str, Any]]) -> str:
    """HTML of one inspected text, or of the same text as two models read it.

    Args:
        documents: From `quietstar.evaluation.inspection.inspect_text`.
    """
    script = normal(packaged("thoughts.js"))
    template = environment().get_template("thoughts.html.j2")
    return template.render(
        documents=documents,
        style=Markup(packaged("thoughts.css")),
        script=Markup(script),
        script_hash=hash_source(script),
    )
