"""What all pages share: each is one file that opens offline and runs only its own scripts."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from quietstar.errors import UserError
from quietstar.reports import formats


def asset(name: str) -> str:
    """Read a style sheet or script of the package."""
    path = resources.files("quietstar.reports") / "templates" / name
    return path.read_text(encoding="utf-8")


def plotly_script() -> str:
    """Return the source of plotly.js.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(
            f"a page with charts needs plotly ({error}); install it: pip install plotly"
        ) from error
    return get_plotlyjs()


def render(template: str, scripts: Sequence[str], **context: Any) -> str:
    """Render a page in which every text is escaped, in HTML and in JSON.

    Args:
        template: File name of the template, which extends ``base.html.j2``.
        scripts: Sources of the only scripts that the content security policy admits.
        context: Names in the template.
    """
    environment = Environment(
        loader=PackageLoader("quietstar.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters |= {name: show for name, show in vars(formats).items() if callable(show)}
    # A browser takes the hash of a script after it has made all line ends \n.
    sources = [script.replace("\r\n", "\n").replace("\r", "\n") for script in scripts]
    digests = [hashlib.sha256(source.encode("utf-8")).digest() for source in sources]
    return environment.get_template(template).render(
        style=asset("style.css"),
        scripts=sources,
        script_hashes=["sha256-" + base64.b64encode(digest).decode("ascii") for digest in digests],
        **context,
    )


def write_charts(path: Path, template: str, figures: Mapping[str, Any], **context: Any) -> Path:
    """Write a page with charts whole or not at all, making its folder if necessary.

    Returns:
        Path of the page.

    Raises:
        UserError: plotly is not installed.
    """
    scripts = [plotly_script(), asset("charts.js")] if figures else []
    page = render(template, scripts, figures=figures, **context)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    # A model's text may hold half of a surrogate pair, which UTF-8 cannot encode.
    new.write_bytes(page.encode("utf-8", "replace"))
    os.replace(new, path)
    return path


def render_thoughts(documents: Sequence[Mapping[str, Any]]) -> str:
    """Render the page of thoughts: a text colored by what the thought before each token gains.

    Args:
        documents: Results of `quietstar.evaluation.inspection.inspect_text`, of one model or of
            two. They stand in the page as data, which its script turns into text nodes only.
    """
    title = " and ".join(document["model"] for document in documents)
    return render("thoughts.html.j2", [asset("thoughts.js")], documents=documents, title=title)
