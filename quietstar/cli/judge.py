"""``quietstar judge``: preferences between two texts, by the probabilities of a language model."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from quietstar.cli import options
from quietstar.cli.options import BATCH, Parser, whole
from quietstar.errors import UserError
from quietstar.system.progress import progress

logger = logging.getLogger(__name__)

DESCRIPTION = """Asks a language model which of two candidates is better, in both orders.

Every line of --pairs has "prompt" and "candidates" (two texts), or "prompt",
"chosen" and "rejected". Every line of --out has prompt, chosen, rejected,
"soft_label" (the probability that chosen is preferred), "margin" (its log
odds), "probabilities" (with chosen shown first, and second), "mass",
"rationales" and "is_cut".

--compare A B --prompts FILE has two models write the candidates, or one with and
without its thoughts (--compare A A --thoughts on off), and says which one wins.
"""
UNIT = 64
"""Pairs that are judged and written together, sorted by length, unless a batch holds more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge, write the preferences, print a summary; what is wrong raises `UserError`."""
    parser = _parser()
    args = parser.read(arguments)
    _check_use(parser, args)
    # These import torch, after the command line is known to be valid.
    from quietstar.evaluation.scoring import fingerprint
    from quietstar.judging import Judge, VerdictCache, load_template
    from quietstar.judging.contest import summarize_contest
    from quietstar.judging.labels import Label, open_labels, read_pairs, summarize_labels
    from quietstar.reports.judging import write_judge_page
    from quietstar.training.build import quiet_libraries

    template = load_template(args.template)
    if args.summary is None:
        args.summary = f"{args.out.removesuffix('.jsonl')}.judge.json"
    quiet_libraries()
    _check_judge(args, template)
    if args.compare is None:
        pairs, digest = read_pairs(Path(args.pairs).expanduser(), args.limit)
        # Whether existing ones may be gone on with, `LabelFile` says.
        options.check_outputs(args, ("--out", "--summary", "--html"), lambda *_: True)
    else:
        more = {f"--compare ({name})": Path(name) for name in args.compare}
        options.check_outputs(args, ("--out", "--summary", "--html"), lambda *_: True, more)
        pairs, digest = _contest(args)
    weights = fingerprint(args.model)
    settings = {
        "model": args.model, "weights": weights, "dtype": args.dtype, "pairs": digest,
        "limit": args.limit, "template": f"{args.template} {template.digest}",
        "rationale": args.rationale, "chat": args.chat,
    }  # fmt: skip
    unit = max(UNIT, args.batch_size)
    with open_labels(args.out, args.summary, settings, pairs, unit, args.force) as file:
        todo = pairs[len(file.labels) :]
        if todo:
            judge = Judge.load(
                args.model, dtype=args.dtype, device=args.device, template=template,
                chat={"auto": None, "on": True, "off": False}[args.chat],
                rationale_tokens=args.rationale, batch_size=args.batch_size,
                cache=None if args.cache == "none" else VerdictCache(args.cache),
                fingerprint=weights,
            )  # fmt: skip
            with progress("pairs in both orders", 2 * len(todo), keep=True) as advance:
                for start in range(0, len(todo), unit):
                    part = todo[start : start + unit]
                    results = judge.compare(
                        [p.prompt for p in part], [p.first for p in part],
                        [p.second for p in part], where=[p.where for p in part], advance=advance,
                    )  # fmt: skip
                    file.add([Label.of(p, c) for p, c in zip(part, results, strict=True)])
        summary = summarize_labels(file.labels, pairs)
        if args.compare is not None:
            summary |= summarize_contest(file.labels, pairs)
        file.finish(summary)
        _show(summary, args)
        if args.html is not None:
            names = None if args.compare is None else _names(args)
            shown = {**settings, "template_name": args.template}
            write_judge_page(args.html, file.labels, pairs, summary, shown, names)
            options.say(f"page: {args.html}")
    return 0


def _check_use(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse a command line that is neither about pairs nor about two models."""
    if (args.pairs is None) == (args.compare is None):
        problem = "are both given" if args.pairs is not None else "must be given"
        raise UserError(
            f"--pairs or --compare: {problem}; give --pairs FILE.jsonl to judge texts, or "
            "--compare A B --prompts FILE.jsonl to judge what two models write."
        )
    if args.compare is not None and args.prompts is None:
        raise UserError("--prompts: must be given with --compare; name a JSONL file with prompts.")
    reason = "without --compare" if args.compare is None else None
    writing = ("--prompts", "--thoughts", "--max-new-tokens", "--temperature", "--seed")
    parser.warn_idle(args, dict.fromkeys(writing, reason))
    args.thoughts = args.thoughts or ["on", "on"]


def _check_judge(args: argparse.Namespace, template: Any) -> None:
    """Refuse a judge that could judge no texts, before any are written or read."""
    from quietstar.backbone.loading import read_config
    from quietstar.data.tokenizer import load_tokenizer
    from quietstar.judging.judge import check_readable, of_model
    from quietstar.judging.prompts import Prompts

    try:
        tokenizer = load_tokenizer(args.model, trust_remote_code=False)
    except UserError as problem:
        message = str(problem).removeprefix(f"tokenizer ({args.model}): ")
        raise UserError(f"--model ({args.model}): {message}") from problem
    try:
        config = read_config(args.model).get_text_config()
    except UserError as problem:
        message = str(problem).replace("model.name_or_path (", "--model (")
        raise UserError(message) from problem
    uses_chat = bool(tokenizer.chat_template) if args.chat == "auto" else args.chat == "on"
    if uses_chat and not tokenizer.chat_template:
        raise UserError("--chat (on): the judge's tokenizer has no chat template. Set it off.")
    with of_model(args.model):
        context = getattr(config, "max_position_embeddings", None)
        check_readable(Prompts(tokenizer, template, uses_chat), "pair", context, args.rationale)


def _contest(args: argparse.Namespace) -> tuple[list[Any], str]:
    """Have both models continue the prompts."""
    from quietstar.cli.options import load_model
    from quietstar.data.tokenizer import load_tokenizer
    from quietstar.evaluation.scoring import fingerprint
    from quietstar.judging.contest import (
        Contestant,
        check_room,
        read_prompts,
        write_candidates,
        writer,
    )

    prompts = read_prompts(Path(args.prompts).expanduser(), args.limit)
    tokenizers: dict[str, Any] = {}
    for name in args.compare:
        try:
            tokenizers[name] = load_tokenizer(name, trust_remote_code=False)
        except UserError as problem:
            message = str(problem).removeprefix(f"tokenizer ({name}): ")
            raise UserError(f"--compare ({name}): {message}") from problem
    contestants = [
        Contestant(name, thinks == "on" and _can_think(name), fingerprint(name))
        for name, thinks in zip(args.compare, args.thoughts, strict=True)
    ]
    if "off" in args.thoughts and not any(map(_can_think, args.compare)):
        logger.warning("--thoughts: has no effect on models that do not think; leave it out")
    if contestants[0] == contestants[1] and args.temperature == 0:
        reason = "is the same model twice, and its likeliest texts are the same"
        if args.thoughts[0] != args.thoughts[1]:
            reason = "is the same model twice, and does not think"
        raise UserError(
            f"--compare ({args.compare[0]}): {reason}. Give two models, --thoughts on off for one "
            "that thinks, or --temperature 1 for two samples."
        )
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}

    def load(contestant: Contestant) -> Any:
        model = load_model(args, False, "", contestant.name, "trained")
        check_room(prompts, model, tokenizers[contestant.name], args.max_new_tokens, contestant)
        return writer(model, tokenizers[contestant.name], contestant.thinks, **sampling)

    path = Path(f"{str(args.out).removesuffix('.jsonl')}.candidates.json")
    settings = {**sampling, "seed": args.seed, "dtype": args.dtype}
    with progress("texts of both models", 2 * len(prompts), keep=True) as advance:
        return write_candidates(
            path, prompts, contestants, settings, load, args.batch_size, advance, args.force
        )


def _can_think(name: str) -> bool:
    from quietstar.model.saving import SETTINGS_FILE

    return (Path(name).expanduser() / SETTINGS_FILE).exists()


def _names(args: argparse.Namespace) -> tuple[str, str]:
    """Short names of both contestants, which tell them apart."""
    first, second = args.compare
    if first == second and args.thoughts[0] != args.thoughts[1]:
        both = ("with thoughts", "without thoughts")
        return both if args.thoughts[0] == "on" else (both[1], both[0])
    if first == second:
        return "first sample", "second sample"
    names = [Path(name).name or name for name in (first, second)]
    if names[0] == names[1]:
        names = [first, second]
    return names[0], names[1]


def _show(summary: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the summary as a table, and where the files are."""
    from quietstar.reports.formats import show

    table = options.table(("", "", "95% CI"), ("",))
    judged = summary["pairs"] - summary["equal"]
    table.add_row("pairs judged", str(judged))
    table.add_row("equal candidates (soft label 0.5)", str(summary["equal"]))
    table.add_row("prompts without their beginning", str(summary["cut"]))
    same = (show(summary["same_slot"], ".1%"), show(summary["same_slot_ci"], ".1%"))
    table.add_row("same number in both orders (position bias)", *same)
    table.add_row("  of these number 2", show(summary["slot_2"], ".1%"))
    table.add_row("probability of 1 and 2 together", show(summary["mass"], ".1%"))
    if summary["agreement"] is not None:
        agreement = show(summary["agreement"], ".1%"), show(summary["agreement_ci"], ".1%")
        table.add_row("agrees with the file's own choice", *agreement)
    if args.compare is not None:
        first, second = _names(args)
        wins = show(summary["win_rate"], ".1%"), show(summary["win_rate_ci"], ".1%")
        table.add_row(Text(f"{first} wins over {second}"), *wins)
    table.title = Text("preferences")
    Console().print(table)
    options.say(f"preferences: {args.out}")
    options.say(f"settings and summary: {args.summary}")


def _parser() -> Parser:
    parser = Parser("quietstar judge", DESCRIPTION)
    add, value = parser.add_argument, parser.value
    add("--pairs", type=options.existing, metavar="FILE.jsonl", help="candidates to judge")
    add("--compare", type=options.existing, nargs=2, metavar="DIR",
        help="two models that write candidates for --prompts")  # fmt: skip
    add("--prompts", type=options.existing, metavar="FILE.jsonl",
        help='"prompt" on every line, with --compare')  # fmt: skip
    add(
        "--thoughts",
        choices=("on", "off"),
        nargs=2,
        metavar="on|off",
        help="whether each of the two thinks, if it is a model that does; default: on on",
    )
    value("--max-new-tokens", whole(1), 64, "N", "most tokens that they write")
    value("--temperature", options.temperature, 0.0, "X", "of their texts; 0: the likeliest tokens")
    value("--seed", whole(0, 2**32 - 1), 0, "N", "of their texts")
    add("--model", type=options.existing, required=True, metavar="DIR",
        help="folder of a causal LM, which judges")  # fmt: skip
    add("--out", type=options.file_name(".jsonl"), required=True, metavar="FILE.jsonl",
        help="preferences; the same command continues an interrupted file")  # fmt: skip
    value("--summary", options.file_name(".json"), None, "FILE.json",
          "settings and summary; default: FILE.judge.json next to --out")  # fmt: skip
    value(
        "--html",
        options.file_name(".html"),
        None,
        "FILE.html",
        "page of the result and of pairs: the clearest, and those it contradicts itself on",
    )
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
