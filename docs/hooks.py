"""Hooks of mkdocs: README and its neighbors are pages of the site, too."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}


def on_files(files, config):
    """Adds the pages that lie beside ``docs``."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        text = text.replace('"docs/pictures/', '"../pictures/')
        for other, page in PAGES.items():
            text = text.replace(f"]({other}", f"]({page}")
        files.append(File.generated(config, name, content=_without_files(text)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leads links out of ``docs`` to the pages above."""
    for source, name in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    return markdown


LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)(?![^)]*\.(?:md|png|svg)(?:#[^)]*)?\))[^)]+\)")


def _without_files(text):
    """Makes plain text of links to files that are no pages."""
    return LINK.sub(r"\1", text)
