"""``quietstar eval``, and ``python eval/run.py``: do the thoughts help, and is it luck?"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from quietstar import __version__
from quietstar.cli import options
from quietstar.cli.options import Parser
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import UserError, visible
from quietstar.evaluation.controls import CONTROLS, WITH, WITHOUT
from quietstar.evaluation.runner import HarnessTask, ItemStore, Runner, find_harness_task
from quietstar.evaluation.scoring import POSITIONS, Protocol, fingerprint
from quietstar.evaluation.statistics import summarise
from quietstar.evaluation.tasks import TASKS, TEXT_FILES, Task, find_task
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.reports.evaluation import task_view, write_page

DESCRIPTION = """Scores tasks with and without thoughts, paired item by item.

Tasks: gsm8k and commonsense_qa (the probability of the gold answer, as in the
paper, and argmax accuracy), gsm8k_solution (the NLL of worked solutions),
gsm8k_cot (votes over chains of thought), demo (that of the built-in demo),
FILE.jsonl with prompt and answer, or text, on every line (prompt and answer
are scored as they are, with nothing between), FILE.txt (held-out text, in spans
of --text-tokens), and those of lm-evaluation-harness by their names.
"""
PACKAGES = ("torch", "transformers", "peft", "scipy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate, print tables, write the files that are asked for.

    Raises:
        UserError: An option, a file or the model is wrong.
    """
    args = _parser().read(arguments)
    tasks = _find_tasks(args.tasks, args.include_path, args.separator)
    protocol = _protocol(args)
    data_dir = None if args.data_dir is None else Path(args.data_dir)
    _check_files(args)
    own = [task for task in tasks if isinstance(task, Task)]
    cuts_text = any(task.file is not None and task.file.endswith(TEXT_FILES) for task in own)
    tokenizer = load_tokenizer(args.model, trust_remote_code=False) if cuts_text else None
    items = {  # fails early
        task.name: task.items(data_dir, args.limit, tokenizer, args.text_tokens) for task in own
    }
    config = _settings(args, protocol)
    store = ItemStore(args.out_items, config, args.overwrite)
    model, runner = _build(args, protocol, store)
    results = {}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for task in own:
            count = len(items[task.name])
            bar = progress.add_task(visible(task.name), total=runner.num_batches(task, count))
            num_cut = runner.run(task, items[task.name], lambda bar=bar: progress.advance(bar))
            results[task.name] = summarise(
                task, store, protocol.variants, count, num_cut, protocol.seed
            )
    del runner
    harness = {"pretrained": args.model, "dtype": args.dtype, "device": args.device,
               "untrained": args.untrained}  # fmt: skip
    for task in tasks:
        if isinstance(task, HarnessTask):
            count = task.run(harness, protocol, args.limit, args.data_dir, store)
            results[task.name] = summarise(task, store, protocol.variants, count, 0, protocol.seed)
    results = {task.name: results[task.name] for task in tasks}
    config |= {"variants": list(protocol.variants), "batch_size": args.batch_size}
    result = {"tasks": results, "config": config, "environment": _environment(model)}
    console = Console()
    for name, figures in results.items():
        console.print(task_view(name, figures))
    if args.out is not None:
        options.write_text(args.out, json.dumps(result, indent=2) + "\n")
    page = None if args.report is None else write_page(args.report, args.model, result)
    for what, path in (("figures", args.out), ("items", args.out_items), ("page", page)):
        if path is not None:
            console.print(Text(visible(f"{what}: {path}")), soft_wrap=True)
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Refuse files that are one file or hold something else, before anything is scored."""
    if args.out_items is None and args.out is not None:
        args.out_items = args.out.with_suffix(".items.jsonl")
    names = {"--out": args.out, "--out-items": args.out_items, "--report": args.report}
    paths = {option: path for option, path in names.items() if path is not None}
    for option, path in paths.items():
        twin = next((o for o, p in paths.items() if o != option and p == path), None)
        if twin is not None:
            raise UserError(f"{option} ({path}): is also {twin}; give another name to one of them")
        # The items file is checked by its own store.
        if option != "--out-items" and not args.overwrite and not _is_replaceable(path):
            raise UserError(
                f"{option} ({path}): holds something else than an evaluation; give another name, "
                "or --overwrite to replace it"
            )


def _is_replaceable(path: Path) -> bool:
    """Return whether a file is missing, empty, or figures or a page of an earlier evaluation."""
    if not path.exists() or not path.stat().st_size:
        return True
    if path.suffix == ".html":
        with path.open("rb") as file:
            return b"quietstar" in file.read(4096).lower()
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"tasks", "config", "environment"} <= set(found)


def _find_tasks(names: str, include: str | None, separator: str) -> list[Task | HarnessTask]:
    """Return tasks by their comma-separated names: ours, files, and the harness's."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError(f"--tasks: names none; known: {', '.join(TASKS)}")
    twice = {name for name in wanted if wanted.count(name) > 1}
    if twice:
        raise UserError(f"--tasks: {', '.join(sorted(twice))} is given twice; remove one")
    return [find_task(name, separator) or find_harness_task(name, include) for name in wanted]


def _build(
    args: argparse.Namespace, protocol: Protocol, store: ItemStore
) -> tuple[QuietStarForCausalLM, Runner]:
    """Load the model.

    Raises:
        UserError: There is no such model, or it cannot think as it is asked to.
    """
    remedy = "Set --thoughts off, or --untrained for a baseline of thoughts never trained."
    model = options.load_model(args, WITH in protocol.variants and not args.untrained, remedy)
    if "shuffled" in protocol.variants and model.thoughts.length < 2:
        raise UserError("--controls: thoughts of one token cannot be shuffled; leave it out")
    tokenizer = load_tokenizer(args.model, trust_remote_code=False)
    return model, Runner(model, tokenizer, protocol, store)


def _protocol(args: argparse.Namespace) -> Protocol:
    greedy = not args.thought_temperature
    if greedy and args.samples > 1:
        raise UserError(
            f"--samples ({args.samples}): greedy thoughts are all identical; set "
            "--thought-temperature 1"
        )
    if args.controls and args.thoughts == "off":
        raise UserError("--controls: need thoughts; set --thoughts both")
    variants = {"off": [WITHOUT], "on": [WITH], "both": [WITHOUT, WITH]}[args.thoughts]
    return Protocol(
        variants=(*variants, *(CONTROLS if args.controls else ())),
        batch_size=args.batch_size,
        samples=args.samples,
        thought_temperature=None if greedy else args.thought_temperature,
        seed=args.seed,
        votes=args.votes,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        text_tokens=args.text_tokens,
        positions=args.positions,
        separator=args.separator,
    )


def _settings(args: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    """Return what decides the scores of an item; items of other settings are not mixed in."""
    scoring = asdict(protocol)
    for free in ("variants", "batch_size"):  # more variants may be added to the same file
        del scoring[free]
    return {
        "model": args.model, "weights": fingerprint(args.model), "dtype": args.dtype,
        "data_dir": args.data_dir, "limit": args.limit, "untrained": args.untrained, **scoring,
    }  # fmt: skip


def _environment(model: QuietStarForCausalLM) -> dict[str, Any]:
    """Return versions and machine."""
    dtype = next(model.causal_lm.parameters()).dtype
    installed = {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return {
        "quietstar": __version__, **versions, "python": platform.python_version(),
        "platform": platform.platform(), "device": model.device.type,
        "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _parser() -> Parser:
    parser = Parser("quietstar eval", DESCRIPTION)
    options.add_model(parser, "a saved Quiet-STaR model, or a plain causal LM")
    add = parser.add_argument
    add("--tasks", required=True, metavar="NAMES",
        help=f"comma-separated: {', '.join(TASKS)}, FILE.jsonl, FILE.txt")  # fmt: skip
    add("--thoughts", choices=("off", "on", "both"), default="both", help="what is scored")
    add("--controls", action="store_true",
        help="also score swapped thoughts, shuffled thoughts and pause tokens")  # fmt: skip
    add("--positions", choices=POSITIONS, default="trained",
        help="think about an answer as trained (once before it, if trained with "
        "thoughts.positions answer_start), or before every one of its tokens")  # fmt: skip
    add("--separator", default="", metavar="TEXT",
        help="text between prompt and answer of FILE.jsonl; default: none")  # fmt: skip
    add("--include-path", metavar="DIR",
        help="folder with task files of lm-evaluation-harness, as eval/tasks")  # fmt: skip
    add("--data-dir", metavar="DIR", help="folder with the tasks' JSONL files; default: the hub")
    add("--limit", type=options.COUNT, metavar="N", help="only the first N items of each task")
    add(
        "--batch-size",
        type=options.COUNT,
        default=16,
        metavar="N",
        help="items (or chains) at once",
    )
    add("--seed", type=options.SEED, default=0, help="seed of thoughts, chains and resampling")
    add("--samples", type=options.THOUGHTS, default=1, metavar="N",
        help="thoughts of each item, whose scores are averaged")  # fmt: skip
    add("--thought-temperature", type=options.number(), metavar="T",
        help="temperature of thoughts; without it their most likely tokens")  # fmt: skip
    add("--votes", type=options.THOUGHTS, default=8, metavar="N",
        help="chains of thought of an item (gsm8k_cot)")  # fmt: skip
    add("--temperature", type=options.number(), default=0.9, metavar="T",
        help="temperature of the chains; 0 takes the most likely tokens")  # fmt: skip
    add("--max-new-tokens", type=options.COUNT, default=384, metavar="N",
        help="length of a chain, before its final answer")  # fmt: skip
    add("--text-tokens", type=options.COUNT, default=256, metavar="N",
        help="tokens that are read of a text, and tokens of a span of FILE.txt")  # fmt: skip
    add("--untrained", action="store_true", help="let a plain model think, as a baseline")
    add("--out", type=options.output_file(), metavar="FILE.json",
        help="figures; an interrupted evaluation continues from the items beside it")  # fmt: skip
    add("--out-items", type=options.output_file(), metavar="FILE.jsonl",
        help="scores of every item; default: FILE.items.jsonl beside --out")  # fmt: skip
    add("--report", type=options.output_file(), metavar="FILE.html", help="a page with plots")
    add("--overwrite", action="store_true",
        help="start over where the files hold another evaluation, or something else")  # fmt: skip
    return parser
