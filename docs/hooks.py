"""Hooks of mkdocs: README and its neighbors are pages, and reference pages come from the code."""

import io
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from unittest.mock import patch

from mkdocs.structure.files import File

import quietstar
from quietstar.cli.main import main
from quietstar.config import SECTIONS, fields, loss_config
from quietstar.registry import choices
from quietstar.training.guards import GUARDS

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "tests/architectures.py": "reference/parity.md",
}
"""Files outside ``docs`` that README and the docs link to, and their pages."""
MODEL = (
    "from_base configure forward draw score score_plain choose_positions decode_thoughts generate"
)
PYTHON = {
    "quietstar.trainer": "TrainResult EvalResult",
    "quietstar.training.run": "run_training",
    "quietstar.model.saving": "from_pretrained save_pretrained push_to_hub",
    "quietstar.model.outputs": "QuietStarOutput ThoughtMetrics PlainScores",
    "quietstar.model.scoring": "score_reference teach next_logits",
    "quietstar.sampling.thoughts": "ThoughtBatch",
    "quietstar.losses.scores": "Scores",
    "quietstar.rewards.of_texts": "",
    "quietstar.losses.weights": "ThoughtScores ThoughtWeights",
    "quietstar.objectives": "Objective",
    "quietstar.generation.gates": "Gate",
    "quietstar.generation.generate": "ThinkingOutput ThinkingStreamer",
    "quietstar.data": "load_tokenizer",
}
"""What the public names take and return."""


def on_files(files, config):
    """Add the pages that are made from files outside ``docs`` and from the code."""
    pages = {page: _text(source) for source, page in PAGES.items() if source.endswith(".md")}
    for page, make in GENERATED.items():
        pages[page] = make()
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead links out of ``docs`` to the pages of these files."""
    for source, name in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    return markdown


def config_keys():
    """Return a table for each section of the config."""
    text = ["# Config keys", "Set them in a YAML file, or on the command line: `--KEY VALUE`."]
    for section in SECTIONS:
        text += [f"## {section}", "| key | | type | default |\n|---|---|---|---|"]
        for key, schema in fields().items():
            if key.startswith(f"{section}."):
                cells = _described(schema), _type(schema), _value(schema.get("default"))
                text[-1] += f"\n| `{key}` | {' | '.join(cells)} |"
        if section == "loss":
            text += ["### By objective", _objectives()]
    return "\n\n".join(text)


def _objectives():
    own = {name: loss_config(objective=name).model_dump() for name in choices("loss.objective")}
    shown = {k.partition(".")[2]: f.get("default") for k, f in fields().items() if k[:5] == "loss."}
    text = "| `objective` | keys it does not have | other defaults |\n|---|---|---|"
    for name, values in own.items():
        missing = ", ".join(f"`{key}`" for key in shown if key not in values)
        other = (
            f"`{key}: {value}`"
            for key, value in values.items()
            if key != "objective" and value != shown[key]
        )
        text += f"\n| `{name}` | {missing} | {', '.join(other)} |"
    return text


def _type(schema):
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    names = {"boolean": "`true`, `false`", "object": "mapping", "null": "`null`", "string": "text"}
    bounds = [
        f" {sign} {schema[bound]:g}"
        for sign, bound in (("≥", "minimum"), (">", "exclusiveMinimum"))
        if bound in schema
    ]
    return names.get(schema.get("type"), schema.get("type", "any")) + "".join(bounds)


def _value(value):
    words = {None: "null", True: "true", False: "false"}
    shown = words[value] if value is None or isinstance(value, bool) else str(value)
    return f"`{shown}`".replace("\n", "\\n").replace("|", "\\|")


def _described(schema):
    text = " ".join(schema.get("description", "").split()).replace("|", "\\|")
    text = re.sub(r"docs/([\w/-]+)\.md", r"[\1](../\1.md)", text)
    return re.sub(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_]+\b", r"`\g<0>`", text)


def commands():
    """Return what each command prints with ``--help``."""
    overview = _help()
    text = ["# Commands", f"```text\n{overview}```"]
    for name in re.findall(r"^ +([a-z][a-z-]*) ", overview.partition("\n\n")[2], re.M):
        text += [f"## quietstar {name}", f"```text\n{_help(name)}```"]
    return "\n\n".join(text)


def _help(*command):
    output = io.StringIO()
    with redirect_stdout(output), patch.dict(os.environ, COLUMNS="78"), suppress(SystemExit):
        main([*command, "--help"])
    assert output.getvalue(), command
    return output.getvalue()


def python():
    """Return the public names, and what they take and return, for mkdocstrings to document."""
    text = ["# Python API"]
    for name in quietstar.__all__:
        item = getattr(quietstar, name)
        if isinstance(item, type):
            members = MODEL.split() if name == "QuietStarForCausalLM" else []
            assert all(hasattr(item, member) for member in members), members
            text.append(_directive(f"quietstar.{name}", members))
    text.append("## Inputs, results, and parts")
    for module, names in PYTHON.items():
        text += [_directive(f"{module}.{name}") for name in names.split()] or [_directive(module)]
    return "\n\n".join(text)


def _directive(name, members=()):
    options = f"\n    options:\n      members: [{', '.join(members)}]" if members else ""
    return f"::: {name}{options}"


def guards():
    """Return a table of the guards of training."""
    text = "# Guards\n\n| guard | watches | fires | remedy | ends a run |\n|---|---|---|---|---|"
    for guard in GUARDS:
        remedy = "; ".join(
            f"{verb} {', '.join(f'`{key}`' for key in keys)}"
            for verb, keys in guard.remedies.items()
        )
        ends = "yes" if guard.is_collapse else "no"
        text += f"\n| `{guard.name}` | {guard.title} | {guard.threshold} | {remedy} | {ends} |"
    return text


@cache
def parity():
    """Return the parity table, measured now."""
    sys.path.insert(0, str(ROOT / "tests"))
    from parity_table import page

    return page()


GENERATED = {
    "reference/config.md": config_keys,
    "reference/commands.md": commands,
    "reference/python.md": python,
    "reference/guards.md": guards,
    "reference/parity.md": parity,
}


LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)(?![^)]*\.(?:md|png|svg)(?:#[^)]*)?\))[^)]+\)")


def _text(source):
    """Return the file with its links led to pages; those to files that are no pages are text."""
    text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
    text = text.replace('"docs/pictures/', '"../pictures/')
    for other, page in PAGES.items():
        text = text.replace(f"]({other}", f"]({page}")
    return LINK.sub(r"\1", text)
