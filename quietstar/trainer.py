"""Training in a few lines of Python, with the names of transformers and TRL.

The same run as that of ``quietstar train``: the trainer writes its records to a file, names it in a
config, and runs that. So ``config.yaml`` in the run's folder repeats it from the command line.
"""

from __future__ import annotations

import atexit
import hashlib
import html
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from quietstar.config import SECTIONS, Config, fields
from quietstar.config.earlier import FOREIGN
from quietstar.config.loading import load_config
from quietstar.config.starting import COUNTED, counted, default_of, format_of
from quietstar.errors import ConfigError, UserError
from quietstar.system.files import write_whole
from quietstar.system.processes import leave_launch

if TYPE_CHECKING:
    import pandas as pd

    from quietstar.model.quiet_star import QuietStarForCausalLM

RewardFunction = str | Callable[..., Any]
GIVEN = "quietstar_given"
"""Module of reward functions that no module has under their name, such as lambdas."""


class QuietStarConfig:
    """Settings of a run by the names of the config's keys.

    ``QuietStarConfig(positions="answer_start", length=48, learning_rate=1e-5)`` finds the sections;
    ``QuietStarConfig(judge={"temperature": 0.5})`` says one, as is needed for keys of ``judge`` and
    ``mixing_head`` whose names other sections have. Names of transformers and TRL that mean the
    same are taken, such as ``num_generations`` and ``num_train_epochs``.

    Args:
        config: YAML file, or the name of a shipped config, whose settings the others replace.
        settings: Keys and values.

    Raises:
        ConfigError: A name is no key.
    """

    def __init__(self, config: str | Path | None = None, /, **settings: Any) -> None:
        """Find the key of each name."""
        self.config, self.settings, self.counted = config, {}, {}
        problems = []
        for name, value in settings.items():
            if name in COUNTED:
                self.counted[name] = value
            elif name in SECTIONS and isinstance(value, Mapping):
                self.settings |= {f"{name}.{key}": entry for key, entry in value.items()}
            else:
                keys = self._keys(name)
                if len(keys) > 1:
                    problems.append(f"QuietStarConfig: {name}: is {' or '.join(keys)}; say which")
                self.settings[keys[0] if keys else name] = value
        if problems:
            raise ConfigError(problems)

    @staticmethod
    def _keys(name: str) -> list[str]:
        if name in fields():
            return [name]
        found = [key for key in fields() if key.partition(".")[2] == name]
        first = [key for key in found if key.partition(".")[0] not in ("judge", "mixing_head")]
        foreign = [FOREIGN[name]] if name in FOREIGN else []
        return first or found or [key for key in foreign if key in fields()]

    def __repr__(self) -> str:
        """Show the settings."""
        return f"QuietStarConfig({self.config!r}, {self.settings | self.counted})"


class QuietStarTrainer:
    r"""Teaches a causal LM to think before the tokens of its texts.

    Args:
        model: Folder or hub id of the model; None takes that of the config.
        args: Settings of the run.
        train_dataset: A `datasets.Dataset`, a list of records, or what ``data.train`` may name.
            Records with ``question`` and ``answer`` (or ``prompt`` and ``completion``), perhaps
            ``choices``; ``messages``; or ``text``.
        eval_dataset: The same, for evaluations; by default part of the training data.
        reward_funcs: Names of rewards, or functions ``f(prompts, completions, **columns)`` as in
            TRL, where ``completions`` is what the model writes after its thought (`of_texts` of
            `quietstar.rewards`). Several are added up.
        reward_weights: Weight of each of them, by default 1.
        formatting: Template of a question with its answer, such as
            ``"Q: {question}\nA: {answer}"``, whose names are fields of the records.

    Attributes:
        config: The whole config of the run.

    Raises:
        UserError: A mistake, in one line.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        args: QuietStarConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
        reward_weights: Sequence[int | float] | None = None,
        formatting: str | None = None,
    ) -> None:
        """Make the config of the run, and the files of its records."""
        if not isinstance(model, str | Path | None):
            raise UserError(
                f"model: must be a folder or hub id, not a {type(model).__name__}. Save it with its"
                " tokenizer, and give the folder."
            )
        args = args or QuietStarConfig()
        settings = {} if model is None else {"model.name_or_path": str(model)}
        settings |= args.settings
        output_dir = settings.get("training.output_dir", default_of("training.output_dir"))
        folder = Path(f"{output_dir}-data")
        columns: set[str] = set()
        if isinstance(eval_dataset, str | Path):
            settings["data.eval"] = str(eval_dataset)
        elif eval_dataset is not None:
            settings["data.eval"], columns, _ = _write_records(eval_dataset, folder, "data.eval")
        count = None
        if isinstance(train_dataset, str | Path):
            settings["data.train"] = str(train_dataset)
        elif train_dataset is not None:
            settings["data.train"], columns, count = _write_records(
                train_dataset, folder, "data.train"
            )
        settings |= counted(args.counted, settings, count)
        if formatting is not None or args.config is None:  # a config knows its own fields
            settings = format_of(columns, formatting) | settings
        if reward_funcs is not None:
            several = isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
            rewards: Any = reward_funcs if several else [reward_funcs]
            settings["loss.reward"] = _reward(rewards, reward_weights)
        self.config: Config = load_config(args.config, given=settings)

    def train(
        self, resume_from_checkpoint: bool | str | None = None, overwrite: bool = False
    ) -> TrainResult:
        """Train; under ``accelerate launch`` on all its processes.

        Args:
            resume_from_checkpoint: True goes on from the newest checkpoint, if there is one; or
                the folder of a checkpoint.
            overwrite: Whether to replace a run in its folder.
        """
        from quietstar.reports import write_report
        from quietstar.training.run import run_training

        atexit.register(leave_launch)  # not at the end of the run: an evaluation may follow
        resume = "auto" if resume_from_checkpoint is True else resume_from_checkpoint or None
        final = run_training(
            self.config, resume, overwrite=overwrite, on_report=write_report, more_runs=True
        )
        return TrainResult(final.parent)

    def evaluate(
        self, tasks: str | None = None, controls: bool | Sequence[str] = True, **options: Any
    ) -> EvalResult:
        """Score tasks with the trained model, with thoughts, without, and with others' thoughts.

        Args:
            tasks: As ``quietstar eval --tasks``; by default the records of ``eval_dataset``.
            controls: Whether to score controls, or which.
            options: Further options of ``quietstar eval`` (`EvalOptions`), such as ``limit=100``.

        Returns:
            On the main process of a launch; on the others without tasks.
        """
        from quietstar.evaluation.evaluate import EvalOptions, Evaluation
        from quietstar.evaluation.runner import ItemStore
        from quietstar.system.processes import join_launch

        tasks = tasks or self.config.data.eval
        if tasks is None:
            raise UserError("tasks: names nothing, and there is no eval_dataset. Give one of them.")
        run = Path(self.config.training.output_dir)
        if not (run / "final").exists():
            raise UserError(f"evaluate: there is no model in {run / 'final'}. Call train() first.")
        if tasks.endswith(".jsonl"):
            options = {"config": str(run / "config.yaml"), **options}
        given = {"model": str(run / "final"), "tasks": tasks, "controls": controls, **options}
        evaluation = Evaluation(EvalOptions.of(given))
        processes = join_launch(evaluation.options.device)
        return EvalResult(evaluation.run(ItemStore(None, evaluation.config), processes)["tasks"])


@dataclass(frozen=True)
class TrainResult:
    """What a run has left in its folder."""

    folder: Path

    @cached_property
    def model(self) -> QuietStarForCausalLM:
        """The trained model."""
        from quietstar.model.quiet_star import QuietStarForCausalLM

        return QuietStarForCausalLM.from_pretrained(str(self.folder / "final"))

    @property
    def metrics(self) -> dict[str, Any]:
        """The last held-out evaluation, by the names of docs/metrics.md."""
        return [record for record in self.log_history if record.get("kind") == "eval"][-1]

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl."""
        from quietstar.training.reporter import METRICS_FILE, read_metrics

        return read_metrics(self.folder / METRICS_FILE)[0]

    def frame(self) -> pd.DataFrame:
        """Return the records as a data frame, one a row."""
        import pandas as pd

        return pd.DataFrame(self.log_history)

    def _repr_html_(self) -> str:
        """Show the run's page in a notebook."""
        page = html.escape((self.folder / "report.html").read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 50em; border: 0"></iframe>'


@dataclass(frozen=True)
class EvalResult:
    """What ``quietstar eval`` finds: ``tasks`` by name, as in its ``--out`` file."""

    tasks: dict[str, Any]

    def frame(self) -> pd.DataFrame:
        """Return a row for every task and variant, with the means of its metrics."""
        import pandas as pd

        from quietstar.evaluation.controls import WITH, WITHOUT

        rows = []
        for name, task in self.tasks.items():
            plain = {key: task[key] for key in (WITHOUT, WITH) if key in task}
            for variant, scores in (plain | task.get("controls", {})).items():
                numbers = {key: x for key, x in scores.items() if f"{key}_stderr" in scores}
                rows.append({"task": name, "variant": variant, "n": task["n"], **numbers})
        return pd.DataFrame(rows)


# --- From arguments to keys -----------------------------------------------------------------------
def _write_records(data: Iterable[Any], folder: Path, key: str) -> tuple[str, set[str], int]:
    """Write records to a file that is named by their content, on one process of each machine.

    Returns the name, the names of fields that all records have, and the number of records.
    """
    rows = [dict(row) for row in data]
    if not rows:
        raise UserError(f"{key}: holds no record. Give at least two.")
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = folder / f"{key.partition('.')[2]}-{digest}.jsonl"
    if os.environ.get("LOCAL_RANK", "0") == "0" and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    while not path.exists():
        time.sleep(0.1)
    return str(path), set.intersection(*(set(row) for row in rows)), len(rows)


def _reward(functions: Sequence[RewardFunction], weights: Sequence[int | float] | None) -> str:
    """Name one reward or several with weights, as ``loss.reward`` does."""
    if weights is not None and len(weights) != len(functions):
        raise UserError(
            f"reward_weights: are {len(weights)}, but there are {len(functions)} reward_funcs. "
            "Give one for each."
        )
    names = [one if isinstance(one, str) else _name_of(one) for one in functions]
    if weights is None:
        return " + ".join(names)
    return " + ".join(f"{weight}*{name}" for weight, name in zip(weights, names, strict=True))


def _name_of(function: Callable[..., Any]) -> str:
    """Return the ``module:name`` by which the registry finds a function."""
    name = getattr(function, "__name__", type(function).__name__)
    module = getattr(function, "__module__", "")
    is_named = all(part.isidentifier() for part in module.split("."))  # as runpy's are not
    if is_named and getattr(sys.modules.get(module), name, None) is function:
        return f"{module}:{name}"
    given = sys.modules.setdefault(GIVEN, ModuleType(GIVEN))
    name = name if name.isidentifier() else "reward"
    while getattr(given, name, function) is not function:
        name += "_"
    setattr(given, name, function)
    return f"{GIVEN}:{name}"
