"""What all pages share: their parts, and files that open offline and run only own scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from quietstar.reports.formats import show, shown_text
from quietstar.system.files import write_whole


# --- Parts of a page, each with the macro of the template that draws it ---------------------------
class Cell(NamedTuple):
    """Content of a table's cell that is more than a text."""

    text: str
    small: Sequence[str] = ()  # lines below, less strong
    kind: str = ""  # classes: strong, mono, text (which keeps its line breaks)
    mark: tuple[bool, str] | None = None  # good or bad, and the words
    bar: float | None = None  # probability of the ground truth
    whole: str = ""  # text that unfolds

    @staticmethod
    def folded(text: str, width: int = 170) -> Cell:
        """Show the end of a text, from which the whole one unfolds."""
        text = shown_text(text)
        is_long = len(text) > width
        return Cell("…" + text[-width:] if is_long else text, kind="text", whole=text * is_long)


def right_or_wrong(is_right: bool) -> tuple[bool, str]:
    """Return the mark of an answer or a thought."""
    return is_right, "✓ correct" if is_right else "✗ wrong"


class Table(NamedTuple):
    """A table; the first column names its rows."""

    label: str  # for screen readers
    headings: Sequence[str]
    rows: Sequence[Sequence[str | Cell | Sequence[Cell]]]
    numbers: int = 99  # index of the first column of numbers
    widths: Sequence[int] = ()  # in percent: of tables of texts
    has_slider: bool = False  # which shows one row at a time
    macro = "table"


class Tile(NamedTuple):
    """A key metric."""

    label: str
    value: str
    color: str
    notes: Sequence[str] = ()

    @staticmethod
    def measured(label: str, value: str, color: str, bounds: Any, *notes: str) -> Tile:
        """Make the tile of a share with the ends of its interval, if it has one."""
        interval = [f"95% CI {show(bounds, '.1%')}"] if bounds else []
        return Tile(label, value, color, [*interval, *notes])


class Tiles(NamedTuple):
    """Key metrics side by side, under a heading."""

    title: str
    tiles: Sequence[Tile]
    macro = "tiles"


class Line(NamedTuple):
    """A paragraph; its kind is a class of the style sheet, or "between", which is a heading."""

    text: str
    kind: str = "lead"
    small: str = ""
    macro = "line"


class Cards(NamedTuple):
    """Charts side by side (`charts.Card`)."""

    cards: Sequence[Any]
    macro = "cards"


class Code(NamedTuple):
    """A text as it is."""

    text: str
    macro = "code"


class Section(NamedTuple):
    """A section of a page, with an entry in its navigation if it has a title."""

    id: str
    title: str
    parts: Sequence[Table | Tiles | Line | Cards | Code]
    summary: str | None = None  # next to the title of a section that is folded
    is_open: bool = False


def settings_section(config: Mapping[str, Any]) -> Section:
    """Return the folded section of settings."""
    words = {"True": "yes", "False": "no"}
    rows = [(key, words.get(str(value), str(value))) for key, value in config.items()]
    return Section("config", "Settings", [Table("Settings", ("Setting", "Value"), rows)], "")


# --- Pages ----------------------------------------------------------------------------------------
def asset(name: str) -> str:
    """Read a style sheet or script of the package."""
    return (resources.files("quietstar.reports") / "templates" / name).read_text(encoding="utf-8")


def render(template: str, script: str, **context: Any) -> str:
    """Render a page in which every text is escaped, in HTML and in JSON.

    Args:
        template: File name of the template, which extends ``base.html.j2``.
        script: Source of the only script that the content security policy admits.
        context: Names in the template: ``title``, ``eyebrow``, ``heading`` and the template's own.
    """
    environment = Environment(
        loader=PackageLoader("quietstar.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    # A browser takes the hash of a script after it has made all line ends \n.
    script = script.replace("\r\n", "\n").replace("\r", "\n")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    names = {"top": (), "facts": (), "mark": "", "style": asset("style.css"), "script": script}
    page = environment.get_template(template)
    return page.render(names | {"script_hash": f"sha256-{digest}", "show_number": show} | context)


def write_html(path: Path, sections: Sequence[Section], **context: Any) -> Path:
    """Write a page whole or not at all, making its folder if necessary; returns its path.

    Args:
        path: Path of the page.
        sections: What it shows; those without parts are left out.
        context: ``title``, ``eyebrow``, ``heading``; also ``top`` (lines under the heading),
            ``facts`` (pairs of label and value) and ``mark`` (of an evaluation).

    Raises:
        UserError: The page cannot be written.
    """
    sections = [section for section in sections if section.parts]
    page = render("page.html.j2", asset("page.js"), sections=sections, **context)
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
    top = []
    for document in documents:
        means, name = document["summary"]["all"], document["model"] if documents[1:] else ""
        said = f"thoughts gain {show(means['gain'], '+.3f')} nats/token"
        if (content := means["gain_of_content"]) is not None:
            said += f", swapped ones {show(means['gain'] - content, '+.3f')}"
        said += f", over {document['summary']['tokens']} tokens"
        top.append(Line(f"{name}: {said}." if name else f"T{said[1:]}.", "verdict as-is"))
    return render(
        "thoughts.html.j2", asset("thoughts.js"), documents=documents, facts=facts, top=top,
        title=f"{text if len(text) <= 60 else text[:59].rstrip() + '…'} · quietstar thoughts",
        eyebrow="Quiet-STaR thoughts", heading=f"Thoughts before each of {len(tokens)} tokens",
    )  # fmt: skip
