"""The floor of a training step: a plain causal LM over as many tokens.

No Quiet-STaR step can be cheaper than its matrix products: one forward and backward over every row
of the learn pass with a cross entropy over every state that a loss reads, and a forward without
gradient over the text and every thought token but its closing, with logits where one is sampled.
The floor runs them as ordinary batches of S tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.engine.layout import Layout
from quietstar.losses.output_head import find_output_head


def floor_step(model: PreTrainedModel, layout: Layout, batch_rows: int = 8) -> None:
    """Run the floor of one step on a plain model, gradients included.

    Args:
        model: A plain causal LM.
        layout: Sizes of the step.
        batch_rows: Sequences run at once.
    """
    learn_rows = layout.num_rows
    per_text = 1 + layout.num_thoughts * (layout.thought_length + layout.lookahead)
    loss_rows = layout.batch_size * per_text
    for rows, with_loss in _batches(learn_rows, loss_rows, batch_rows):
        _plain_step(model, rows, with_loss, layout.text_length)
    floor_rollout(model, layout, batch_rows)


@torch.no_grad()
def floor_rollout(model: PreTrainedModel, layout: Layout, batch_rows: int = 8) -> None:
    """Run the floor of the sampling alone; arguments as in `floor_step`."""
    sampled = layout.batch_size * layout.num_thoughts * layout.thought_length
    for rows, with_logits in _batches(layout.batch_size + sampled, sampled, batch_rows):
        states = _states(model, rows, layout.text_length)
        _logits(model, states[:with_logits])


def _batches(rows: int, marked: int, batch_rows: int) -> list[tuple[int, int]]:
    """Cut ``rows`` into batches; ``marked`` of them, from the front, also get logits."""
    sizes = [min(batch_rows, rows - start) for start in range(0, rows, batch_rows)]
    return [
        (size, max(0, min(size, marked - start)))
        for size, start in zip(sizes, range(0, rows, batch_rows), strict=True)
    ]


def _states(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    vocab_size = model.config.vocab_size
    tokens = torch.randint(vocab_size, (rows, length), device=model.device)
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


def _logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    return find_output_head(model).module(states)


def _plain_step(model: PreTrainedModel, rows: int, with_loss: int, length: int) -> None:
    states = _states(model, rows, length)
    if with_loss == 0:
        states.sum().backward()
        return
    logits = _logits(model, states[:with_loss]).flatten(0, 1).float()
    targets = torch.randint(logits.shape[-1], logits.shape[:1], device=logits.device)
    F.cross_entropy(logits, targets).backward()
