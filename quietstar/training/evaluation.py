"""Held-out evaluation: the gain of thinking, and how much of it comes from what thoughts say.

Greedy thoughts at every position that `thoughts.positions` takes; then the same texts with thoughts
swapped, and with a constant pause token in place of every thought token (`evaluation.controls`).
A second read-out of the text gives a gain with any thoughts at all; only what swapped thoughts lose
is content. Thoughts are swapped among texts where all have answers, within each text otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from quietstar.data import Batch
from quietstar.distributed import ModelProxy
from quietstar.evaluation.controls import (
    GAINS,
    PAUSE,
    SWAPPED,
    TextThoughts,
    gain_over,
    pause_tokens,
    plan_swap,
)
from quietstar.model.metrics import ThoughtMetrics, as_metrics
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.training.answers import (
    place_before_answer,
    right_answers,
    right_thoughts,
)
from quietstar.training.state import StageRun

Thinker = QuietStarForCausalLM | ModelProxy
"""A model, or one behind its strategy's wrapper."""

CONTROLS = (SWAPPED, PAUSE)
SAMPLES = 4
"""Thoughts sampled at every position, at temperature 1, to count the right ones."""


def evaluate(run: StageRun) -> dict[str, float]:
    """Computes the held-out figures, over all ranks.

    Returns:
        ``base_nll``, ``mixed_nll``, ``thought_nll``, ``gain``, ``gain_beyond_next``,
        ``mixing_weight`` and the like with the model's greedy thoughts; ``swapped_mixed_nll``,
        ``swapped_thought_nll``, ``pause_mixed_nll``, ``pause_thought_nll`` with the controls;
        ``gain_of_content`` = swapped_mixed_nll - mixed_nll; ``gain_over_pause`` =
        pause_mixed_nll - mixed_nll. Nats a token. Where texts have answers also
        ``accuracy_without_thoughts``, ``accuracy_with_thoughts``, ``accuracy_swapped``,
        ``accuracy_pause``, and ``right_thoughts`` where they have steps. A stage without thoughts
        has ``base_nll`` and ``accuracy_without_thoughts`` only.
    """
    accelerator = run.accelerator
    model = ModelProxy(run.model)
    batches, counted = rank_batches(run)
    batches = [batch.to(accelerator.device) for batch in batches]
    passes = 2 if run.stage.thinks else 1
    with accelerator.autocast(), run.reporter.evaluating(passes * len(batches)) as advance:
        if run.stage.thinks:
            totals = compare(model, batches, advance, counted, gather_object)
        else:
            parts = []
            for batch in batches:
                scores = model.score_plain(batch.input_ids, batch.attention_mask, batch.labels)
                right = right_answers(scores.predicted[:, None], batch.input_ids, batch.answers)
                accuracy = as_metrics({"accuracy_without_thoughts": right})
                parts.append(scores.metrics.joined(accuracy))
                advance()
            totals = {"own": _total(parts[:counted])}
    if run.stage.thinks and SWAPPED not in totals:
        run.reporter.say(
            "gain of content: not available, because a single held-out text has no other to swap "
            "thoughts with; raise data.eval_sequences"
        )
    return figures({kind: total.reduced(accelerator) for kind, total in totals.items()})


def rank_batches(run: StageRun) -> tuple[list[Batch], int]:
    """Returns this rank's part of the held-out texts, and how many of its batches count.

    Strategies need as many forward passes on every rank: one with fewer batches reads one of them
    again, which does not count. With fewer batches than ranks, all read all of them; the means over
    ranks are the same.
    """
    accelerator = run.accelerator
    batches = list(run.eval_data.batches(run.config.training.micro_batch_size))
    if len(batches) < accelerator.num_processes:
        return batches, len(batches)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    most = -(-len(batches) // accelerator.num_processes)
    return [*mine, *mine[: most - len(mine)]], len(mine)


def _total(parts: Sequence[ThoughtMetrics]) -> ThoughtMetrics:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def compare(
    model: Thinker,
    batches: Sequence[Batch],
    advance: Callable[[], object] = lambda: None,
    counted: int | None = None,
    gather: Callable[[list[TextThoughts]], list[TextThoughts]] = lambda texts: texts,
) -> dict[str, ThoughtMetrics]:
    """Scores texts with the model's greedy thoughts (``own``) and with each control.

    Swapped thoughts are missing where there is nothing to swap with (`plan_swap`).

    Args:
        model: Model that thinks.
        batches: Texts.
        advance: Callback, called once a batch and pass.
        counted: Number of batches that count, all by default; the others are only read.
        gather: Function that joins the thoughts of all ranks, to swap them over the whole set.
    """
    parts: dict[str, list[ThoughtMetrics]] = {kind: [] for kind in ("own", *CONTROLS)}
    thoughts, places, texts = [], [], []
    for batch in batches:
        positions = chosen_positions(model, batch)
        tokens, metrics = _own(model, batch, positions)
        thoughts.append(tokens)
        places.append(positions)
        texts.append(_text_thoughts(batch, tokens, positions))
        parts["own"].append(metrics)
        advance()
    swap = plan_swap(gather([text for texts_of_batch in texts for text in texts_of_batch]))
    for batch, own, positions, batch_texts in zip(batches, thoughts, places, texts, strict=True):
        if swap is not None:
            swapped = torch.stack([swap(text, own.shape[2]) for text in batch_texts])
            parts[SWAPPED].append(score(model, batch, swapped.to(own.device), positions))
        pause = pause_tokens(own, model.pause_token_id)
        parts[PAUSE].append(score(model, batch, pause, positions))
        advance()
    return {kind: _total(metrics[:counted]) for kind, metrics in parts.items() if metrics}


def chosen_positions(model: Thinker, batch: Batch) -> Tensor | None:
    """Chooses where the texts of a batch think; None for all positions."""
    return model.choose_positions(
        batch.input_ids,
        batch.attention_mask,
        batch.labels,
        answers=batch.answers,
        sample_ids=batch.sample_ids,
    )


def _own(model: Thinker, batch: Batch, positions: Tensor | None) -> tuple[Tensor, ThoughtMetrics]:
    where = {"positions": positions, "sample_ids": batch.sample_ids}
    tokens = model.sample(batch.input_ids, **where)
    metrics = score(model, batch, tokens, positions)
    if batch.rationale.shape[1] == 0:
        return tokens, metrics
    sampled = model.sample(batch.input_ids, num_thoughts=SAMPLES, temperature=1.0, **where)
    right = right_thoughts(sampled, batch.answers, batch.rationale, positions)
    return tokens, metrics.joined(as_metrics({"right_thoughts": right}))


def score(
    model: Thinker, batch: Batch, thoughts: Tensor, positions: Tensor | None = None
) -> ThoughtMetrics:
    """Scores a batch with given thoughts (at given positions)."""
    scored = model.think(
        batch.input_ids, batch.attention_mask, batch.labels, thoughts=thoughts, positions=positions
    )
    ids, answers = batch.input_ids, batch.answers
    accuracies = {
        "accuracy_without_thoughts": right_answers(scored.base_predicted[:, None], ids, answers),
        "accuracy_with_thoughts": right_answers(scored.next_predicted(), ids, answers),
    }
    return scored.metrics.joined(as_metrics(accuracies))


def _text_thoughts(batch: Batch, thoughts: Tensor, positions: Tensor | None) -> list[TextThoughts]:
    """Returns the thoughts of each text of a batch, as the ranks exchange them."""
    real = batch.attention_mask.bool() if positions is None else positions >= 0
    anchors = place_before_answer(batch.answers, positions).tolist()
    has_answer, counts = batch.answers.any(-1).tolist(), real.sum(-1).clamp(min=1).tolist()
    rows = zip(batch.sample_ids.tolist(), thoughts.cpu(), counts, anchors, has_answer, strict=True)
    return [TextThoughts(i, t[:, :count], a, has) for i, t, count, a, has in rows]


def figures(totals: Mapping[str, ThoughtMetrics]) -> dict[str, float]:
    """Turns the metrics with own thoughts and with each control into the figures of `evaluate`."""
    result = totals["own"].means()
    for kind in CONTROLS:
        if kind not in totals:
            continue
        control = totals[kind].means()
        result[f"{kind}_mixed_nll"] = control["mixed_nll"]
        result[f"{kind}_thought_nll"] = control["thought_nll"]
        if "accuracy_with_thoughts" in control:
            result[f"accuracy_{kind}"] = control["accuracy_with_thoughts"]
        result[GAINS[kind]] = gain_over(result["mixed_nll"], control["mixed_nll"])
    return result
