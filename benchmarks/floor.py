"""The floor of a training step: a plain causal LM over as many tokens.

No Quiet-STaR step can be cheaper than its matrix products: one forward and backward over every row
of the learn pass with a cross entropy over every state that a loss reads, and a forward without
gradient over the text and every thought token but its closing, with logits where one is sampled.
The floor runs them as ordinary batches of S tokens. With thoughts at a share of the positions it is
that of their tokens, rounded to whole rows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.backbone.output_head import find_output_head

TOKENS = (1024, 2048, 4096)
"""That the floor runs at once; the fastest counts."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step: B texts of S tokens, K thoughts of T tokens, A tokens ahead."""

    batch_size: int
    text_length: int
    num_thoughts: int
    thought_length: int
    lookahead: int

    @property
    def block_length(self) -> int:
        """Tokens of a thought's block: start, thought, end, and the true ones but the last."""
        return self.thought_length + 2 + self.lookahead - 1


def floor_step(
    model: PreTrainedModel, sizes: Sizes, batch_rows: int = 8, share: float = 1.0
) -> None:
    """Run the floor of one step on a plain model, gradients included.

    Args:
        model: A plain causal LM.
        sizes: Sizes of the step.
        batch_rows: Sequences run at once.
        share: Of the positions, that have thoughts.
    """
    texts, scored = sizes.batch_size, sizes.thought_length + sizes.lookahead
    learn_rows = texts + _thought_rows(sizes, sizes.block_length, share)
    loss_rows = texts + _thought_rows(sizes, scored, share)
    for rows, with_loss in _batches(learn_rows, loss_rows, batch_rows):
        _plain_step(model, rows, with_loss, sizes.text_length)
    floor_rollout(model, sizes, batch_rows, share)


def share_of(args: argparse.Namespace) -> float:
    """Of the positions, that have thoughts."""
    return 1.0 if args.positions == "all" else args.share


def floor_batches(seq_len: int) -> list[int]:
    """Rows at once with which the floor is tried."""
    return sorted({max(1, tokens // seq_len) for tokens in TOKENS})


@torch.no_grad()
def floor_rollout(
    model: PreTrainedModel, sizes: Sizes, batch_rows: int = 8, share: float = 1.0
) -> None:
    """Run the floor of the sampling alone; arguments as in `floor_step`."""
    sampled = _thought_rows(sizes, sizes.thought_length, share)
    for rows, with_logits in _batches(sizes.batch_size + sampled, sampled, batch_rows):
        states = _states(model, rows, sizes.text_length)
        _logits(model, states[:with_logits])


def _thought_rows(sizes: Sizes, per_thought: int, share: float) -> int:
    """Rows of S tokens that ``per_thought`` tokens of every thought make."""
    return round(share * sizes.batch_size * sizes.num_thoughts * per_thought)


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
