"""``quietstar eval``, and ``python eval/run.py``: do the thoughts help, and is it luck?"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quietstar import __version__
from quietstar.cli.devices import device_option, find_device
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation.harness_tasks import HarnessTask, find_harness_task
from quietstar.evaluation.loading import fingerprint, load_thinker
from quietstar.evaluation.runner import CONTROLS, WITH, WITHOUT, Protocol, Runner
from quietstar.evaluation.store import ItemStore
from quietstar.evaluation.summary import summarise
from quietstar.evaluation.tables import task_view
from quietstar.evaluation.tasks import TASKS, Item, Task, find_task
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.reports.evaluation import write_page
from quietstar.training.setup import quiet_libraries

DESCRIPTION = """Scores tasks with and without thoughts, paired item by item.

Tasks: gsm8k and commonsense_qa (the probability of the gold answer, as in the paper, and argmax
accuracy), gsm8k_solution (the NLL of worked solutions), gsm8k_cot (votes over chains of thought),
demo (that of the built-in demo), FILE.jsonl with prompt and answer, or text, on every line, and
those of lm-evaluation-harness by their names.
"""
PACKAGES = ("torch", "transformers", "peft", "scipy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate, print tables, write the files that are asked for.

    Raises:
        UserError: A wrong argument, file, or model.
    """
    args = _parser().parse_args(arguments)
    quiet_libraries()
    tasks = find_tasks(args.tasks, args.include_path)
    protocol = read_protocol(args)
    data_dir = None if args.data_dir is None else Path(args.data_dir)
    check_files(args)
    own = [task for task in tasks if isinstance(task, Task)]
    items = {task.name: task.items(data_dir, args.limit) for task in own}  # fails early
    config = settings(args, protocol)
    store = ItemStore(items_path(args), config, args.overwrite)
    model, runner = build(args, protocol, store)
    found = evaluate(runner, own, items)
    del runner
    found |= evaluate_harness(args, protocol, [t for t in tasks if not isinstance(t, Task)], store)
    found = {task.name: found[task.name] for task in tasks}
    config |= {"variants": list(protocol.variants), "batch_size": args.batch_size}
    result = {"tasks": found, "config": config, "environment": environment(model)}
    console = Console()
    for name, figures in found.items():
        console.print(task_view(name, figures))
    write(args, result, console)
    return 0


def evaluate(
    runner: Runner, tasks: Sequence[Task], items: dict[str, list[Item]]
) -> dict[str, dict[str, Any]]:
    """Figures of every task (`quietstar.evaluation.summary.summarise`)."""
    found, protocol = {}, runner.protocol
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for task in tasks:
            count = len(items[task.name])
            bar = progress.add_task(task.name, total=runner.num_batches(task, count))
            num_cut = runner.run(task, items[task.name], lambda bar=bar: progress.advance(bar))
            found[task.name] = summarise(
                task, runner.store, protocol.variants, count, num_cut, protocol.seed
            )
    return found


def check_files(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written, or that are one file, before anything is scored.

    Raises:
        UserError: There is such a file.
    """
    named = {"--out": args.out, "--out-items": items_path(args), "--report": args.report}
    paths = {option: Path(path) for option, path in named.items() if path is not None}
    for option, path in paths.items():
        if path.is_dir():
            raise UserError(f"{option}: {path} is a folder; give the name of a file in it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(
                f"{option}: the folder {path.parent} cannot be made ({problem.strerror})"
            ) from None
        twin = next((o for o, p in paths.items() if o != option and p == path), None)
        if twin is not None:
            raise UserError(f"{option}: {path} is also {twin}; give another name to one of them")


def evaluate_harness(
    args: argparse.Namespace,
    protocol: Protocol,
    tasks: Sequence[HarnessTask],
    store: ItemStore,
) -> dict[str, dict[str, Any]]:
    """Figures of tasks of lm-evaluation-harness."""
    found = {}
    model = {"pretrained": args.model, "dtype": args.dtype, "device": args.device,
             "untrained": args.untrained}  # fmt: skip
    for task in tasks:
        count = task.run(model, protocol, args.limit, args.data_dir, store)
        found[task.name] = summarise(task, store, protocol.variants, count, 0, protocol.seed)
    return found


def find_tasks(names: str, include: str | None) -> list[Task | HarnessTask]:
    """Tasks by their names, comma-separated; ours, files, and the harness's.

    Raises:
        UserError: An unknown one, one that stands twice, or none.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError(f"--tasks: names none; known: {', '.join(TASKS)}")
    twice = {name for name in wanted if wanted.count(name) > 1}
    if twice:
        raise UserError(f"--tasks: {', '.join(sorted(twice))} stands twice; remove one")
    return [find_task(name) or find_harness_task(name, include) for name in wanted]


def build(
    args: argparse.Namespace, protocol: Protocol, store: ItemStore
) -> tuple[QuietStarForCausalLM, Runner]:
    """Load the model.

    Raises:
        UserError: No such model, or one that cannot think as it is asked to.
    """
    remedy = "Set --thoughts off, or --untrained for a baseline of thoughts never trained."
    thinks = WITH in protocol.variants
    model = load_thinker(args.model, thinks and not args.untrained, args.dtype, remedy)
    model.to(find_device(args.device))
    if "shuffled" in protocol.variants and model.thoughts.length < 2:
        raise UserError("--controls: thoughts of one token cannot be shuffled; leave it out")
    return model, Runner(model, load_tokenizer(args.model), protocol, store)


def read_protocol(args: argparse.Namespace) -> Protocol:
    """From the command line.

    Raises:
        UserError: A value that is out of range, or does not go with another.
    """
    for name in ("limit", "batch_size", "samples", "votes", "max_new_tokens", "text_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} must be at least 1")
    for name in ("thought_temperature", "temperature"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')}: {value} must be 0 or more")
    greedy = not args.thought_temperature
    if greedy and args.samples > 1:
        raise UserError(
            f"--samples: {args.samples} greedy thoughts are all alike; set --thought-temperature 1"
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
    )


def settings(args: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    """What decides the scores of an item; items made under other ones are not mixed with these."""
    how = asdict(protocol)
    for free in ("variants", "batch_size"):  # more variants may be added to the same file
        del how[free]
    return {
        "model": args.model, "weights": fingerprint(args.model), "dtype": args.dtype,
        "data_dir": args.data_dir, "limit": args.limit, "untrained": args.untrained, **how,
    }  # fmt: skip


def items_path(args: argparse.Namespace) -> Path | None:
    """Where finished items are kept: ``--out-items``, or beside ``--out``."""
    if args.out_items is not None:
        return Path(args.out_items)
    return None if args.out is None else Path(args.out).with_suffix(".items.jsonl")


def environment(model: QuietStarForCausalLM) -> dict[str, Any]:
    """Versions and machine."""
    dtype = next(model.causal_lm.parameters()).dtype
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "quietstar": __version__, **versions, "python": platform.python_version(),
        "platform": platform.platform(), "device": model.device.type,
        "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
    }  # fmt: skip


def write(args: argparse.Namespace, result: dict[str, Any], console: Console) -> None:
    """The JSON file and the page."""
    if args.out is not None:
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(path.suffix + ".new")
        new.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(new, path)
        console.print(f"figures: {path}", highlight=False, soft_wrap=True)
    if (items := items_path(args)) is not None:
        console.print(f"items: {items}", highlight=False, soft_wrap=True)
    if args.report is not None:
        console.print(f"page: {write_page(Path(args.report), args.model, result)}",
                      highlight=False, soft_wrap=True)  # fmt: skip


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "quietstar eval", description=DESCRIPTION, formatter_class=_Formatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a saved Quiet-STaR model, or a plain causal LM")
    add("--tasks", required=True, help=f"comma-separated: {', '.join(TASKS)}, FILE.jsonl")
    add("--thoughts", choices=("off", "on", "both"), default="both", help="what is scored")
    add("--controls", action="store_true",
        help="score shuffled thoughts, pause tokens, and another item's thoughts too")  # fmt: skip
    add("--include-path", help="folder with task files of lm-evaluation-harness, as eval/tasks")
    add("--data-dir", help="folder with the tasks' JSONL files; without it the hub")
    add("--limit", type=int, help="first so many items of each task")
    add("--batch-size", type=int, default=16, help="items (or chains) at once")
    add("--seed", type=int, default=0, help="of thoughts, chains, controls and resampling")
    add("--samples", type=int, default=1, help="thoughts of each item, their scores averaged")
    add("--thought-temperature", type=float, help="of thoughts; without it the most likely tokens")
    add("--votes", type=int, default=8, help="chains of thought of an item (gsm8k_cot)")
    add("--temperature", type=float, default=0.9, help="of the chains; 0 takes the most likely")
    add("--max-new-tokens", type=int, default=384, help="of a chain, before its final answer")
    add("--text-tokens", type=int, default=256, help="read of a text without a prompt")
    add("--untrained", action="store_true", help="thoughts of a plain model, as a baseline")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights")  # fmt: skip
    add("--device", type=device_option, help="by default a GPU if there is one")
    add("--out", metavar="FILE.json", help="figures; an interrupted evaluation goes on from it")
    add("--out-items", metavar="FILE.jsonl", help="items; default FILE.items.jsonl beside --out")
    add("--report", metavar="FILE.html", help="a page with plots")
    add("--overwrite", action="store_true", help="begin anew where --out holds another evaluation")
    return parser
