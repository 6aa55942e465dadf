"""Held-out evaluation: the gain of thinking, and how much of it comes from what thoughts say.

Greedy thoughts at every position that `thoughts.positions` takes; then the same texts with thoughts
exchanged, and with a constant pause token in place of every thought token. A second read-out of the
text gives a gain with any thoughts at all; only what exchanged thoughts lose is content. Thoughts
are exchanged among the texts where these have answers, and within each text otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from quietstar.data import Batch
from quietstar.distributed import ModelProxy
from quietstar.model.metrics import ThoughtMetrics, as_metrics
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.training.answers import (
    exchange_among_texts,
    place_before_answer,
    right_answers,
    right_thoughts,
)

Thinker = QuietStarForCausalLM | ModelProxy
"""A model, or one inside an engine."""

if TYPE_CHECKING:
    from quietstar.training.loop import Run

CONTROLS = ("exchanged", "pause")
SAMPLES = 4
"""Thoughts sampled at every position, at temperature 1, to count the right ones."""


def evaluate(run: Run) -> dict[str, float]:
    """Held-out figures, over all ranks.

    Returns:
        ``base_nll``, ``mixed_nll``, ``thought_nll``, ``gain``, ``gain_ahead``, ``mixing_weight``
        and the like with the model's greedy thoughts; ``exchanged_mixed_nll``,
        ``exchanged_thought_nll``, ``pause_mixed_nll``, ``pause_thought_nll`` with the controls;
        ``gain_of_content`` = exchanged_mixed_nll - mixed_nll; ``gain_over_pause`` =
        pause_mixed_nll - mixed_nll. Nats a token. Where texts have answers also
        ``accuracy_without_thoughts``, ``accuracy_with_thoughts``, ``accuracy_exchanged``,
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
            totals = compare(model, batches, advance, counted)
        else:
            parts = [_plain(model, batch, advance) for batch in batches]
            totals = {"own": _total(parts[:counted])}
    return figures({kind: total.reduced(accelerator) for kind, total in totals.items()})


def rank_batches(run: Run) -> tuple[list[Batch], int]:
    """This rank's part of the held-out texts, and how many of its batches count.

    Engines want as many forward passes on every rank: one with fewer batches reads one of them
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


def _plain(model: Thinker, batch: Batch, advance: Callable[[], object]) -> ThoughtMetrics:
    scores = model.score_plain(batch.input_ids, batch.attention_mask, batch.labels)
    right = right_answers(scores.predicted[:, None], batch.input_ids, batch.answers)
    advance()
    return scores.metrics.joined(as_metrics({"accuracy_without_thoughts": right}))


def compare(
    model: Thinker,
    batches: Sequence[Batch],
    advance: Callable[[], object] = lambda: None,
    counted: int | None = None,
) -> dict[str, ThoughtMetrics]:
    """Figures of texts with the model's greedy thoughts and with each control.

    Args:
        model: That thinks.
        batches: The texts.
        advance: Called once a batch and pass.
        counted: So many batches count, all by default; the others are only read.
    """
    parts: dict[str, list[ThoughtMetrics]] = {kind: [] for kind in ("own", *CONTROLS)}
    thoughts, places = [], []
    for batch in batches:
        positions = chosen_positions(model, batch)
        tokens, metrics = _own(model, batch, positions)
        thoughts.append(tokens)
        places.append(positions)
        parts["own"].append(metrics)
        advance()
    exchanged = _exchanged(batches, thoughts, places, counted)
    for batch, others, positions in zip(batches, exchanged, places, strict=True):
        pause = torch.full_like(others, model.pause_token_id)
        parts["exchanged"].append(score(model, batch, others, positions))
        parts["pause"].append(score(model, batch, pause, positions))
        advance()
    return {kind: _total(metrics[:counted]) for kind, metrics in parts.items()}


def chosen_positions(model: Thinker, batch: Batch) -> Tensor | None:
    """Where the texts of a batch think; None for all positions."""
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
    """Figures of a batch with these thoughts (at these positions)."""
    scored = model.think(
        batch.input_ids, batch.attention_mask, batch.labels, thoughts=thoughts, positions=positions
    )
    ids, answers = batch.input_ids, batch.answers
    accuracies = {
        "accuracy_without_thoughts": right_answers(scored.base_predicted[:, None], ids, answers),
        "accuracy_with_thoughts": right_answers(scored.next_predicted(), ids, answers),
    }
    return scored.metrics.joined(as_metrics(accuracies))


def _exchanged(
    batches: Sequence[Batch],
    thoughts: Sequence[Tensor],
    places: Sequence[Tensor | None],
    counted: int | None,
) -> list[Tensor]:
    """Every batch's thoughts, exchanged; those that do not count stay as they are."""
    if counted is not None and counted < len(batches):
        kept = _exchanged(batches[:counted], thoughts[:counted], places[:counted], None)
        return [*kept, *thoughts[counted:]]
    if not all(batch.answers.any(-1).all() for batch in batches):
        return [
            exchange(t, b.attention_mask.bool() if p is None else p >= 0, b.sample_ids)
            for b, t, p in zip(batches, thoughts, places, strict=True)
        ]
    width = max(t.shape[2] for t in thoughts)  # of the batch with the longest answer
    together = torch.cat([F.pad(t, (0, 0, 0, width - t.shape[2])) for t in thoughts])
    before = torch.cat(
        [place_before_answer(b.answers, p) for b, p in zip(batches, places, strict=True)]
    )
    counts = torch.cat([_num_places(t, p) for t, p in zip(thoughts, places, strict=True)])
    parts = exchange_among_texts(together, before, counts).split([len(t) for t in thoughts])
    return [part[:, :, : t.shape[2]] for part, t in zip(parts, thoughts, strict=True)]


def _num_places(thoughts: Tensor, positions: Tensor | None) -> Tensor:
    """Places with a thought of each text, (batch,)."""
    if positions is None:
        return torch.full_like(thoughts[:, 0, 0, 0], thoughts.shape[2])
    return (positions >= 0).sum(-1).clamp(min=1)


def exchange(
    tokens: Int[Tensor, "batch thoughts positions length"],
    real: Bool[Tensor, "batch positions"],
    sample_ids: Int[Tensor, " batch"],
) -> Int[Tensor, "batch thoughts positions length"]:
    """Give every position the thoughts of another one of its text; none keeps its own.

    Within the text, so that what is exchanged still fits the subject (the harder control), and so
    that the way a batch is cut changes nothing.

    Args:
        tokens: Thoughts.
        real: Positions that take part (no padding).
        sample_ids: Key the exchange of each text.
    """
    exchanged = tokens.clone()
    for text, (thoughts, sample) in enumerate(zip(tokens, sample_ids.tolist(), strict=True)):
        positions = real[text].nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(sample)
        order = positions[torch.randperm(len(positions), generator=generator)]
        # One cycle through all positions in random order: each gets its predecessor's.
        exchanged[text, :, order] = thoughts[:, order.roll(1)]
    return exchanged


def figures(totals: Mapping[str, ThoughtMetrics]) -> dict[str, float]:
    """From the metrics with own thoughts and each control to the figures of `evaluate`."""
    result = totals["own"].means()
    if "exchanged" not in totals:
        return result
    for kind in CONTROLS:
        control = totals[kind].means()
        result[f"{kind}_mixed_nll"] = control["mixed_nll"]
        result[f"{kind}_thought_nll"] = control["thought_nll"]
        if "accuracy_with_thoughts" in control:
            result[f"accuracy_{kind}"] = control["accuracy_with_thoughts"]
    result["gain_of_content"] = result["exchanged_mixed_nll"] - result["mixed_nll"]
    result["gain_over_pause"] = result["pause_mixed_nll"] - result["mixed_nll"]
    return result
