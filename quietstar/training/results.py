"""What a run leaves beside its model: results.json and samples.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data import Batch
from quietstar.distributed import ModelProxy
from quietstar.model.outputs import Thoughts
from quietstar.training.answers import place_before_answer
from quietstar.training.evaluation import chosen_positions
from quietstar.training.metrics_file import METRICS_FILE, read_records
from quietstar.training.state import StageRun

RESULTS_FILE, SAMPLES_FILE = "results.json", "samples.json"
NUM_SAMPLES = 20
ACCURACIES = {
    "with_thoughts": "accuracy_with_thoughts",
    "without_thoughts": "accuracy_without_thoughts",
    "swapped_thoughts": "accuracy_swapped",
    "pause_thoughts": "accuracy_pause",
}
"""Names in results.json, and in metrics.jsonl."""


def write_results(run: StageRun, tokenizer: PreTrainedTokenizerBase, seconds: float) -> None:
    """Write both; ``seconds`` is the time of the whole run. To be called on all processes."""
    folder = Path(run.config.training.output_dir)
    shown = samples(run, tokenizer) if run.stage.thinks else None
    if not run.accelerator.is_main_process:
        return
    results = {**collect_results(run), "seconds": round(seconds, 1)}
    _write_json(folder / RESULTS_FILE, results)
    if shown is not None:
        _write_json(folder / SAMPLES_FILE, {"samples": shown})


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def collect_results(run: StageRun) -> dict[str, Any]:
    """Held-out figures at the end of the last stage; ``before`` is its start."""
    records = read_records(Path(run.config.training.output_dir) / METRICS_FILE)
    ours = [r for r in records if r["kind"] == "eval" and r["stage"] == run.stage.name]
    before, after = ours[0], ours[-1]
    results: dict[str, Any] = {"held_out": {"before": before, "after": after}}
    accuracy = {name: after[key] for name, key in ACCURACIES.items() if key in after}
    if accuracy:
        results["accuracy"] = {**accuracy, "n": len(run.eval_data)}
    if "right_thoughts" in after:
        results["right_thoughts"] = {
            "before": before.get("right_thoughts"),
            "after": after["right_thoughts"],
        }
    return results


@torch.no_grad()
def samples(run: StageRun, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Thoughts in held-out texts: before the answer, or at some place where there is none."""
    model = ModelProxy(run.model)
    found: list[dict[str, Any]] = []
    for batch in run.eval_data.batches(run.config.training.micro_batch_size):
        if len(found) >= NUM_SAMPLES:
            break
        batch = batch.to(run.accelerator.device)
        with run.accelerator.autocast():
            inputs = (batch.input_ids, batch.attention_mask, batch.labels)
            positions = chosen_positions(model, batch)
            thoughts = model.think(*inputs, positions=positions, sample_ids=batch.sample_ids)
        found += [_sample(batch, thoughts, row, tokenizer) for row in range(len(batch.input_ids))]
    return [sample for sample in found[:NUM_SAMPLES] if sample]


def _sample(
    batch: Batch, thoughts: Thoughts, row: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    place = _place(batch, thoughts, row)
    if place is None:
        return {}
    position = _position(thoughts, row, place)
    ids, tokens = batch.input_ids[row], thoughts.tokens[row, 0, place]
    steps = batch.rationale[row][batch.rationale[row] >= 0]
    is_right = (
        bool((tokens[: len(steps)] == steps).all()) if 0 < len(steps) <= len(tokens) else None
    )
    shown = _span(batch, row, position)  # positions that predict what is shown
    truth = ids[shown + 1]
    mixed, base = thoughts.next_predicted()[row, 0, shown], thoughts.base_predicted[row, shown]
    logprobs = [_logprobs(thoughts, row, int(where)) for where in shown]
    return {
        "before": tokenizer.decode(ids[: position + 1]),
        "thought": tokenizer.decode(tokens),
        "truth": tokenizer.decode(truth),
        "without_thoughts": {
            "prediction": tokenizer.decode(base),
            "probability": math.exp(sum(without for without, _ in logprobs)),
        },
        "with_thoughts": {
            "prediction": tokenizer.decode(mixed),
            "probability": math.exp(sum(mixed for _, mixed in logprobs)),
        },
        "mixing_weight": float(thoughts.mixing_weight[row, 0, place, 0]),
        "right_thought": is_right,
        "correct": bool((mixed == truth).all()),
    }


def _position(thoughts: Thoughts, row: int, place: int) -> int:
    """Text position of a place among the thoughts."""
    return place if thoughts.positions is None else int(thoughts.positions[row, place])


def _span(batch: Batch, row: int, position: int) -> Tensor:
    """Positions that predict the answer's tokens from ``position`` on, or that one alone."""
    answers = batch.answers[row]
    end = position + 1
    while end + 1 < len(answers) and bool(answers[position + 1]) and bool(answers[end + 1]):
        end += 1
    return torch.arange(position, end, device=answers.device)


def _logprobs(thoughts: Thoughts, row: int, position: int) -> tuple[float, float]:
    """Of the true next token, without and with the thought that predicts it.

    The latest thought whose lookahead reaches as far; the log-probabilities are 0 without one.
    """
    place, ahead = position, 0
    if thoughts.positions is not None:
        real = thoughts.positions[row]
        place = int(((real >= 0) & (real <= position)).sum()) - 1
        ahead = position - int(real[place])
        if place < 0 or ahead >= thoughts.base_logprobs.shape[-1]:
            return 0.0, 0.0
    without, mixed = thoughts.base_logprobs[row, place], thoughts.mixed_logprobs[row, 0, place]
    return float(without[ahead]), float(mixed[ahead])


def _place(batch: Batch, thoughts: Thoughts, row: int) -> int | None:
    """The place to show: before the answer, else one at random by the text's number."""
    places = thoughts.valid[row, :, 0].nonzero().squeeze(1)
    if len(places) == 0:
        return None
    if bool(batch.answers[row].any()):
        of_row = slice(row, row + 1)
        positions = None if thoughts.positions is None else thoughts.positions[of_row]
        return int(place_before_answer(batch.answers[of_row], positions))
    generator = torch.Generator().manual_seed(int(batch.sample_ids[row]))
    return int(places[torch.randint(len(places), (1,), generator=generator)])
