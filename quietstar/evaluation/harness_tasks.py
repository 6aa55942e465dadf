"""Tasks of lm-evaluation-harness in ``quietstar eval``: paired item by item like our own."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    """A task, or a group of tasks, of the harness."""

    name: str  # that the harness knows it by
    include: str | None = None  # folder with task files of the user's own
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
        """Score all items in every variant that is not finished yet; returns their number.

        Args:
            args: Arguments of the model class: ``pretrained``, ``dtype``, ``device``,
                ``untrained``.
            protocol: Variants, thoughts, batch size.
            limit: Number of items of each task of a group; None scores all.
            data_dir: Folder for tasks that read files (``metadata``).
            store: Store that gets the records.

        Raises:
            UserError: The task has no metric of single items.
        """
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager

        from quietstar.evaluation import harness

        model_class: Any = harness.QuietStarLM  # the harness's decorators hide their types
        evaluate: Any = evaluator.simple_evaluate
        metadata: Any = {} if data_dir is None else {"data_dir": data_dir}
        variants = [variant for variant in (WITHOUT, WITH) if variant in protocol.variants]
        for variant in variants:
            if store.has(self.name, [0], [variant]):
                continue
            model = model_class(
                thoughts="on" if variant == WITH else "off",
                num_thoughts=protocol.samples, thought_temperature=protocol.thought_temperature,
                seed=protocol.seed, positions=protocol.positions, batch_size=protocol.batch_size,
                **args,
            )  # fmt: skip
            results = evaluate(
                model=model, tasks=[self.name], limit=limit, log_samples=True, bootstrap_iters=0,
                task_manager=TaskManager(include_path=self.include, metadata=metadata),
            )  # fmt: skip
            samples = [
                sample
                for _, of_task in sorted(results["samples"].items())
                for sample in sorted(of_task, key=lambda s: (s["doc_id"], str(s.get("filter"))))
            ]
            records = [_record(self.name, variant, *pair) for pair in enumerate(samples)]
            if not records or not records[0]["metrics"]:
                raise UserError(
                    f"--tasks: {self.name} has no metric of single items, so nothing can be "
                    "paired; run it with quietstar lm-eval"
                )
            store.add(records)
        return sum(key[0] == self.name and key[2] == variants[-1] for key in store.records)


def _record(task: str, variant: str, number: int, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Make the record of an item; a metric that is no number of a single item is left out."""
    values = {name: sample[name] for name in sample["metrics"]}
    return {
        "task": task, "item": number, "variant": variant, "id": str(sample["doc_id"]),
        "answer": str(sample["target"]),
        "predicted": json.loads(json.dumps(sample["filtered_resps"], default=str)),
        "metrics": {k: [float(v)] for k, v in values.items() if isinstance(v, int | float | bool)},
    }  # fmt: skip


def find_harness_task(name: str, include: str | None) -> HarnessTask:
    """Find a task of the harness by its name.

    Raises:
        UserError: The harness has no such task, or is not installed.
    """
    if include is not None and not Path(include).is_dir():
        raise UserError(f"--include-path: there is no folder {include}")
    try:
        from lm_eval.tasks import TaskManager

        known = list(TaskManager(include_path=include).all_tasks)
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
