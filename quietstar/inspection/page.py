"""The page: one file that opens without a network, with texts and thoughts as data in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from quietstar.report.page import environment, hash_source, normal, packaged

_PACKAGE = "quietstar.inspection"


def render_page(documents: Sequence[dict[str, Any]]) -> str:
    """HTML of one inspected text, or of the same text as two models read it.

    Args:
        documents: From `quietstar.inspection.collect.inspect_text`.
    """
    script = normal(packaged("page.js", _PACKAGE))
    template = environment(_PACKAGE).get_template("page.html.j2")
    return template.render(
        documents=documents,
        style=Markup(packaged("page.css", _PACKAGE)),
        script=Markup(script),
        script_hash=hash_source(script),
    )
