"""``quietstar generate --inspect``: what a model thinks before every token of a given text."""

import argparse
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from quietstar.cli import options
from quietstar.cli.options import Parser
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import UserError, visible
from quietstar.evaluation import controls
from quietstar.evaluation.inspection import Reading, inspect_text, num_windows
from quietstar.reports.pages import render_thoughts
from quietstar.system.files import write_json, write_whole
from quietstar.system.processes import Processes, join_launch
from quietstar.system.progress import progress

LEVELS = (0.02, 0.1, 0.5, 1.5)
"""Gains in nats at which the color grows darker."""
GAINS = ("", "color(153)", "color(75)", "color(33)", "color(27)")
LOSSES = ("", "color(223)", "color(215)", "color(208)", "color(202)")
MAX_THOUGHTS = 50_000
"""A page of 4,000 tokens has 5 MB."""
ROWS = 8
"""Tokens in each table."""
LEAST = 0.0005
"""Gains in nats that three decimals show."""


def main(parser: Parser, args: argparse.Namespace) -> int:
    """Read the text with one model, or two; a wrong option, file or model raises `UserError`."""
    parser.warn_idle(args, {
        "--generic": None if args.controls else "without --controls",
        "--seed": None if args.thought_temperature else "where thoughts are the most likely ones",
        "--force": None if args.out else "without --out",
    })  # fmt: skip
    remedy = "give a text of at least two tokens"
    text = options.read_text(args, "--inspect", "--inspect-file", remedy)
    out: Path | None = args.out
    temperature = args.thought_temperature
    options.check_greedy(args.num_thoughts, temperature)
    names = [args.model] if args.compare is None else [args.model, args.compare]
    tokenizers = [load_tokenizer(name, trust_remote_code=args.trust_remote_code) for name in names]
    ids: list[Any] = [tokenizer(text)["input_ids"] for tokenizer in tokenizers]
    if len(ids[0]) < 2:
        raise UserError("--inspect: is a single token; give a text of at least two")
    if len(ids[0]) * args.num_thoughts > MAX_THOUGHTS:
        raise UserError(
            f"--num-thoughts ({args.num_thoughts}): {len(ids[0])} tokens would have more than "
            f"{MAX_THOUGHTS:,} thoughts, which no browser shows; give a shorter text, or fewer"
        )
    if ids[-1] != ids[0]:
        raise UserError(
            f"--compare ({names[1]}): splits the text into other tokens than {names[0]}; compare "
            "models of one tokenizer"
        )
    processes = join_launch(args.device)
    documents = [
        _inspect(name, tokenizer, text, len(ids[0]), args, processes)
        for name, tokenizer in zip(names, tokenizers, strict=True)
    ]
    if not processes.is_main:
        return 0
    if out is None:
        for document in documents:
            Console(highlight=False).print(_document_view(document))
        return 0
    if out.suffix == ".html":
        write_whole(out, render_thoughts(documents))
    else:
        write_json(out, documents[0] if len(documents) == 1 else documents, indent=1)
    options.say(f"{len(documents[0]['tokens'])} tokens: {out}")
    return 0


def _inspect(
    name: str, tokenizer: PreTrainedTokenizerBase, text: str, count: int, args: argparse.Namespace,
    processes: Processes,
) -> dict[str, Any]:  # fmt: skip
    """Return what a model thinks of a text of ``count`` tokens."""
    model = options.load_model(args, True, "Give the folder of a trained one.", name)
    most = model.max_text_length
    context = args.context or most
    if most is not None and context is not None and context > most:
        raise UserError(f"--context ({context}): must be at most {most}, what the model takes")
    if context is not None and count > context and processes.is_main:
        Console(stderr=True).print(
            f"the text has {count} tokens: read in windows of {context}, in which every position "
            f"sees at least {context - min(128, context // 2)} tokens before it",
            soft_wrap=True,
        )
    if args.controls and model.thoughts.length < 2:
        raise UserError("--controls: thoughts of one token cannot be shuffled; leave it out")
    temperature = args.thought_temperature or None
    reading = Reading(
        args.num_thoughts, temperature, args.seed, context, args.controls, args.generic
    )
    shown = processes.is_main
    with progress(name, num_windows(count, context), shown=shown) as advance:
        return inspect_text(model, tokenizer, text, name, reading, advance, processes)


def _document_view(document: dict[str, Any]) -> RenderableType:
    """Return summary, the colored text, and the tokens with the largest gains and losses."""
    summary = document["summary"]
    made = [control for control in document["controls"] if control in controls.MADE]
    headings = (f"over {document['controls'][control]}" for control in made)
    table = options.table(
        ("tokens", "count", "gain", "gain of content", *headings), left=("tokens",)
    )
    for name in ("all", "hard", "easy"):
        if row := summary[name]:
            content = row["gain_of_content"]
            shown = "not available" if content is None else f"{content:+.4f}"
            others = (f"{row[controls.GAINS[control]]:+.4f}" for control in made)
            table.add_row(name, str(row["tokens"]), f"{row['gain']:+.4f}", shown, *others)
    about = (
        f"mixing weight {summary['mixing_weight']:.3f}; thought tokens: {summary['entropy']:.2f} "
        f"nats of surprisal, {summary['distinct_token_ratio']:.0%} distinct"
    )
    text = Text()
    for token in document["tokens"]:  # blue where thoughts gain, orange where they lose
        gain = token.get("gain", 0.0)
        style = (GAINS if gain > 0 else LOSSES)[sum(abs(gain) >= edge for edge in LEVELS)]
        text.append(visible(token["text"]), style=f"black on {style}" if style else "")
    scored = [record for record in document["tokens"] if "gain" in record]
    ordered = sorted(scored, key=lambda record: record["gain"])
    gained = [record for record in ordered[: -ROWS - 1 : -1] if record["gain"] >= LEAST]
    lost = [record for record in ordered[:ROWS] if record["gain"] <= -LEAST]
    return Group(
        Text(visible(document["model"]), style="bold"), table, Text(about, style="dim"), Text(),
        text, Text(),
        *([_token_table("largest gains", gained)] if gained else []),
        *([_token_table("largest losses", lost)] if lost else []),
        _next_table(document["next"]),
    )  # fmt: skip


def _token_table(title: str, records: Sequence[dict[str, Any]]) -> Table:
    """Return tokens with their first thought."""
    headings = ("position", "token", "gain", "p base", "p mixed", "weight", "thought")
    table = options.table(headings, left=("token", "thought"), title=title)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for record in records:
        thought = record["thoughts"][0]
        token, words = (_in_line(r["text"]) for r in (record, thought))
        base, mixed = exp(record["base_logprob"]), exp(thought["mixed_logprob"])
        table.add_row(
            str(record["position"]), Text(token), f"{record['gain']:+.3f}", f"{base:.3f}",
            f"{mixed:.3f}", f"{thought['mixing_weight']:.2f}", Text(words, style="dim"),
        )  # fmt: skip
    return table


def _next_table(record: dict[str, Any]) -> RenderableType:
    """Return the thoughts after the last token, with what they predict."""
    headings = ("most likely next", "p mixed", "weight", "thought")
    base = record["base_top"][0]
    title = f"after the last token (base: {_in_line(base['text'])}, p {base['probability']:.3f})"
    table = options.table(headings, left=("most likely next", "thought"))
    for thought in record["thoughts"]:
        top = thought["mixed_top"][0]
        table.add_row(
            Text(_in_line(top["text"])), f"{top['probability']:.3f}",
            f"{thought['mixing_weight']:.2f}", Text(_in_line(thought["text"]), style="dim"),
        )  # fmt: skip
    return Group(Text(title, style="italic"), table)  # a table breaks a title at its own width


def _in_line(text: str) -> str:
    return visible(text).replace("\n", "⏎")
