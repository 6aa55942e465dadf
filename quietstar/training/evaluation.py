"""Held-out evaluation: the gain of thinking, and how much of it comes from what thoughts say.

Greedy thoughts at every position; then the same texts with the same thoughts exchanged among
positions, and with a constant pause token in place of every thought token. A second read-out of
the text gives a gain with any thoughts at all; only what exchanged thoughts lose is content.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from quietstar.data import Batch
from quietstar.metrics import ThoughtMetrics
from quietstar.model import QuietStarForCausalLM

if TYPE_CHECKING:
    from quietstar.training.loop import Run

CONTROLS = ("exchanged", "pause")


def evaluate(run: Run) -> dict[str, float]:
    """Held-out figures, over all ranks.

    Returns:
        ``base_nll``, ``mixed_nll``, ``thought_nll``, ``gain``, ``gain_ahead``, ``mixing_weight``
        and the like with the model's greedy thoughts; ``exchanged_mixed_nll``,
        ``exchanged_thought_nll``, ``pause_mixed_nll``, ``pause_thought_nll`` with the controls;
        ``gain_of_content`` = exchanged_mixed_nll - mixed_nll; ``gain_over_pause`` =
        pause_mixed_nll - mixed_nll. Nats a token.
    """
    accelerator = run.accelerator
    model = accelerator.unwrap_model(run.model)
    assert isinstance(model, QuietStarForCausalLM), type(model)
    totals: dict[str, ThoughtMetrics] = {}
    batches = list(run.eval_data.batches(run.config.training.micro_batch_size))
    if len(batches) >= accelerator.num_processes:  # else every rank reads all: the means are equal
        batches = batches[accelerator.process_index :: accelerator.num_processes]
    with accelerator.autocast(), run.reporter.evaluating(len(batches)) as advance:
        for batch in batches:
            for kind, metrics in compare(model, batch.to(accelerator.device)).items():
                totals[kind] = totals[kind] + metrics if kind in totals else metrics
            advance()
    return figures({kind: total.reduced(accelerator) for kind, total in totals.items()})


def compare(model: QuietStarForCausalLM, batch: Batch) -> dict[str, ThoughtMetrics]:
    """Figures of one batch with the model's greedy thoughts and with each control."""
    inputs = (batch.input_ids, batch.attention_mask, batch.labels)
    own = model.think(*inputs, sample_ids=batch.sample_ids)
    controls = {
        "exchanged": exchange(own.tokens, batch.attention_mask.bool(), batch.sample_ids),
        "pause": torch.full_like(own.tokens, model.pause_token_id),
    }
    results = {k: model.think(*inputs, thoughts=tokens).metrics for k, tokens in controls.items()}
    return {"own": own.metrics, **results}


def exchange(
    tokens: Int[Tensor, "batch thoughts seq length"],
    real: Bool[Tensor, "batch seq"],
    sample_ids: Int[Tensor, " batch"],
) -> Int[Tensor, "batch thoughts seq length"]:
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


def figures(totals: dict[str, ThoughtMetrics]) -> dict[str, float]:
    """From the metrics with own thoughts and each control to the figures of `evaluate`."""
    result = totals["own"].means()
    for kind in CONTROLS:
        control = totals[kind].means()
        result[f"{kind}_mixed_nll"] = control["mixed_nll"]
        result[f"{kind}_thought_nll"] = control["thought_nll"]
    result["gain_of_content"] = result["exchanged_mixed_nll"] - result["mixed_nll"]
    result["gain_over_pause"] = result["pause_mixed_nll"] - result["mixed_nll"]
    return result
