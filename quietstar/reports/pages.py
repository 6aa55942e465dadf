"""What all pages share: numbers as text, and files that open offline and run only own scripts."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import NormalDist
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from quietstar.evaluation.controls import FEW_ITEMS
from quietstar.system.files import write_whole

MISSING = "–"


def plain(value: float | None, digits: int = 4) -> str:
    """Format a number with a fixed number of decimals."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """Format a number with its sign."""
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}"
    if value and not float(text):  # what is no chance must not read as zero
        text = f"{value:+.2g}"
    return text.replace("-", "−")


def signed_range(bounds: Sequence[float] | None) -> str:
    """Format an interval of signed numbers as ``−0.0120 to +0.0340``."""
    return MISSING if bounds is None else " to ".join(map(signed, bounds))


def percent(share: float | None) -> str:
    """Format ``0.924`` as ``92.4%``."""
    return MISSING if share is None else f"{plain(100 * share, 1)}%"


def share_of(share: float | None, n: float | None) -> str:
    """Format a share of ``n`` items as a percentage, or ``3 of 8`` where they are few."""
    if share is None or n is None or n >= FEW_ITEMS:
        return percent(share)
    return f"{plain(share * n, 0 if abs(share * n - round(share * n)) < 0.01 else 1)} of {n:.0f}"


def percent_range(bounds: Sequence[float] | None) -> str:
    """Format an interval of shares as ``88.0–96.0%``."""
    return MISSING if bounds is None else f"{plain(100 * bounds[0], 1)}–{percent(bounds[1])}"


def points(difference: float | None) -> str:
    """Format a difference of shares, ``0.6``, in percentage points: ``+60.0``."""
    return MISSING if difference is None else signed(100 * difference, 1)


def points_range(bounds: Sequence[float] | None) -> str:
    """Format an interval of differences of shares as ``+50.0 to +70.0``."""
    return MISSING if bounds is None else " to ".join(map(points, bounds))


def probability(value: float | None) -> str:
    """Format a p-value; those below a thousandth are not told apart."""
    return MISSING if value is None else ("< 0.001" if value < 0.001 else f"{value:.3f}")


def wilson(share: float, n: float | None) -> tuple[float, float] | None:
    """Return the 95% score interval of a share of ``n`` (Wilson 1927); None if there is none."""
    if n is None or n < 1 or not 0 <= share <= 1:
        return None
    n = round(n)
    share = round(share * n) / n
    z = NormalDist().inv_cdf(0.975)
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def shown_text(text: str) -> str:
    """Strip the space around a text; show signs for an empty one and for nothing but space."""
    return text.strip() or ("␣" if text else MISSING)


# --- Pages ----------------------------------------------------------------------------------------
def asset(name: str) -> str:
    """Read a style sheet or script of the package."""
    return (resources.files("quietstar.reports") / "templates" / name).read_text(encoding="utf-8")


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
    for show in (plain, signed, signed_range, percent, percent_range, share_of, points,
                 points_range, probability, wilson, shown_text):  # fmt: skip
        environment.filters[show.__name__] = show
    # A browser takes the hash of a script after it has made all line ends \n.
    sources = [script.replace("\r\n", "\n").replace("\r", "\n") for script in scripts]
    digests = [base64.b64encode(hashlib.sha256(s.encode("utf-8")).digest()) for s in sources]
    hashes = [f"sha256-{digest.decode('ascii')}" for digest in digests]
    return environment.get_template(template).render(
        style=asset("style.css"), scripts=sources, script_hashes=hashes, **context
    )


def write_html(path: Path, template: str, **context: Any) -> Path:
    """Write a page whole or not at all, making its folder if necessary; returns its path.

    Raises:
        UserError: The page cannot be written.
    """
    page = render(template, [asset("unfold.js")], **context)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def render_thoughts(documents: Sequence[Mapping[str, Any]]) -> str:
    """Render the page of thoughts: a text colored by what the thought before each token gains.

    Args:
        documents: Results of `quietstar.evaluation.inspection.inspect_text`, of one model or of
            two. They stand in the page as data, which its script turns into text nodes only.
    """
    tokens, settings = documents[0]["tokens"], documents[0]["settings"]
    text = " ".join("".join(token["text"] for token in tokens).split())
    context, many, length, temperature = (
        settings[key] for key in ("context", "num_thoughts", "thought_length", "temperature")
    )
    facts = [
        ("Models" if documents[1:] else "Model", ", ".join(d["model"] for d in documents)),
        ("Thoughts", f"{many} at every position" if many > 1 else "one at every position"),
        ("Length", f"up to {length} tokens"),
        ("Temperature", "greedy" if temperature is None else f"{temperature:g}"),
        *([] if temperature is None else [("Seed", str(settings["seed"]))]),
        *([("Windows of", f"{context} tokens")] if context and context < len(tokens) else []),
    ]
    return render(
        "thoughts.html.j2", [asset("thoughts.js")], documents=documents, facts=facts,
        text=text if len(text) <= 60 else text[:59].rstrip() + "…",
    )  # fmt: skip
