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
from quietstar.evaluation.controls import GAINS, WITH, WITHOUT, gain_over
from quietstar.evaluation.runner import Records, read_items
from quietstar.evaluation.statistics import choose_main_metric
from quietstar.reports.run_files import Answer, Samples, read_lines
from quietstar.system.files import write_json
from quietstar.system.inputs import open_input
from quietstar.training.reporter import THOUGHTS_FILE
from quietstar.version import __version__

OTHERS = {"gain": WITHOUT, **{gain: control for control, gain in GAINS.items()}}
"""Gains of the model's own thoughts, and over what."""
_REMEDY = "Give the folder of a run, or a file that quietstar eval --out has written."
Json = dict[str, Any]


def export_logs(source: Path, out: Path) -> list[Path]:
    """Write the log of a run, or of each task of an evaluation, into a folder; return their paths.

    Raises:
        UserError: The source is something else, or holds no thoughts.
    """
    where, path, settings = f"--inspect-log ({source})", source / THOUGHTS_FILE, {}
    if source.is_dir() and not path.exists():
        tasks = {}
    elif source.is_dir():
        with reading(where, _REMEDY), open_input(path) as file:
            tasks = {"thoughts": _run_samples(file.read().decode(errors="replace"))}
    elif source.suffix in (".json", ".jsonl"):
        path = source.with_suffix(".items.jsonl") if source.suffix == ".json" else source
        settings, records = read_items(path, f"{where}, {path.name}", _REMEDY)
        names = dict.fromkeys(name for name, _, variant in records if variant == WITH)
        tasks = {name: _task_samples(records, name) for name in names}
    else:
        raise UserError(f"{where}: is neither a run nor an evaluation. {_REMEDY}")
    if not any(tasks.values()):
        raise UserError(f"{where}: holds no thoughts. {_REMEDY}")
    out.mkdir(parents=True, exist_ok=True)
    created = datetime.fromtimestamp(int(path.stat().st_mtime), timezone.utc).isoformat()
    paths = []
    for task, samples in tasks.items():
        log = _log(task, str(settings.get("model", source)), settings, created, samples)
        name = "_".join(re.sub(r"[\W_]+", "-", part) for part in (created, Path(task).name))
        paths.append(out / f"{name}_{log['eval']['task_id']}.json")
        write_json(paths[-1], log)
    return paths


def _log(task: str, model: str, settings: Json, created: str, samples: Sequence[Json]) -> Json:
    identity = json.dumps([task, model, settings, created])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]  # exported again, it replaces itself
    ids = list(dict.fromkeys(sample["id"] for sample in samples))
    means: dict[str, dict[str, list[float]]] = {}  # by score and group
    for sample in samples:
        group = sample.pop("group")
        answer = {"role": "assistant", "content": sample.pop("content")}
        sample["messages"] = [{"role": "user", "content": sample["input"]}, answer]
        sample["output"] = {"model": model, "choices": [{"message": answer, "stop_reason": "stop"}]}
        for name, score in sample["scores"].items():
            means.setdefault(name, {}).setdefault(group, []).append(score["value"])
    scores = [
        {"name": name, "scorer": name,
         "metrics": {group: {"name": group, "value": fmean(x)} for group, x in groups.items()}}
        for name, groups in means.items()
    ]  # fmt: skip
    counts = dict.fromkeys(("total_samples", "completed_samples"), len(samples))
    return {
        "version": 2, "status": "success",
        "eval": {
            "eval_id": key, "run_id": key, "created": created, "task": task, "task_id": key,
            "dataset": {"name": task, "samples": len(ids), "sample_ids": ids}, "model": model,
            "config": {"epochs": max(sample["epoch"] for sample in samples)},
            "packages": {"quietstar": __version__}, "metadata": settings,
        },
        "plan": {"name": "quietstar", "steps": [], "config": {}},
        "results": {**counts, "scores": scores},
        "stats": {"started_at": created, "completed_at": created, "model_usage": {}},
        "samples": samples,
    }  # fmt: skip


def _run_samples(text: str) -> list[Json]:
    """Make samples of ``thoughts.jsonl``; the epoch of a text is the number of the evaluation."""
    samples = []
    evaluations = [one for one in read_lines(text, Samples) if one.samples]
    for epoch, evaluation in enumerate(evaluations, start=1):
        for number, sample in enumerate(evaluation.samples, start=1):
            answers = {name: value for name, value in sample if isinstance(value, Answer)}
            predicted = {variant: answer.prediction for variant, answer in answers.items()}
            metrics: dict[str, dict[str, float | None]] = {
                variant: {"accuracy": float(answer.prediction.strip() == sample.truth.strip()),
                          "gold_probability": answer.probability}
                for variant, answer in answers.items()
            }  # fmt: skip
            metrics[WITH]["accuracy"] = float(sample.correct_with)
            samples.append({
                "id": number, "epoch": epoch, "input": sample.before, "target": sample.truth,
                "content": _content([sample.thought], [predicted[WITH]]),
                "scores": _scores(metrics, predicted, "gold_probability"),
                "metadata": {"step": evaluation.step, "stage": evaluation.stage,
                             **sample.model_dump(exclude={"before", "thought", "truth"})},
                "group": f"step {evaluation.step}",
            })  # fmt: skip
    return samples


def _task_samples(records: Records, task: str) -> list[Json]:
    """Make samples of a task's items; the epoch of an item is the number of the thought."""
    owns = {key[1]: one for key, one in records.items() if (key[0], key[2]) == (task, WITH)}
    values = {name: np.array([own["metrics"][name] for own in owns.values()])
              for name in next(iter(owns.values()))["metrics"]}  # fmt: skip
    main, samples = choose_main_metric("nll", {WITH: values}), []
    for number, own in sorted(owns.items()):
        of_item = {v: records[task, number, v] for v in (WITH, *OTHERS.values())
                   if (task, number, v) in records}  # fmt: skip
        plain, prompt = of_item.get(WITHOUT, {}), own.get("prompt")
        answer, chains = own.get("answer", ""), own.get("chains", [])
        tokens = [] if prompt else plain.get("tokens", [])
        for place, texts in enumerate(own.get("thought_texts") or [[] for _ in chains or "."]):

            def at(several: Sequence[Any], place: int = place) -> Any:
                """Take that of the thought, or what is the same for all."""
                return several[min(place, len(several) - 1)]

            predicted = {v: at(one.get("predicted") or [""]) for v, one in of_item.items()}
            metrics = {variant: {name: at(values) for name, values in one["metrics"].items()}
                       for variant, one in of_item.items()}  # fmt: skip
            follows = tokens or [*[""] * (len(texts) - 1), at(chains or [str(predicted[WITH])])]
            samples.append({
                "id": number + 1, "epoch": place + 1, "input": prompt or answer, "target": answer,
                "content": _content(texts, follows), "scores": _scores(metrics, predicted, main),
                "metadata": {"id": own.get("id"), **plain.get("groups", {}), "metrics": metrics},
                "group": "mean",
            })  # fmt: skip
    return samples


def _scores(metrics: Mapping[str, Any], predicted: Mapping[str, Any], main: str) -> Json:
    """Make scores of what own thoughts gain, and of two metrics with each kind of thoughts."""
    own, scores = metrics[WITH][main], []
    for gain, other in OTHERS.items():
        value = metrics.get(other, {}).get(main)
        if own is not None and value is not None:
            scores.append((gain, WITH, gain_over(own, value, main)))
    for name in dict.fromkeys(("accuracy", main)):
        scores += [(f"{name}_{variant}", variant, of_one.get(name))
                   for variant, of_one in metrics.items()]  # fmt: skip
    return {
        name: {
            "value": float(f"{value:.5g}"),
            "answer": str(predicted[variant]),
            "explanation": f"gains are in {main}",
        }
        for name, variant, value in scores
        if value is not None
    }


def _content(thoughts: Sequence[str], follows: Sequence[str]) -> list[Json]:
    """Make the parts of a message: each thought, and the text that follows it."""
    parts: list[Json] = []
    for thought, text in zip_longest(thoughts, follows):
        parts += [{"type": "reasoning", "reasoning": thought}] if thought is not None else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts
