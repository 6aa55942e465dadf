"""``quietstar eval``, and ``python eval/run.py``: do the thoughts help, and is it luck?"""

import argparse
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from quietstar.cli import options
from quietstar.cli.options import BATCH, SEED, THOUGHTS, TOKENS, Parser, unicode_text, whole
from quietstar.config import Config, DataConfig
from quietstar.config.loading import load_config
from quietstar.config.messages import closest, did_you_mean
from quietstar.data.encoding import split_template
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import UserError, visible
from quietstar.evaluation.controls import CONTROLS, GENERIC, GENERIC_TEXT, WITH, WITHOUT
from quietstar.evaluation.runner import (
    FREE_SETTINGS,
    HarnessTask,
    ItemStore,
    Runner,
    find_harness_task,
    open_store,
    settings_changes,
)
from quietstar.evaluation.scoring import POSITIONS, Protocol, fingerprint
from quietstar.evaluation.statistics import correct_for_many, summarise
from quietstar.evaluation.tasks import TASKS, TEXT_FILES, Item, Task, find_task
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.saving import SETTINGS_FILE
from quietstar.reports.evaluation import page_mark, task_view, write_page
from quietstar.sampling.positions import MARKED_RULES
from quietstar.system.files import write_json
from quietstar.system.processes import Processes, join_launch
from quietstar.version import __version__

logger = logging.getLogger(__name__)

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
PACKAGES = ("torch", "transformers", "peft", "scipy")
QUESTION_FIELDS = ("template", "question_field", "answer_field")
"""Keys of ``data`` in a config that are options here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate, print tables, write files; a wrong option, file or model raises `UserError`."""
    if arguments and arguments[0] == "lm-eval":
        from quietstar.cli.lm_eval import run_harness

        run_harness(arguments[1:])
        return 0
    parser = _parser()
    args = parser.read(arguments)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks: names none; known: {', '.join(TASKS)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--tasks: {', '.join(twice)} is given twice; remove one")
    trained = None
    if args.config is not None:
        trained = list(load_config(args.config).stage_configs().values())[-1]
    data = _question_fields(args, trained)
    tasks = [
        find_task(name, args.separator, args.extract, data)
        or find_harness_task(name, args.include_path)
        for name in names
    ]
    protocol = _protocol(args)
    own = [task for task in tasks if isinstance(task, Task)]
    tokenizer = None
    if any(task.file is not None and task.file.endswith(TEXT_FILES) for task in own):
        tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    data_dir = None if args.data_dir is None else Path(args.data_dir)
    items = {  # fails early
        task.name: task.items(data_dir, args.limit, tokenizer, args.text_tokens) for task in own
    }
    parser.warn_idle(args, _idle_options(args, tasks, items))
    # What decides the scores of an item; items of other settings are not mixed in. More variants
    # may be added to the same file.
    scoring = {key: value for key, value in asdict(protocol).items() if key not in FREE_SETTINGS}
    config = {
        "model": args.model, "weights": fingerprint(args.model), "dtype": args.dtype,
        "data_dir": args.data_dir, "limit": args.limit, "untrained": args.untrained,
        "extract": args.extract, **scoring,
    }  # fmt: skip
    if data is not None:
        config |= {key: getattr(data, key) for key in QUESTION_FIELDS}
    sections = None
    if trained is not None and args.untrained:
        sections = {"thoughts": trained.thoughts, "mixing_head": trained.mixing_head}
        config["thinks"] = {name: section.model_dump() for name, section in sections.items()}
        if len(own) < len(tasks):
            raise UserError(
                "--config: with --untrained says how the model thinks, which tasks of "
                "lm-evaluation-harness do not read. Evaluate them apart, without it."
            )
    files = {f"the file of {t.name}": (data_dir or Path()) / t.file for t in own if t.file}
    processes = join_launch(args.device)
    if len(own) < len(tasks) and processes.count > 1:
        raise UserError(
            "--tasks: those of lm-evaluation-harness run in one process. Leave accelerate launch "
            "out, or evaluate them apart."
        )
    if not processes.is_main:
        logging.disable(logging.WARNING)  # the main process says it
    with ExitStack() as stack:
        stores = [ItemStore(None, config)]  # of a process that writes no file

        def read_finished() -> dict[Any, Any]:
            _check_files(args, config, files)
            stores[0] = stack.enter_context(open_store(args.out_items, config, args.force))
            return stores[0].records

        finished, store = processes.from_main(read_finished), stores[0]
        store.records = finished
        result = _evaluate(args, tasks, items, protocol, config, store, processes, sections)
    if not processes.is_main:
        return 0
    for name, figures in result["tasks"].items():
        Console().print(task_view(name, figures))
    if args.out is not None:
        write_json(args.out, result)
    page = None if args.report is None else write_page(args.report, args.model, result)
    for what, path in (("figures", args.out), ("items", args.out_items), ("page", page)):
        if path is not None:
            options.say(f"{what}: {path}")
    return 0


def _idle_options(
    args: argparse.Namespace, tasks: Sequence[Task | HarnessTask],
    items: Mapping[str, Sequence[Item]],
) -> dict[str, str | None]:  # fmt: skip
    """Say of options why they change nothing in the scores of these tasks, if they do not."""

    def unless(has_effect: bool, reason: str) -> str | None:
        return None if has_effect else reason

    own = [task for task in tasks if isinstance(task, Task)]
    is_harness, thinks = len(own) < len(tasks), args.thoughts != "off"
    reads = is_harness or any(task.file not in (None, task.name) for task in own)
    generated = any(task.kind == "votes" for task in own)
    votes = unless(generated, "without gsm8k_cot or --extract")
    extracted = any(task.extract is not None for task in own)
    thoughts = unless(thinks, "with --thoughts off")
    separates = any(i.prompt for task in own if task.file == task.name for i in items[task.name])
    has_texts = any(not i.prompt for task in own for i in items[task.name])
    is_trained = (Path(args.model) / SETTINGS_FILE).exists()
    written = args.out or args.out_items or args.report
    has_own = any(task.name.endswith(".jsonl") for task in own)
    return {
        **dict.fromkeys(("--votes", "--temperature", "--max-new-tokens"), votes),
        **dict.fromkeys(("--samples", "--thought-temperature", "--positions"), thoughts),
        **options.idle_thought_filters(thoughts, args.thought_temperature),
        "--extract": unless(extracted, "without a FILE.jsonl"),
        "--stop": unless(extracted, "without --extract and a FILE.jsonl"),
        **dict.fromkeys(map(_option, QUESTION_FIELDS), unless(has_own, "without a FILE.jsonl")),
        "--config": unless(has_own or args.untrained, "without a FILE.jsonl or --untrained"),
        "--generic": unless(
            GENERIC in args.controls, "without --controls" + (" generic" if args.controls else "")
        ),
        "--untrained": thoughts or unless(not is_trained, "on a model that was trained to think"),
        "--data-dir": unless(reads, "on tasks without a file there"),
        "--include-path": unless(is_harness, "without a task of lm-evaluation-harness"),
        "--separator": unless(separates, "without a prompt in a FILE.jsonl"),
        "--text-tokens": unless(has_texts, "without a text that has no prompt"),
        "--force": unless(bool(written), "without a file to write"),
    }


def _evaluate(
    args: argparse.Namespace, tasks: Sequence[Task | HarnessTask], items: Mapping[str, list[Item]],
    protocol: Protocol, config: dict[str, Any], store: ItemStore, processes: Processes,
    sections: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Score what is not yet scored; return the content of ``--out``."""
    remedy = "Set --thoughts off, or --untrained for a baseline of thoughts never trained."
    needs_training = WITH in protocol.variants and not args.untrained
    model = options.load_model(
        args, needs_training, remedy, positions=protocol.positions, sections=sections
    )
    if "shuffled" in protocol.variants and model.thoughts.length < 2:
        raise UserError("--controls: thoughts of one token cannot be shuffled; leave it out")
    rule, is_trained = model.thoughts.positions, protocol.positions == "trained"
    if rule in MARKED_RULES and is_trained and WITH in protocol.variants:
        logger.warning(
            "--model (%s): was trained with thoughts.positions: %s, but answers are thought about "
            "before each of their tokens", args.model, rule,
        )  # fmt: skip
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    runner = Runner(model, tokenizer, protocol, store, processes)
    environment, results = _environment(model) | {"processes": processes.count}, {}
    for task in tasks:
        if isinstance(task, Task):
            count = len(items[task.name])
            batches = runner.num_batches(task, items[task.name])
            shown = processes.is_main
            with options.progress(task.name, batches, keep=True, shown=shown) as advance:
                num_cut = runner.run(task, items[task.name], advance)
            if processes.is_main:
                results[task.name] = summarise(
                    task, store, protocol.variants, count, num_cut, protocol.seed
                )
    del runner, model
    if not processes.is_main:
        return {}
    harness = {"pretrained": args.model, "dtype": args.dtype, "device": args.device,
               "device_map": args.device_map, "untrained": args.untrained}  # fmt: skip
    for task in tasks:
        if isinstance(task, HarnessTask):
            count = task.run(harness, protocol, args.limit, args.data_dir, store)
            results[task.name] = summarise(task, store, protocol.variants, count, 0, protocol.seed)
    config = {**config, "variants": list(protocol.variants), "batch_size": args.batch_size}
    results = {task.name: results[task.name] for task in tasks}
    correct_for_many(results)
    return {"tasks": results, "config": config, "environment": environment}


def _environment(model: QuietStarForCausalLM) -> dict[str, Any]:
    """Return versions and machine."""
    installed = {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return {
        "quietstar": __version__, **versions, "python": platform.python_version(),
        "platform": platform.platform(), "device": model.device.type,
        "dtype": str(next(model.causal_lm.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _check_files(
    args: argparse.Namespace, config: dict[str, Any], inputs: Mapping[str, Path]
) -> None:
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


def _protocol(args: argparse.Namespace) -> Protocol:
    temperature = args.thought_temperature or None
    if args.thoughts != "off":
        options.check_greedy("--samples", args.samples, temperature, "--thought-temperature")
    if args.controls and args.thoughts == "off":
        raise UserError("--controls: need thoughts; set --thoughts both")
    variants = {"off": [WITHOUT], "on": [WITH], "both": [WITHOUT, WITH]}[args.thoughts]
    same = ("batch_size", "samples", "thought_top_p", "thought_top_k", "seed", "votes",
            "temperature", "max_new_tokens", "text_tokens", "positions", "separator",
            "generic")  # fmt: skip
    return Protocol(
        variants=(*variants, *args.controls),
        thought_temperature=temperature,
        stop=args.stop,
        **{name: getattr(args, name) for name in same},
    )


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _question_fields(args: argparse.Namespace, trained: Config | None) -> DataConfig | None:
    """Read how records become questions and answers, if an option or ``--config`` says so."""
    given = {key: getattr(args, key) for key in QUESTION_FIELDS if getattr(args, key) is not None}
    has_questions = trained is not None and trained.data.format == "qa"
    if not given and (trained is None or (args.untrained and not has_questions)):
        return None
    if args.separator:
        raise UserError("--separator: a --template says what separates them; leave one out")
    if "template" in given:
        given["template"] = given["template"].replace("\\n", "\n")  # which no shell writes
    if trained is not None and not has_questions and not args.untrained:
        raise UserError(
            f"--config ({args.config}): has data.format: {trained.data.format}, whose records have "
            "no question and answer. Leave it out."
        )
    if trained is not None and has_questions:
        given = {key: getattr(trained.data, key) for key in QUESTION_FIELDS} | given
    try:
        data = DataConfig(format="qa", **given)
        split_template(data.template)
    except ValidationError as problem:
        error = problem.errors()[0]
        key, rule = str(error["loc"][0]), error["msg"].removeprefix("Value error, ")
        raise UserError(f"{_option(key)} ({given[key]}): {rule}") from problem
    except UserError as problem:
        raise UserError(str(problem).replace("data.template", "--template")) from problem
    return data


def _control_names(text: str) -> tuple[str, ...]:
    """Parse the names of controls, in whatever order, into the order of `CONTROLS`."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in CONTROLS]:
        rule = f"; choose from {', '.join(CONTROLS)}, or give --controls alone for all of them"
        hint = did_you_mean(closest(unknown[0], CONTROLS)) or rule
        raise argparse.ArgumentTypeError(f"({visible(unknown[0])}): no such control{hint}")
    return tuple(name for name in CONTROLS if name in names)


def _parser() -> Parser:
    parser = Parser("quietstar eval", DESCRIPTION)
    options.add_model(parser, "a saved Quiet-STaR model, or a plain causal LM")
    add, value, files = parser.add_argument, parser.value, options.file_name()
    add("--tasks", required=True, metavar="NAMES",
        help=f"comma-separated: {', '.join(TASKS)}, FILE.jsonl, FILE.txt")  # fmt: skip
    add("--thoughts", choices=("off", "on", "both"), default="both", help="what is scored")
    add("--controls", type=_control_names, nargs="?", const=CONTROLS, default=(), metavar="NAMES",
        help="also score controls: swapped, shuffled, pause, generic, blank (comma-separated), or "
        "without names all of them")  # fmt: skip
    value("--generic", unicode_text, GENERIC_TEXT, "TEXT",
          "text of every thought in the control of that name")  # fmt: skip
    add("--positions", choices=POSITIONS, default="trained",
        help="think about an answer as trained (once before it, if trained with "
        "thoughts.positions answer_start, and otherwise before each of its tokens), once, or "
        "before every one of its tokens")  # fmt: skip
    value("--separator", unicode_text, "", "TEXT",
          "text between prompt and answer of FILE.jsonl; default: none")  # fmt: skip
    value("--config", str, None, "FILE",
          "config of a training, whose data section says how records of FILE.jsonl become "
          "questions and answers, where the next three options do not; with --untrained, "
          "also how the model thinks (thoughts and mixing_head)")  # fmt: skip
    value("--template", unicode_text, None, "TEXT",
          "what joins the question and the answer of a record of FILE.jsonl, as data.template in "
          "training, such as 'Q: {question}\\nA: {answer}'")  # fmt: skip
    value("--question-field", unicode_text, None, "FIELD",
          "field of the question there, or a Jinja template of the record's fields")  # fmt: skip
    value("--answer-field", unicode_text, None, "FIELD", "the same for the answer")
    value("--extract", options.pattern, None, "REGEX",
          "generate behind the prompts of FILE.jsonl, and compare the last match in the text (its\n"
          "first group, if it has one) with the answer")  # fmt: skip
    value("--stop", unicode_text, None, "TEXT", "text that ends what is generated with --extract")
    value("--include-path", options.folder, None, "DIR",
          "folder with task files of lm-evaluation-harness, as eval/tasks")  # fmt: skip
    value(
        "--data-dir",
        options.folder,
        None,
        "DIR",
        "folder with the tasks' JSONL files; default: the hub",
    )
    value("--limit", whole(1, 10**7, "no task has more items"), None, "N",
          "only the first N items of each task")  # fmt: skip
    value("--batch-size", BATCH, 16, "N", "items (or chains) at once")
    value("--seed", SEED, 0, None, "seed of thoughts, chains and resampling")
    value("--samples", THOUGHTS, 1, "N", "thoughts of each item, whose scores are averaged")
    value("--thought-temperature", options.temperature, None, "T",
          "temperature of thoughts; without it their most likely tokens")  # fmt: skip
    options.add_thought_filters(parser)
    value("--votes", THOUGHTS, 8, "N", "chains of thought of an item (gsm8k_cot, or\n"
          "texts with --extract)")  # fmt: skip
    value("--temperature", options.temperature, 0.9, "T",
          "temperature of the chains; 0 takes the most likely tokens")  # fmt: skip
    value("--max-new-tokens", TOKENS, 384, "N", "length of a chain, before its final answer, or\n"
          "of a text with --extract")  # fmt: skip
    value("--text-tokens", whole(2, 10**6, "no model reads more"), 256, "N",
          "tokens that are read of a text, and tokens of a span of FILE.txt")  # fmt: skip
    parser.flag("--untrained", "let a plain model think, as a baseline")
    value("--out", files, None, "FILE.json",
          "figures; the same command continues an interrupted evaluation from the items\n"
          "beside it, and replaces figures and page of the same evaluation")  # fmt: skip
    value("--out-items", files, None, "FILE.jsonl",
          "scores of every item; default: FILE.items.jsonl beside --out")  # fmt: skip
    value("--report", files, None, "FILE.html", "a page with plots")
    parser.flag("--force", "replace files that exist, whatever they hold, and score all items anew")
    return parser
