"""``quietstar judge``: preferences between two texts, by the probabilities of a language model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from quietstar.cli import options
from quietstar.cli.options import BATCH, Parser, whole

DESCRIPTION = """Asks a language model which of two candidates is better, in both orders.

Every line of --pairs has "prompt" and "candidates" (two texts), or "prompt",
"chosen" and "rejected". Every line of --out has prompt, chosen, rejected,
"soft_label" (the probability that chosen is preferred), "margin" (its log
odds), "probabilities" (with chosen shown first, and second), "mass",
"rationales" and "is_cut".
"""
UNIT = 64
"""Pairs that are judged and written together, sorted by length, unless a batch holds more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge, write the preferences, print a summary; what is wrong raises `UserError`."""
    args = _parser().read(arguments)
    # These import torch, after the command line is known to be valid.
    from quietstar.evaluation.scoring import fingerprint
    from quietstar.judging import Judge, VerdictCache, load_template
    from quietstar.judging.labels import Label, open_labels, read_pairs, summarize_labels
    from quietstar.training.build import quiet_libraries

    template = load_template(args.template)
    pairs, digest = read_pairs(Path(args.pairs).expanduser(), args.limit)
    if args.summary is None:
        args.summary = f"{args.out.removesuffix('.jsonl')}.judge.json"
    # Whether existing ones may be gone on with, `LabelFile` says.
    options.check_outputs(args, ("--out", "--summary"), lambda *_: True)
    weights = fingerprint(args.model)
    settings = {
        "model": args.model, "weights": weights, "dtype": args.dtype, "pairs": digest,
        "limit": args.limit, "template": template.digest, "rationale": args.rationale,
        "chat": args.chat,
    }  # fmt: skip
    unit = max(UNIT, args.batch_size)
    with open_labels(args.out, args.summary, settings, pairs, unit, args.force) as file:
        todo = pairs[len(file.labels) :]
        if todo:
            quiet_libraries()
            judge = Judge.load(
                args.model, dtype=args.dtype, device=args.device, template=template,
                chat={"auto": None, "on": True, "off": False}[args.chat],
                rationale_tokens=args.rationale, batch_size=args.batch_size,
                cache=None if args.cache == "none" else VerdictCache(args.cache),
                fingerprint=weights,
            )  # fmt: skip
            with options.progress("pairs in both orders", 2 * len(todo), keep=True) as advance:
                for start in range(0, len(todo), unit):
                    part = todo[start : start + unit]
                    results = judge.compare(
                        [p.prompt for p in part], [p.first for p in part],
                        [p.second for p in part], where=[p.where for p in part], advance=advance,
                    )  # fmt: skip
                    file.add([Label.of(p, c) for p, c in zip(part, results, strict=True)])
        summary = summarize_labels(file.labels, pairs)
        file.finish(summary)
    _show(summary, args)
    return 0


def _show(summary: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the summary as a table, and where the files are."""
    from quietstar.reports.pages import percent, percent_range

    table = options.table(("", "", "95% CI"), ("",))
    judged = summary["pairs"] - summary["equal"]
    table.add_row("pairs judged", str(judged))
    table.add_row("equal candidates (soft label 0.5)", str(summary["equal"]))
    table.add_row("prompts without their beginning", str(summary["cut"]))
    same = (percent(summary["same_slot"]), percent_range(summary["same_slot_ci"]))
    table.add_row("same number in both orders (position bias)", *same)
    table.add_row("  of these number 2", percent(summary["slot_2"]))
    table.add_row("probability of 1 and 2 together", percent(summary["mass"]))
    if summary["agreement"] is not None:
        agreement = percent(summary["agreement"]), percent_range(summary["agreement_ci"])
        table.add_row("agrees with the file's own choice", *agreement)
    table.title = Text("preferences")
    Console().print(table)
    options.say(f"preferences: {args.out}")
    options.say(f"settings and summary: {args.summary}")


def _parser() -> Parser:
    parser = Parser("quietstar judge", DESCRIPTION)
    add, value = parser.add_argument, parser.value
    add("--pairs", type=options.existing, required=True, metavar="FILE.jsonl", help="candidates")
    add("--model", type=options.existing, required=True, metavar="DIR",
        help="folder of a causal LM, which judges")  # fmt: skip
    add("--out", type=options.file_name(".jsonl"), required=True, metavar="FILE.jsonl",
        help="preferences; the same command continues an interrupted file")  # fmt: skip
    value("--summary", options.file_name(".json"), None, "FILE.json",
          "settings and summary; default: FILE.judge.json beside --out")  # fmt: skip
    value("--template", options.existing, "continuation", "NAME|FILE",
          "what is asked: continuation, answer, summary, or a file of yours")  # fmt: skip
    value("--rationale", whole(0, 10**5, "no judge writes more"), 0, "N",
          "most tokens of a rationale before each verdict; 0: none")  # fmt: skip
    add("--chat", choices=("auto", "on", "off"), default="auto",
        help="ask through the chat template of the tokenizer; auto: if it has one")  # fmt: skip
    value("--batch-size", BATCH, 16, "N", "texts at once, of which a pair has two")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of the weights")  # fmt: skip
    add("--device", type=options.device, metavar="NAME", help="default: a GPU if there is one")
    value("--limit", whole(1, 10**9, "no file has more"), None, "N", "only the first N pairs")
    value("--cache", options.existing, "none", "DIR|none",
          "folder that keeps verdicts for other commands; none: no folder")  # fmt: skip
    parser.flag("--force", "begin --out and --summary anew, whatever they hold")
    return parser
