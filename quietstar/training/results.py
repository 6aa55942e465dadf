"""What a run leaves beside its model: results.json and samples.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.data import Batch
from quietstar.distributed import ModelProxy
from quietstar.model.outputs import Thoughts
from quietstar.training.answers import place_before_answer
from quietstar.training.evaluation import chosen_positions
from quietstar.training.reporter import METRICS_FILE, read_records
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
    """Writes both files. To be called on all processes.

    Args:
        run: State of the last stage, at its end.
        tokenizer: Tokenizer to show texts with.
        seconds: Time of the whole run.
    """
    contents: dict[str, dict[str, Any]] = {}
    if run.stage.thinks:
        contents[SAMPLES_FILE] = {"samples": collect_samples(run, tokenizer)}
    if not run.accelerator.is_main_process:
        return
    contents[RESULTS_FILE] = {**collect_results(run), "seconds": round(seconds, 1)}
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        path = Path(run.config.training.output_dir) / name
        path.write_text(text + "\n", encoding="utf-8")


def collect_results(run: StageRun) -> dict[str, Any]:
    """Reads the last stage's held-out figures at its start (``before``) and end (``after``)."""
    records = read_records(Path(run.config.training.output_dir) / METRICS_FILE)
    of_stage = [r for r in records if r["kind"] == "eval" and r["stage"] == run.stage.name]
    before, after = of_stage[0], of_stage[-1]
    results: dict[str, Any] = {"held_out": {"before": before, "after": after}}
    accuracy = {name: after[key] for name, key in ACCURACIES.items() if key in after}
    if accuracy:
        results["accuracy"] = {**accuracy, "n": len(run.eval_data)}
    if "right_thoughts" in after:
        right = {"before": before.get("right_thoughts"), "after": after["right_thoughts"]}
        results["right_thoughts"] = right
    return results


@torch.no_grad()
def collect_samples(run: StageRun, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Shows thoughts in held-out texts: before the answer, or at a random place without one."""
    model = ModelProxy(run.model)
    samples: list[dict[str, Any] | None] = []
    for batch in run.eval_data.batches(run.config.training.micro_batch_size):
        if len(samples) >= NUM_SAMPLES:
            break
        batch = batch.to(run.accelerator.device)
        with run.accelerator.autocast():
            inputs = (batch.input_ids, batch.attention_mask, batch.labels)
            positions = chosen_positions(model, batch)
            thoughts = model.think(*inputs, positions=positions, sample_ids=batch.sample_ids)
        samples += [_sample(batch, thoughts, row, tokenizer) for row in range(len(batch.input_ids))]
    return [sample for sample in samples[:NUM_SAMPLES] if sample is not None]


def _sample(
    batch: Batch, thoughts: Thoughts, row: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any] | None:
    """Describes one thought of a text and what it predicts; None in a text without targets."""
    ids, answers = batch.input_ids[row], batch.answers[row]
    positions = None if thoughts.positions is None else thoughts.positions[row]
    places = thoughts.valid[row, :, 0].nonzero().squeeze(1)
    if len(places) == 0:
        return None
    if bool(answers.any()):
        of_row = None if positions is None else positions[None]
        place = int(place_before_answer(answers[None], of_row))
    else:
        generator = torch.Generator().manual_seed(int(batch.sample_ids[row]))
        place = int(places[torch.randint(len(places), (1,), generator=generator)])
    position = place if positions is None else int(positions[place])
    end = position + 1  # behind the positions that predict the rest of the answer, or the one alone
    while end + 1 < len(answers) and bool(answers[position + 1]) and bool(answers[end + 1]):
        end += 1
    truth = ids[position + 1 : end + 1]
    base = thoughts.base_predicted[row, position:end]
    mixed = thoughts.next_predicted()[row, 0, position:end]
    logprobs = [_logprobs(thoughts, row, where) for where in range(position, end)]
    tokens, rationale = thoughts.tokens[row, 0, place], batch.rationale[row]
    rationale = rationale[rationale >= 0]
    is_right = None
    if 0 < len(rationale) <= len(tokens):
        is_right = bool((tokens[: len(rationale)] == rationale).all())
    return {
        "before": tokenizer.decode(ids[: position + 1]),
        "thought": tokenizer.decode(tokens),
        "truth": tokenizer.decode(truth),
        "without_thoughts": {
            "prediction": tokenizer.decode(base),
            "probability": math.exp(sum(of_base for of_base, _ in logprobs)),
        },
        "with_thoughts": {
            "prediction": tokenizer.decode(mixed),
            "probability": math.exp(sum(of_mixed for _, of_mixed in logprobs)),
        },
        "mixing_weight": float(thoughts.mixing_weight[row, 0, place, 0]),
        "right_thought": is_right,
        "correct": bool((mixed == truth).all()),
    }


def _logprobs(thoughts: Thoughts, row: int, position: int) -> tuple[float, float]:
    """Returns the log-probability of the true next token, without and with a thought.

    The thought is the latest one whose lookahead reaches as far; without one both are 0.
    """
    place, ahead = position, 0
    if thoughts.positions is not None:
        positions = thoughts.positions[row]
        place = int(((positions >= 0) & (positions <= position)).sum()) - 1
        ahead = position - int(positions[place])
        if place < 0 or ahead >= thoughts.base_logprobs.shape[-1]:
            return 0.0, 0.0
    base, mixed = thoughts.base_logprobs[row, place], thoughts.mixed_logprobs[row, 0, place]
    return float(base[ahead]), float(mixed[ahead])
