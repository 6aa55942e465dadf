"""Tasks of lm-evaluation-harness in ``quietstar eval``: paired item by item like our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar.config.messages import closest, did_you_mean
from quietstar.errors import UserError
from quietstar.evaluation.controls import WITH, WITHOUT
from quietstar.evaluation.runner import ItemStore
from quietstar.evaluation.scoring import Protocol
from quietstar.evaluation.tasks import TASKS


@dataclass(frozen=True)
class HarnessTask:
    """A task, or a group of tasks, of the harness.

    Attributes:
        name: Name that the harness knows it by.
        include: Folder with task files of the user's own.
    """

    name: str
    include: str | None = None
    kind = "harness"
    main_metric = ""

    def run(
        self,
        args: Mapping[str, Any],
        protocol: Protocol,
        limit: int | None,
        data_dir: str | None,
        store: ItemStore,
    ) -> int:
        """Score all items in every variant that is not finished yet.

        Args:
            args: Arguments of the model class: ``pretrained``, ``dtype``, ``device``,
                ``untrained``.
            protocol: Variants, thoughts, batch size.
            limit: Number of items of each task of a group; None scores all.
            data_dir: Folder for tasks that read files (``metadata``).
            store: Store that gets the records.

        Returns:
            Number of items.
        """
        count = 0
        for variant in (WITHOUT, WITH):
            if variant not in protocol.variants:
                continue
            if not store.has(self.name, [0], [variant]):
                samples = self._samples(args, protocol, variant, limit, data_dir)
                store.add(_records(self.name, variant, samples))
            count = sum(1 for task, _, v in store.records if (task, v) == (self.name, variant))
        return count

    def _samples(
        self,
        args: Mapping[str, Any],
        protocol: Protocol,
        variant: str,
        limit: int | None,
        data_dir: str | None,
    ) -> Sequence[Mapping[str, Any]]:
        from lm_eval import evaluator

        from quietstar.evaluation import harness

        model_class: Any = harness.QuietStarLM  # the harness's decorators hide their types
        evaluate: Any = evaluator.simple_evaluate
        model = model_class(
            thoughts="on" if variant == WITH else "off",
            num_thoughts=protocol.samples, thought_temperature=protocol.thought_temperature,
            seed=protocol.seed, positions=protocol.positions, batch_size=protocol.batch_size,
            **args,
        )  # fmt: skip
        results = evaluate(
            model=model, tasks=[self.name], limit=limit, log_samples=True, bootstrap_iters=0,
            task_manager=_manager(self.include, data_dir),
        )  # fmt: skip
        return [
            sample
            for _, samples in sorted(results["samples"].items())
            for sample in sorted(samples, key=lambda s: (s["doc_id"], str(s.get("filter"))))
        ]


def _records(task: str, variant: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Make a record of each item; a metric that is no number of a single item is left out."""
    records = []
    for number, sample in enumerate(samples):
        values = {name: sample[name] for name in sample["metrics"]}
        metrics = {k: [float(v)] for k, v in values.items() if isinstance(v, int | float | bool)}
        records.append({
            "task": task, "item": number, "variant": variant, "id": str(sample["doc_id"]),
            "answer": str(sample["target"]), "predicted": _plain(sample["filtered_resps"]),
            "metrics": metrics,
        })  # fmt: skip
    if not records or not records[0]["metrics"]:
        raise UserError(
            f"--tasks: {task} has no metric of single items, so nothing can be paired; run it with "
            "quietstar lm-eval"
        )
    return records


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _manager(include: str | None, data_dir: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    metadata: Any = {} if data_dir is None else {"data_dir": data_dir}
    return TaskManager(include_path=include, metadata=metadata)


def find_harness_task(name: str, include: str | None) -> HarnessTask:
    """Find a task of the harness by its name.

    Raises:
        UserError: The harness has no such task, or is not installed.
    """
    if include is not None and not Path(include).is_dir():
        raise UserError(f"--include-path: there is no folder {include}")
    try:
        known = list(_manager(include, None).all_tasks)
    except ImportError:
        known = []
    if name in known:
        return HarnessTask(name, include)
    meant = did_you_mean(closest(name, [*TASKS, *known]))
    harness = "those of lm-evaluation-harness" if known else (
        "with pip install 'quietstar[lm-eval]' those of lm-evaluation-harness"
    )  # fmt: skip
    raise UserError(
        f"--tasks: there is no task {name}{meant}; known: {', '.join(TASKS)}, FILE.jsonl with "
        f"prompt and answer, or text, FILE.txt, and {harness}"
    )
