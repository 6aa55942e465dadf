"""``quietstar eval``, and ``python eval/run.py``: do the thoughts help, and is it luck?"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from quietstar.cli import options
from quietstar.cli.options import Parser
from quietstar.config.options import FileName
from quietstar.errors import UserError
from quietstar.evaluation.evaluate import EvalOptions, Evaluation
from quietstar.evaluation.runner import ItemStore, open_store, settings_changes
from quietstar.reports.evaluation import page_mark, task_view, write_page
from quietstar.system.files import write_json
from quietstar.system.processes import join_launch

DESCRIPTION = """Scores tasks with and without thoughts, paired item by item.

Tasks: gsm8k and commonsense_qa (the probability of the gold answer, as in the
paper, and argmax accuracy), gsm8k_solution (the NLL of worked solutions),
gsm8k_cot (votes over chains of thought), demo (that of the built-in demo),
FILE.jsonl with prompt and answer, or text, on every line (prompt and answer
are scored as they are, with nothing between; with choices, too, of which the
most likely one is chosen), FILE.txt (held-out text, in spans
of --text-tokens), and those of lm-evaluation-harness by their names.

quietstar eval lm-eval ARGS is the harness's own command, which knows the model
quietstar: quietstar eval lm-eval run --model quietstar --model_args pretrained=DIR ...
"""
MAX_RESULT_BYTES = 2**28
"""A larger file is no result of this command."""


class CommandOptions(EvalOptions):
    """And what is written."""

    out: FileName | None = None
    """Metrics; the same command continues an interrupted evaluation from the items next to it, and
    replaces metrics and page of the same evaluation."""
    out_items: FileName | None = None
    """Scores of every item; default: FILE.items.jsonl next to --out."""
    report: FileName | None = None
    """A page with plots."""
    force: bool = False
    """Replace files that exist, whatever they hold, and score all items anew."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate, print tables, write files; a wrong option, file or model raises `UserError`."""
    if arguments and arguments[0] == "lm-eval":
        from quietstar.cli.lm_eval import run_harness

        run_harness(arguments[1:])
        return 0
    parser = Parser("quietstar eval", DESCRIPTION)
    parser.options(CommandOptions)
    args: CommandOptions = parser.read(arguments)
    from quietstar.training.build import quiet_libraries  # once the command line is valid

    evaluation = Evaluation(args)
    is_written = args.out or args.out_items or args.report
    idle = {"--force": None if is_written else "without a file to write"}
    parser.warn_idle(args, evaluation.idle_options() | idle)
    processes = join_launch(args.device)
    if not processes.is_main:
        logging.disable(logging.WARNING)  # the main process says it
    with ExitStack() as stack:
        stores = [ItemStore(None, evaluation.config)]  # of a process that writes no file

        def read_finished() -> dict[Any, Any]:
            _check_files(args, evaluation.config, evaluation.files)
            items = None if args.out_items is None else Path(args.out_items)
            store = open_store(items, evaluation.config, args.force)
            stores[0] = stack.enter_context(store)
            return stores[0].records

        finished, store = processes.from_main(read_finished), stores[0]
        store.records = finished
        quiet_libraries()
        result = evaluation.run(store, processes)
    if not processes.is_main:
        return 0
    for name, figures in result["tasks"].items():
        Console().print(task_view(name, figures))
    if args.out is not None:
        write_json(Path(args.out), result)
    page = None if args.report is None else write_page(Path(args.report), args.model, result)
    for what, path in (("metrics", args.out), ("items", args.out_items), ("page", page)):
        if path is not None:
            options.say(f"{what}: {path}")
    return 0


def _check_files(args: Any, config: dict[str, Any], inputs: Mapping[str, Path]) -> None:
    """Refuse files that cannot be written or hold something else, before anything is scored.

    The same evaluation goes on with the same command, so its own figures and page are replaced.
    """
    if args.out_items is None and args.out is not None:
        args.out_items = f"{os.path.splitext(args.out)[0]}.items.jsonl"

    def is_own(option: str, path: Path) -> bool:
        if option == "--out-items":  # the store looks into it
            return True
        if path.stat().st_size > MAX_RESULT_BYTES:
            return False
        content = path.read_bytes()
        if option == "--report":
            return page_mark(config).encode() in content
        try:
            found = json.loads(content)
            if not {"tasks", "config", "environment"} <= set(found):
                return False
            changes = settings_changes(found["config"], config)
        except (ValueError, TypeError, AttributeError, RecursionError):  # nothing of ours
            return False
        if changes:
            raise UserError(
                f"{option} ({path}): holds figures that were made with another {changes}. Give "
                "another --out, or --force to replace it."
            )
        return True

    options.check_outputs(args, ("--out", "--out-items", "--report"), is_own, inputs)
