"""An evaluation: tasks, scored with and without thoughts and with controls, paired item by item."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, ValidationError

from quietstar.config import Config, DataConfig
from quietstar.config.loading import is_of_run, load_config
from quietstar.config.messages import closest, did_you_mean
from quietstar.config.options import (
    BatchSize,
    Folder,
    ModelOptions,
    Name,
    Pattern,
    Probability,
    Seed,
    Temperature,
    Thoughts,
    Tokens,
    UnicodeText,
    option_of,
    shown,
)  # fmt: skip
from quietstar.data.encoding import split_template
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation.controls import CONTROLS, GENERIC, GENERIC_TEXT, WITH, WITHOUT
from quietstar.evaluation.runner import (
    FREE_SETTINGS,
    HarnessTask,
    ItemStore,
    Runner,
    find_harness_task,
)  # fmt: skip
from quietstar.evaluation.scoring import Protocol, fingerprint, load_onto_device
from quietstar.evaluation.statistics import correct_for_many, summarise
from quietstar.evaluation.tasks import TASKS, TEXT_FILES, Task, find_task
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.saving import SETTINGS_FILE
from quietstar.registry import trusting
from quietstar.sampling.positions import MARKED_RULES
from quietstar.system.processes import Processes
from quietstar.system.progress import progress
from quietstar.version import __version__

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "peft", "scipy")
QUESTION_FIELDS = ("template", "question_field", "answer_field")
"""Keys of ``data`` in a config that are options here."""


def _split(value: Any) -> Any:
    """Split names that the command line joins by commas."""
    return [*filter(None, map(str.strip, value.split(",")))] if isinstance(value, str) else value


def _task_names(value: Any) -> Any:
    names = _split(value)
    if not names:
        raise ValueError(f"names none; known: {', '.join(TASKS)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} is given twice; remove one")
    return names


def _controls(value: Any) -> Any:
    """Take names of controls, in whatever order, in the order of `CONTROLS`; True for all."""
    names = CONTROLS if value is True else _split(value) or ()
    if unknown := [name for name in names if name not in CONTROLS]:
        hint = did_you_mean(closest(unknown[0], CONTROLS)) or f"; choose from {', '.join(CONTROLS)}"
        raise ValueError(f"no such control{hint}")
    return tuple(name for name in CONTROLS if name in names)


class EvalOptions(ModelOptions):
    """How tasks are scored."""

    model: Annotated[Name, shown("DIR")]
    """Folder of a saved Quiet-STaR model, of the run that trained it, or of a plain causal LM."""
    tasks: Annotated[tuple[str, ...], BeforeValidator(_task_names), shown("NAMES")]
    """Comma-separated: gsm8k, gsm8k_solution, gsm8k_cot, commonsense_qa, demo, FILE.jsonl,
    FILE.txt, or tasks of lm-evaluation-harness."""
    thoughts: Literal["off", "on", "both"] = "both"
    """What is scored."""
    controls: Annotated[
        tuple[str, ...], BeforeValidator(_controls), shown("NAMES", nargs="?", const=True)
    ] = ()  # fmt: skip
    """Also score controls: swapped, shuffled, pause, generic, blank (comma-separated), or without
    names all of them."""
    generic: UnicodeText = GENERIC_TEXT
    """Text of every thought in the control of that name."""
    positions: Literal["trained", "once", "every"] = "trained"
    """Think about an answer as trained (once before it, if trained with thoughts.positions
    answer_start, and otherwise before each of its tokens), once, or before every one of its
    tokens."""
    separator: UnicodeText = ""
    """Text between prompt and answer of FILE.jsonl; default: none."""
    config: Annotated[str | None, shown("FILE")] = None
    """Config of a training, whose data section says how records of FILE.jsonl become questions and
    answers, where the next three options do not; with --untrained, also how the model thinks
    (thoughts and mixing_head)."""
    template: UnicodeText | None = None
    """What joins the question and the answer of a record of FILE.jsonl, as data.template in
    training, such as 'Q: {question}\\nA: {answer}'."""
    question_field: Annotated[UnicodeText | None, shown("FIELD")] = None
    """Field of the question there, or a Jinja template of the record's fields."""
    answer_field: Annotated[UnicodeText | None, shown("FIELD")] = None
    """The same for the answer."""
    extract: Pattern | None = None
    """Generate after the prompts of FILE.jsonl, and compare the last match in the text (its first
    group, if it has one) with the answer."""
    stop: UnicodeText | None = None
    """Text that ends what is generated with --extract."""
    include_path: Folder | None = None
    """Folder with task files of lm-evaluation-harness, as eval/tasks."""
    data_dir: Folder | None = None
    """Folder with the tasks' JSONL files; default: the hub."""
    limit: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """Only the first N items of each task."""
    batch_size: BatchSize = 16
    """Items (or chains) at once."""
    seed: Seed = 0
    """Seed of thoughts, chains and resampling."""
    samples: Thoughts = 1
    """Thoughts of each item, whose scores are averaged."""
    thought_temperature: Temperature | None = None
    """Temperature of thoughts; without it their most likely tokens."""
    thought_top_p: Probability | None = None
    """Sample thoughts from the most likely tokens that reach this probability."""
    thought_top_k: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Sample thoughts from this many of the most likely tokens."""
    votes: Thoughts = 8
    """Chains of thought of an item (gsm8k_cot, or texts with --extract)."""
    temperature: Temperature = 0.9
    """Temperature of the chains; 0 takes the most likely tokens."""
    max_new_tokens: Tokens = 384
    """Length of a chain, before its final answer, or of a text with --extract."""
    text_tokens: Annotated[int, Field(ge=2, le=10**6)] = 256
    """Tokens that are read of a text, and tokens of a span of FILE.txt."""
    untrained: bool = False
    """Let a plain model think, as a baseline."""


class Evaluation:
    """Tasks and how they are scored, with all that can be wrong told before a model is loaded.

    Attributes:
        options: What is scored, by which model and how, as they were given.
        tasks: Ours and those of lm-evaluation-harness, in order.
        items: Those of each task of ours, by its name.
        protocol: What `Runner` needs.
        config: What decides the scores of an item: items of other settings are not mixed in.

    Raises:
        UserError: Options do not go together, or a task cannot be read.
    """

    def __init__(self, options: EvalOptions) -> None:
        self.options = options
        trained = None
        if options.config is not None:
            with trusting(not is_of_run(options.config)):  # else a run's own reward is looked for
                trained = list(load_config(options.config).stage_configs().values())[-1]
        data = _question_fields(options, trained)
        self.tasks: list[Task | HarnessTask] = [
            find_task(name, options.separator, options.extract, data)
            or find_harness_task(name, options.include_path)
            for name in options.tasks
        ]
        self.protocol = _protocol(options)
        self.own = [task for task in self.tasks if isinstance(task, Task)]
        tokenizer = None
        if any(task.file is not None and task.file.endswith(TEXT_FILES) for task in self.own):
            tokenizer = self._load_tokenizer()
        self.data_dir = None if options.data_dir is None else Path(options.data_dir)
        self.items = {
            task.name: task.items(self.data_dir, options.limit, tokenizer, options.text_tokens)
            for task in self.own
        }
        protocol = asdict(self.protocol)
        self.config: dict[str, Any] = {
            "model": options.model, "weights": fingerprint(options.model), "dtype": options.dtype,
            "data_dir": options.data_dir, "limit": options.limit, "untrained": options.untrained,
            "extract": options.extract,
            **{key: value for key, value in protocol.items() if key not in FREE_SETTINGS},
        }  # fmt: skip
        if data is not None:
            self.config |= {key: getattr(data, key) for key in QUESTION_FIELDS}
        self._sections = None
        if trained is not None and options.untrained:
            self._sections = {"thoughts": trained.thoughts, "mixing_head": trained.mixing_head}
            self.config["thinks"] = {
                k: section.model_dump() for k, section in self._sections.items()
            }
            if self.has_harness:
                raise UserError(
                    "--config: with --untrained says how the model thinks, which tasks of "
                    "lm-evaluation-harness do not read. Evaluate them apart, without it."
                )

    @property
    def has_harness(self) -> bool:
        """Whether tasks of lm-evaluation-harness are among them."""
        return len(self.own) < len(self.tasks)

    @property
    def files(self) -> dict[str, Path]:
        """What is read in addition to what options name."""
        folder = self.data_dir or Path()
        return {f"the file of {task.name}": folder / task.file for task in self.own if task.file}

    def _load_tokenizer(self) -> Any:
        trust = self.options.trust_remote_code
        return load_tokenizer(self.options.model, trust_remote_code=trust)

    def idle_options(self) -> dict[str, str | None]:
        """Say of options why they change nothing in the scores of these tasks, if they do not."""

        def unless(has_effect: Any, reason: str) -> str | None:
            return None if has_effect else reason

        options, own = self.options, self.own
        thinks = options.thoughts != "off"
        reads = self.has_harness or any(task.file not in (None, task.name) for task in own)
        generated = any(task.kind == "votes" for task in own)
        votes = unless(generated, "without gsm8k_cot or --extract")
        extracted = any(task.extract is not None for task in own)
        thoughts = unless(thinks, "with --thoughts off")
        greedy = unless(options.thought_temperature, "where thoughts are their most likely tokens")
        separates = any(
            item.prompt for task in own if task.file == task.name for item in self.items[task.name]
        )
        has_texts = any(not item.prompt for task in own for item in self.items[task.name])
        is_trained = (Path(options.model) / SETTINGS_FILE).exists()
        has_own = any(task.name.endswith(".jsonl") for task in own)
        records = "without a FILE.jsonl"
        controls = "without --controls" + (" generic" if options.controls else "")
        return {
            **dict.fromkeys(("--votes", "--temperature", "--max-new-tokens"), votes),
            **dict.fromkeys(("--samples", "--thought-temperature", "--positions"), thoughts),
            **dict.fromkeys(("--thought-top-p", "--thought-top-k"), thoughts or greedy),
            "--extract": unless(extracted, records),
            "--stop": unless(extracted, "without --extract and a FILE.jsonl"),
            **dict.fromkeys(map(option_of, QUESTION_FIELDS), unless(has_own, records)),
            "--config": unless(
                has_own or options.untrained, "without a FILE.jsonl or --untrained"
            ),
            "--generic": unless(GENERIC in options.controls, controls),
            "--untrained": thoughts
            or unless(not is_trained, "on a model that was trained to think"),
            "--data-dir": unless(reads, "on tasks without a file there"),
            "--include-path": unless(
                self.has_harness, "without a task of lm-evaluation-harness"
            ),
            "--separator": unless(separates, "without a prompt in a FILE.jsonl"),
            "--text-tokens": unless(has_texts, "without a text that has no prompt"),
        }  # fmt: skip

    def run(self, store: ItemStore, processes: Processes) -> dict[str, Any]:
        """Score what the store does not hold yet.

        Returns:
            ``tasks`` by name, ``config`` and ``environment``; without tasks on processes other
            than the main one.
        """
        options, protocol = self.options, self.protocol
        if self.has_harness and processes.count > 1:
            raise UserError(
                "--tasks: those of lm-evaluation-harness run in one process. Leave accelerate "
                "launch out, or evaluate them apart."
            )
        model = self._load_model()
        environment, results = _environment(model) | {"processes": processes.count}, {}
        runner = Runner(model, self._load_tokenizer(), protocol, store, processes)
        for task in self.own:
            items = self.items[task.name]
            batches = runner.num_batches(task, items)
            with progress(task.name, batches, keep=True, shown=processes.is_main) as advance:
                num_cut = runner.run(task, items, advance)
            if processes.is_main:
                results[task.name] = summarise(
                    task, store, protocol.variants, len(items), num_cut, protocol.seed
                )
        del runner, model
        if not processes.is_main:
            return {"tasks": {}}
        arguments = {"pretrained": options.model, "dtype": options.dtype, "device": options.device,
                     "device_map": options.device_map, "untrained": options.untrained}  # fmt: skip
        for task in self.tasks:
            if isinstance(task, HarnessTask):
                count = task.run(arguments, protocol, options.limit, options.data_dir, store)
                results[task.name] = summarise(
                    task, store, protocol.variants, count, 0, protocol.seed
                )
        config = {
            **self.config, "variants": list(protocol.variants), "batch_size": options.batch_size,
        }  # fmt: skip
        results = {task.name: results[task.name] for task in self.tasks}
        correct_for_many(results)
        return {"tasks": results, "config": config, "environment": environment}

    def _load_model(self) -> QuietStarForCausalLM:
        options, protocol = self.options, self.protocol
        model = load_onto_device(
            options.model, WITH in protocol.variants and not options.untrained, options.dtype,
            "Set --thoughts off, or --untrained for a baseline of thoughts never trained.",
            device=options.device, device_map=options.device_map, positions=protocol.positions,
            sections=self._sections, trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        if "shuffled" in protocol.variants and model.thoughts.length < 2:
            raise UserError("--controls: thoughts of one token cannot be shuffled; leave it out")
        rule, is_trained = model.thoughts.positions, protocol.positions == "trained"
        if rule in MARKED_RULES and is_trained and WITH in protocol.variants:
            logger.warning(
                "--model (%s): was trained with thoughts.positions: %s, but answers are thought "
                "about before each of their tokens", options.model, rule,
            )  # fmt: skip
        return model


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


def _protocol(options: EvalOptions) -> Protocol:
    temperature = options.thought_temperature or None
    if options.thoughts != "off" and options.samples > 1 and temperature is None:
        raise UserError(
            f"--samples ({options.samples}): greedy thoughts are all identical; set "
            "--thought-temperature 1"
        )
    if options.controls and options.thoughts == "off":
        raise UserError("--controls: need thoughts; set --thoughts both")
    variants: Sequence[str] = {"off": [WITHOUT], "on": [WITH], "both": [WITHOUT, WITH]}[
        options.thoughts
    ]
    same = ("batch_size", "samples", "thought_top_p", "thought_top_k", "seed", "votes",
            "temperature", "max_new_tokens", "text_tokens", "positions", "separator", "stop",
            "generic")  # fmt: skip
    return Protocol(
        variants=(*variants, *options.controls),
        thought_temperature=temperature,
        **{name: getattr(options, name) for name in same},
    )


def _question_fields(options: EvalOptions, trained: Config | None) -> DataConfig | None:
    """Read how records become questions and answers, if an option or ``--config`` says so."""
    values = {key: getattr(options, key) for key in QUESTION_FIELDS}
    given = {key: value for key, value in values.items() if value is not None}
    has_questions = trained is not None and trained.data.format == "qa"
    if not given and (trained is None or (options.untrained and not has_questions)):
        return None
    if options.separator:
        raise UserError("--separator: a --template says what separates them; leave one out")
    if "template" in given:
        given["template"] = given["template"].replace("\\n", "\n")  # which no shell writes
    if trained is not None and not has_questions and not options.untrained:
        raise UserError(
            f"--config ({options.config}): has data.format: {trained.data.format}, whose records "
            "have no question and answer. Leave it out."
        )
    if trained is not None and has_questions:
        given = {key: getattr(trained.data, key) for key in QUESTION_FIELDS} | given
    try:
        data = DataConfig(format="qa", **given)
        split_template(data.template)
    except ValidationError as problem:
        error = problem.errors()[0]
        key, rule = str(error["loc"][0]), error["msg"].removeprefix("Value error, ")
        raise UserError(f"{option_of(key)} ({given[key]}): {rule}") from problem
    except UserError as problem:
        raise UserError(str(problem).replace("data.template", "--template")) from problem
    return data
