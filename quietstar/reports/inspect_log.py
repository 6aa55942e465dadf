"""Thoughts of runs and evaluations as logs of Inspect, which ``inspect view`` shows.

They are plain JSON in version 2 of the format of ``inspect_ai.log.EvalLog``, written without that
package. Who reads the header of a log stops at its samples, so the order of its keys counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from quietstar.errors import UserError, reading
from quietstar.evaluation.controls import CONTROLS, GAINS, WITH, WITHOUT, gain_over
from quietstar.evaluation.runner import Records, read_items
from quietstar.evaluation.statistics import choose_main_metric
from quietstar.reports.run_files import Answer, parse_thoughts
from quietstar.system.files import write_json
from quietstar.system.inputs import open_input
from quietstar.training.reporter import THOUGHTS_FILE
from quietstar.version import __version__

OTHERS = {"gain": WITHOUT, **{GAINS[control]: control for control in CONTROLS}}
"""Gains of the model's own thoughts, and over what."""
_REMEDY = "Give the folder of a run, or a file that quietstar eval --out has written."
Json = dict[str, Any]


def export_logs(source: Path, out: Path) -> list[Path]:
    """Write the log of a run, or of each task of an evaluation, into a folder; return their paths.

    Raises:
        UserError: The source is something else, or holds no thoughts.
    """
    where = f"--inspect-log ({source})"
    path, settings, model = source / THOUGHTS_FILE, {}, source.resolve().name
    if source.is_dir() and not path.exists():
        tasks = {}
    elif source.is_dir():
        with reading(where, _REMEDY), open_input(path) as file:
            tasks = {"thoughts": _run_samples(file.read().decode(errors="replace"))}
    elif source.suffix in (".json", ".jsonl"):
        path = source.with_suffix(".items.jsonl") if source.suffix == ".json" else source
        settings, records = read_items(path, f"{where}, {path.name}", _REMEDY)
        model, names = str(settings.get("model")), dict.fromkeys(name for name, _, _ in records)
        tasks = {name: _task_samples(records, name) for name in names}
    else:
        raise UserError(f"{where}: is neither a run nor an evaluation. {_REMEDY}")
    if not any(tasks.values()):
        raise UserError(f"{where}: holds no thoughts. {_REMEDY}")
    out.mkdir(parents=True, exist_ok=True)
    created = datetime.fromtimestamp(int(path.stat().st_mtime), timezone.utc).isoformat()
    paths = []
    for task, samples in tasks.items():
        if samples:
            log = _log(task, f"quietstar/{model}", settings, created, samples)
            name = "_".join(re.sub(r"[\W_]+", "-", part) for part in (created, task))
            paths.append(out / f"{name}_{log['eval']['task_id']}.json")
            write_json(paths[-1], log)
    return paths


def _log(task: str, model: str, settings: Json, created: str, samples: Sequence[Json]) -> Json:
    identity = json.dumps([task, model, settings, created])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]  # exported again, it replaces itself
    ids = list(dict.fromkeys(sample["id"] for sample in samples))
    means: dict[str, dict[str, list[float]]] = {}  # by score, and in a run by step
    for sample in samples:
        answer = {"role": "assistant", "content": sample.pop("content")}
        sample["messages"] = [{"role": "user", "content": sample["input"]}, answer]
        sample["output"] = {"model": model, "choices": [{"message": answer, "stop_reason": "stop"}]}
        group = "mean" if settings else f"step {sample['metadata']['step']}"
        for name, score in sample["scores"].items():
            means.setdefault(name, {}).setdefault(group, []).append(score["value"])
    scores = [
        {"name": name, "scorer": name,
         "metrics": {group: {"name": group, "value": fmean(values)}
                     for group, values in groups.items()}}
        for name, groups in means.items()
    ]  # fmt: skip
    return {
        "version": 2, "status": "success",
        "eval": {
            "eval_id": key, "run_id": key, "created": created, "task": task, "task_id": key,
            "dataset": {"name": task, "samples": len(ids), "sample_ids": ids}, "model": model,
            "config": {"epochs": max(sample["epoch"] for sample in samples)},
            "packages": {"quietstar": __version__}, "metadata": settings,
        },
        "plan": {"name": "quietstar", "steps": [], "config": {}},
        "results": {"total_samples": len(samples), "completed_samples": len(samples),
                    "scores": scores},
        "stats": {"started_at": created, "completed_at": created, "model_usage": {}},
        "samples": samples,
    }  # fmt: skip


def _run_samples(text: str) -> list[Json]:
    """Make samples of ``thoughts.jsonl``; the epoch of a text is the number of the evaluation."""
    samples = []
    for epoch, evaluation in enumerate(parse_thoughts(text), start=1):
        for number, sample in enumerate(evaluation.samples, start=1):
            answers = {name: value for name, value in sample if isinstance(value, Answer)}
            metrics = {
                variant: {
                    "accuracy": float(answer.prediction.strip() == sample.truth.strip()),
                    "gold_probability": answer.probability,
                }
                for variant, answer in answers.items()
            }
            metrics[WITH]["accuracy"] = float(sample.correct_with)
            samples.append({
                "id": number, "epoch": epoch, "input": sample.before, "target": sample.truth,
                "content": _content([sample.thought], [sample.with_thoughts.prediction]),
                "scores": _scores(metrics, "gold_probability"),
                "metadata": {"step": evaluation.step, "stage": evaluation.stage,
                             **sample.model_dump(exclude={"before", "thought", "truth"})},
            })  # fmt: skip
    return samples


def _task_samples(records: Records, task: str) -> list[Json]:
    """Make samples of a task's items; the epoch of an item is the number of the thought."""
    items: dict[int, dict[str, Json]] = {}
    values: dict[str, dict[str, list[Any]]] = {}  # of the whole task
    for (name, number, variant), record in sorted(records.items()):
        if name == task and (task, number, WITH) in records:
            items.setdefault(number, {})[variant] = record
            for metric, of_item in record["metrics"].items():
                values.setdefault(variant, {}).setdefault(metric, []).extend(of_item)
    arrays = {v: {name: np.array(x) for name, x in of_one.items()} for v, of_one in values.items()}
    main = choose_main_metric("nll", arrays) if arrays else ""
    samples = []
    for number, of_item in items.items():
        own, plain = of_item[WITH], of_item.get(WITHOUT, {})
        prompt, chains = own.get("prompt"), own.get("chains", [])
        tokens = [] if prompt else plain.get("tokens", [])
        for place, texts in enumerate(own.get("thought_texts") or [[] for _ in chains or "."]):

            def at(values: Sequence[Any], place: int = place) -> Any:
                """Take that of the thought, or the one of all thoughts."""
                return values[min(place, len(values) - 1)]

            predicted = {v: str(at(one.get("predicted") or [""])) for v, one in of_item.items()}
            follows = tokens or [*[""] * (len(texts) - 1), at(chains or [predicted[WITH]])]
            samples.append({
                "id": number + 1, "epoch": place + 1, "target": own.get("answer", ""),
                "input": prompt or own.get("answer", "").removesuffix("".join(tokens)),
                "content": _content(texts, follows),
                "scores": _scores({
                    variant: {name: at(values) for name, values in one["metrics"].items()}
                    for variant, one in of_item.items()
                }, main),
                "metadata": {"id": own.get("id"), **plain.get("groups", {}),
                             "predicted": predicted},
            })  # fmt: skip
    return samples


def _scores(metrics: Mapping[str, Mapping[str, float | None]], main: str) -> Json:
    """Make scores of the gains of own thoughts, and of every metric with each kind of thoughts."""
    scores = {
        f"{name}_{v}": value for v, of_one in metrics.items() for name, value in of_one.items()
    }
    own = metrics[WITH][main]
    for gain, other in OTHERS.items():
        value = metrics.get(other, {}).get(main)
        if own is not None and value is not None:
            scores[gain] = gain_over(own, value, main)
    return {name: {"value": value} for name, value in sorted(scores.items()) if value is not None}


def _content(thoughts: Sequence[str], follows: Sequence[str]) -> list[Json]:
    """Make the parts of a message: each thought, and the text that follows it."""
    parts = []
    for thought, text in zip_longest(thoughts, follows):
        if thought is not None:
            parts.append({"type": "reasoning", "reasoning": thought})
        if text:
            parts.append({"type": "text", "text": text})
    return parts
