"""``quietstar inspect``: the thoughts before every token of a text, as a page, JSON or colors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from quietstar.cli import options
from quietstar.cli.options import Parser
from quietstar.data.tokenizer import check_unicode, load_tokenizer
from quietstar.errors import UserError, visible
from quietstar.evaluation.inspection import Reading, inspect_text, num_windows
from quietstar.reports.pages import render_thoughts

LEVELS = (0.02, 0.1, 0.5, 1.5)
"""Gains in nats at which the color grows darker."""
GAINS = ("", "color(153)", "color(75)", "color(33)", "color(27)")
LOSSES = ("", "color(223)", "color(215)", "color(208)", "color(202)")
ROWS = 8
"""Tokens in each table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the text with one model, or two, and show the thoughts.

    Raises:
        UserError: An option, the text, a file or a model is wrong.
    """
    args = _parser().read(arguments)
    text = _text(args)
    out: Path | None = args.out
    if out is not None and out.exists() and not args.force:
        raise UserError(f"--out ({out}): exists; give another name, or --force to replace it")
    if not args.temperature and args.num_thoughts > 1:
        raise UserError(
            f"--num-thoughts ({args.num_thoughts}): greedy thoughts are all identical; set "
            "--temperature 1"
        )
    names = [args.model] if args.compare is None else [args.model, args.compare]
    tokenizers = [load_tokenizer(name, trust_remote_code=False) for name in names]
    ids: list[Any] = [tokenizer(text)["input_ids"] for tokenizer in tokenizers]
    if len(ids[0]) < 2:
        raise UserError("--text: is a single token; give a text of at least two")
    if ids[-1] != ids[0]:
        raise UserError(
            f"--compare ({names[1]}): splits the text into other tokens than {names[0]}; compare "
            "models of one tokenizer"
        )
    documents = [
        _inspect(name, tokenizer, text, len(ids[0]), args)
        for name, tokenizer in zip(names, tokenizers, strict=True)
    ]
    console = Console(highlight=False)
    if out is None:
        for document in documents:
            console.print(document_view(document))
        return 0
    if out.suffix == ".html":
        options.write_text(out, render_thoughts(documents))
    else:
        content = documents[0] if len(documents) == 1 else documents
        options.write_text(out, json.dumps(content, indent=1) + "\n")
    console.print(Text(visible(f"{len(documents[0]['tokens'])} tokens: {out}")), soft_wrap=True)
    return 0


def _text(args: argparse.Namespace) -> str:
    if (args.text is None) == (args.text_file is None):
        raise UserError("--text: give either --text TEXT or --text-file FILE")
    if args.text is not None:
        text = check_unicode(args.text, "--text")
    else:
        text = options.read_text("--text-file", args.text_file)
    if not text.strip():
        option = "--text" if args.text is not None else f"--text-file ({args.text_file})"
        raise UserError(f"{option}: is empty; give a text of at least two tokens")
    return text


def _inspect(
    name: str, tokenizer: PreTrainedTokenizerBase, text: str, count: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Return what a model thinks of a text of ``count`` tokens."""
    model = options.load_model(args, True, "quietstar inspect needs a trained one.", name)
    most = model.max_text_length
    context = args.context or most
    if most is not None and context is not None and context > most:
        raise UserError(f"--context ({context}): must be at most {most}, what the model takes")
    if context is not None and count > context:
        Console(stderr=True).print(
            f"the text has {count} tokens: read in windows of {context}, in which every position "
            f"sees at least {context - min(128, context // 2)} tokens before it",
            soft_wrap=True,
        )
    reading = Reading(args.num_thoughts, args.temperature or None, args.seed, context)
    columns = (TextColumn("{task.description}", markup=False), BarColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(visible(name), total=num_windows(count, context))
        return inspect_text(model, tokenizer, text, name, reading, lambda: progress.advance(bar))


def document_view(document: dict[str, Any]) -> RenderableType:
    """Return summary, the colored text, and the tokens with the largest gains and losses."""
    scored = [record for record in document["tokens"] if "gain" in record]
    ordered = sorted(scored, key=lambda record: record["gain"])
    return Group(
        Text(visible(document["model"]), style="bold"),
        _summary_table(document["summary"]),
        _colored_text(document["tokens"]),
        Text(),
        _token_table("largest gains", ordered[: -ROWS - 1 : -1]),
        _token_table("largest losses", ordered[:ROWS]),
    )


def _summary_table(summary: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("tokens", "count", "gain", "gain of content"):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    for name in ("all", "hard", "easy"):
        if summary[name] is not None:
            row = summary[name]
            content = row["gain_of_content"]
            shown = "not available" if content is None else f"{content:+.4f}"
            table.add_row(name, str(row["tokens"]), f"{row['gain']:+.4f}", shown)
    table.caption = (
        f"mixing weight {summary['mixing_weight']:.3f}, surprise of thought tokens "
        f"{summary['entropy']:.2f} nats, distinct tokens {summary['distinct_token_ratio']:.0%}"
    )
    return table


def _colored_text(tokens: Sequence[dict[str, Any]]) -> Text:
    """Return the text: blue where thoughts gain, orange where they lose."""
    text = Text()
    for token in tokens:
        gain = token.get("gain", 0.0)
        level = sum(abs(gain) >= edge for edge in LEVELS)
        style = (GAINS if gain > 0 else LOSSES)[level]
        text.append(visible(token["text"]), style=f"black on {style}" if style else "")
    return text


def _token_table(title: str, records: Sequence[dict[str, Any]]) -> Table:
    """Return tokens with their first thought."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("position", "token", "gain", "p base", "p mixed", "weight"):
        table.add_column(heading, justify="left" if heading == "token" else "right", no_wrap=True)
    table.add_column("thought")
    for record in records:
        thought = record["thoughts"][0]
        token, words = (visible(r["text"]).replace("\n", "⏎") for r in (record, thought))
        base, mixed = exp(record["base_logprob"]), exp(thought["mixed_logprob"])
        table.add_row(
            str(record["position"]), Text(token), f"{record['gain']:+.3f}", f"{base:.3f}",
            f"{mixed:.3f}", f"{thought['mixing_weight']:.2f}", Text(words, style="dim"),
        )  # fmt: skip
    return table


def _parser() -> Parser:
    parser = Parser(
        "quietstar inspect",
        "Shows what a model thinks before every token of a text, and what it gains;\n"
        "without --out in the terminal.",
    )
    options.add_model(parser)
    add = parser.add_argument
    add("--text", metavar="TEXT", help="text to read")
    add("--text-file", metavar="FILE", help="file with the text, UTF-8")
    add("--out", type=options.output_file(".html", ".json"), metavar="FILE",
        help="page (.html) or its figures (.json)")  # fmt: skip
    add("--force", action="store_true", help="replace a file that exists")
    add("--compare", type=options.existing, metavar="DIR", help="a second model, side by side")
    add("--num-thoughts", type=options.THOUGHTS, default=1, metavar="K",
        help="thoughts before every token")  # fmt: skip
    add("--temperature", type=options.number(), metavar="T",
        help="temperature of thoughts; without it their most likely tokens")  # fmt: skip
    add("--seed", type=options.SEED, default=0, help="seed of sampled thoughts")
    add("--context", type=options.whole(2), metavar="N",
        help="tokens that are read at once; default: what the model takes")  # fmt: skip
    return parser
