"""Phase 2: thoughts that are given, teacher-forced, with every state that a loss needs.

A text runs once (`run_text`); blocks of ``start, thought, end, true tokens`` then run against its
keys and values (`block_pass`), in one group or in many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.attention.blocks import Blocks, ContiguousBlocks, SelectedBlocks
from quietstar.attention.layout import lookahead_targets, shifted
from quietstar.attention.passes import BlockPass, TextKeys, TextPass
from quietstar.backbone.run import (
    TextRun,
    embed_sparsely,
    embed_text,
    num_virtual,
    run_backbone,
    run_text,
)


@dataclass(frozen=True)
class ThoughtStates:
    """Final states of texts and of the blocks behind ``positions``: all, (seq,), or chosen ones.

    Attributes:
        text: The text's own states; the one at i predicts x_{i+1}.
        policy: States that predict the thought tokens t_1 .. t_T.
        ahead: States from the end token on; entry a - 1 predicts x_{i+a}.
    """

    text: Float[Tensor, "batch seq width"]
    policy: Float[Tensor, "length thoughts batch positions width"]
    ahead: Float[Tensor, "lookahead thoughts batch positions width"]


def plain_pass(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq width"]:
    """Final states of a text alone, without thoughts.

    Padding is on the right, where causal attention does not see it.
    """
    virtual = num_virtual(model)
    if not virtual:
        return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    embedded = embed_text(model, input_ids)
    positions = torch.arange(embedded.shape[1], device=input_ids.device)
    positions = positions.expand(embedded.shape[:2])
    return run_backbone(model, embedded, positions, TextPass())[:, virtual:]


def teacher_forced(
    model: PreTrainedModel,
    start_embedding: Float[Tensor, " embedding"],
    end_embedding: Float[Tensor, " embedding"],
    input_ids: Int[Tensor, "batch seq"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    lookahead: int,
    positions: Int[Tensor, "batch positions"] | None = None,
    text: TextRun | None = None,
) -> ThoughtStates:
    """Run the texts and the blocks of all their thoughts, as one group with an ordinary graph.

    Args:
        model: Causal LM whose attention implementation is ``quietstar``.
        start_embedding: Input that opens every thought.
        end_embedding: Input that closes every thought.
        input_ids: Texts, padded on the right if at all.
        thoughts: Thought tokens.
        lookahead: True tokens behind each position, A.
        positions: Positions of the thoughts, ascending; all positions by default.
        text: Run of the texts, if there was one.
    """
    text = run_text(model, input_ids) if text is None else text
    vectors = (start_embedding, end_embedding)
    inputs = embed_blocks(model, *vectors, input_ids, thoughts, lookahead, positions)
    virtual, length = num_virtual(model), input_ids.shape[1]
    where = None if positions is None else shifted(positions, virtual)
    blocks = make_blocks(inputs, slice(0, thoughts.shape[-1]), virtual + length, virtual, where)
    block_length = thoughts.shape[0] + lookahead + 1
    states = block_pass(model, inputs, text.keys, blocks, virtual + length + block_length)
    return ThoughtStates(text.states, states.policy, states.ahead)


@dataclass(frozen=True)
class BlockStates:
    """Final states of blocks, as in `ThoughtStates`."""

    policy: Float[Tensor, "length thoughts batch positions width"]
    ahead: Float[Tensor, "lookahead thoughts batch positions width"]


@dataclass(frozen=True)
class BlockInputs:
    """Input embeddings of blocks.

    Attributes:
        start: Input that opens every thought.
        end: Input that closes every thought.
        thought: Embeddings of the thought tokens.
        true: Of the true tokens behind, the same for all thoughts.
    """

    start: Float[Tensor, " embedding"]
    end: Float[Tensor, " embedding"]
    thought: Float[Tensor, "length thoughts batch positions embedding"]
    true: Float[Tensor, "true batch positions embedding"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As the constructor takes them."""
        return self.start, self.end, self.thought, self.true

    @staticmethod
    def index(number: int, texts: slice, places: slice) -> Any:
        """Of some positions of some texts, in the tensor of that number."""
        return ... if number < 2 else (..., texts, places, slice(None))

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Start tokens (B, P, embedding), and the others in order, (W - 1, K, B, P, embedding)."""
        thought = self.thought
        start = self.start.to(thought.dtype).expand(thought.shape[2:])
        end = self.end.to(thought.dtype).expand(1, *thought.shape[1:])
        true = self.true.unsqueeze(1).expand(-1, *thought.shape[1:])
        return start, torch.cat([thought, end, true])


def embed_blocks(
    model: PreTrainedModel,
    start_embedding: Float[Tensor, " embedding"],
    end_embedding: Float[Tensor, " embedding"],
    input_ids: Int[Tensor, "batch seq"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    lookahead: int,
    positions: Int[Tensor, "batch positions"] | None = None,
) -> BlockInputs:
    """Input embeddings of the blocks behind all positions, or the chosen ones."""
    true = lookahead_targets(input_ids, lookahead, positions)[:-1].clamp(min=0)
    thought, true = embed_sparsely(model, thoughts), embed_sparsely(model, true)
    return BlockInputs(start_embedding, end_embedding, thought, true)


def make_blocks(
    inputs: BlockInputs,
    places: slice,
    end: int,
    virtual: int,
    positions: Int[Tensor, "batch positions"] | None,
) -> Blocks:
    """Where the blocks lie.

    Args:
        inputs: Embeddings of the blocks.
        places: Their positions in the text, if they are neighbours.
        end: Text tokens before the end of what they see, virtual ones included.
        virtual: Virtual tokens before the text.
        positions: Of the blocks, virtual tokens included, if they are chosen ones.
    """
    length, num_thoughts, batch_size, count = inputs.thought.shape[:4]
    block_length = length + len(inputs.true) + 2
    if positions is not None:
        return SelectedBlocks(positions, num_thoughts, block_length, end)
    first = virtual + places.start
    return ContiguousBlocks(batch_size, num_thoughts, block_length, first, count)


def block_pass(
    model: PreTrainedModel,
    inputs: BlockInputs,
    keys: TextKeys,
    blocks: Blocks,
    num_positions: int,
) -> BlockStates:
    """Run the model over blocks alone.

    Args:
        model: A causal LM whose attention implementation is ``quietstar``.
        inputs: Embeddings of the blocks.
        keys: Keys and values of the texts, as far as the blocks see them.
        blocks: Layout of the blocks.
        num_positions: Highest position of any block token of the step, plus one.
    """
    rows = blocks.to_rows(*inputs.tokens())
    position_ids = blocks.position_ids(rows.device)
    states = run_backbone(model, rows, position_ids, BlockPass(keys, blocks, num_positions))
    start, rest = blocks.from_rows(states)  # (B, P, D) and (W - 1, K, B, P, D)
    length, num_thoughts = inputs.thought.shape[:2]
    start = start.expand(1, num_thoughts, *start.shape)
    return BlockStates(torch.cat([start, rest[: length - 1]]), rest[length:])
