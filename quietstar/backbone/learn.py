"""Phase 2: one differentiable pass over the text and all blocks gives every state a loss needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.attention.blocks import Blocks, ChosenBlocks, NeighbourBlocks
from quietstar.attention.layout import (
    ChosenLayout,
    Layout,
    lookahead_targets,
    shift_ahead,
    shifted,
)
from quietstar.attention.passes import BlockPass, ChosenLearnPass, LearnPass, TextKeys, TextPass
from quietstar.backbone.run import embed_sparsely, embed_text, num_virtual, run_backbone


@dataclass(frozen=True)
class LearnStates:
    """Final states of a learn pass; ``positions`` are all, (seq,), or the chosen ones.

    Attributes:
        text: The text's own; the one at i predicts x_{i+1}.
        policy: Those that predict the thought tokens t_1 .. t_T.
        ahead: Those from the end token on; entry a - 1 predicts x_{i+a}.
    """

    text: Float[Tensor, "batch seq width"]
    policy: Float[Tensor, "length thoughts batch positions width"]
    ahead: Float[Tensor, "lookahead thoughts batch positions width"]

    def next_only(self) -> LearnStates:
        """Without the states that look further ahead than the next token."""
        return replace(self, ahead=self.ahead[:1])


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


def learn_pass(
    model: PreTrainedModel,
    start_embedding: Float[Tensor, " embedding"],
    end_embedding: Float[Tensor, " embedding"],
    input_ids: Int[Tensor, "batch seq"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    lookahead: int,
    positions: Int[Tensor, "batch positions"] | None = None,
) -> LearnStates:
    """Run the model over ``[text | blocks]`` (`quietstar.attention.layout`).

    Args:
        model: A causal LM whose attention implementation is ``quietstar``.
        start_embedding: Opens every thought.
        end_embedding: Closes every thought.
        input_ids: Texts, padded on the right if at all.
        thoughts: Sampled tokens.
        lookahead: A.
        positions: Where the thoughts are, ascending; all positions by default.
    """
    length, num_thoughts, batch_size, _ = thoughts.shape
    layout = Layout(batch_size, input_ids.shape[1], num_thoughts, length, lookahead)
    virtual = num_virtual(model)
    if virtual and positions is None:  # rows of all positions have no room for virtual tokens
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = positions.expand(input_ids.shape)
    if positions is not None:
        layout = replace(layout, text_length=virtual + input_ids.shape[1])
        chosen = ChosenLayout(layout, shifted(positions, virtual))
        return _chosen_learn_pass(
            model, start_embedding, end_embedding, input_ids, thoughts, chosen
        )
    embeddings = _embed_rows(model, start_embedding, end_embedding, input_ids, thoughts, layout)
    states = run_backbone(
        model,
        embeddings,
        layout.position_ids(input_ids.device),
        LearnPass(batch_size, num_thoughts, layout.block_length),
    )
    blocks = layout.blocks(states)  # (W, K, B, S, D)
    return LearnStates(
        text=states[:batch_size],
        policy=blocks[:length],
        ahead=blocks[length + 1 :],
    )


# --- Blocks alone, against a text that ran before -------------------------------------------------


@dataclass(frozen=True)
class BlockStates:
    """Final states of blocks, as in `LearnStates`."""

    policy: Float[Tensor, "length thoughts batch positions width"]
    ahead: Float[Tensor, "lookahead thoughts batch positions width"]


@dataclass(frozen=True)
class BlockInputs:
    """Input embeddings of blocks.

    Attributes:
        start: Opens every thought.
        end: Closes it.
        thought: Of the sampled tokens.
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
        inputs: Of the blocks.
        places: Their positions in the text, if they are neighbours.
        end: Text tokens before the end of what they see, virtual ones included.
        virtual: Virtual tokens before the text.
        positions: Of the blocks, virtual tokens included, if they are chosen ones.
    """
    length, num_thoughts, batch_size, count = inputs.thought.shape[:4]
    block_length = length + len(inputs.true) + 2
    if positions is not None:
        return ChosenBlocks(positions, num_thoughts, block_length, end)
    first = virtual + places.start
    return NeighbourBlocks(batch_size, num_thoughts, block_length, first, count)


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
        blocks: Where the blocks lie.
        num_positions: Highest position of any block token of the step, plus one.
    """
    rows = blocks.arrange(*inputs.tokens())
    position_ids = blocks.position_ids(rows.device)
    states = run_backbone(model, rows, position_ids, BlockPass(keys, blocks, num_positions))
    start, rest = blocks.restore(states)  # (B, P, D) and (W - 1, K, B, P, D)
    length, num_thoughts = inputs.thought.shape[:2]
    start = start.expand(1, num_thoughts, *start.shape)
    return BlockStates(torch.cat([start, rest[: length - 1]]), rest[length:])


# --- Text and blocks at once ----------------------------------------------------------------------


def _embed_rows(
    model: PreTrainedModel,
    start_embedding: Tensor,
    end_embedding: Tensor,
    input_ids: Tensor,
    thoughts: Tensor,
    layout: Layout,
) -> Tensor:
    """Embeddings of all rows, (rows, S, embedding); one look-up for all tokens."""
    num_thoughts, batch_size = layout.num_thoughts, layout.batch_size
    true_tokens = shift_ahead(input_ids, layout.lookahead, 0)[1:]  # (A - 1, B, S)
    true_tokens = true_tokens.unsqueeze(1).expand(-1, num_thoughts, -1, -1)
    tokens = torch.cat(
        [input_ids, thoughts.flatten(0, 2), true_tokens.reshape(-1, input_ids.shape[1])]
    )
    embedded = model.get_input_embeddings()(tokens)
    columns = num_thoughts * batch_size
    text, thought, true = embedded.split(
        [batch_size, layout.thought_length * columns, (layout.lookahead - 1) * columns]
    )
    shape = (columns, layout.text_length, -1)
    start, end = (v.to(embedded.dtype).expand(shape) for v in (start_embedding, end_embedding))
    return torch.cat([text, start, thought, end, true])


# --- Chosen positions -----------------------------------------------------------------------------


def _chosen_learn_pass(
    model: PreTrainedModel,
    start_embedding: Tensor,
    end_embedding: Tensor,
    input_ids: Tensor,
    thoughts: Tensor,
    chosen: ChosenLayout,
) -> LearnStates:
    length, virtual = chosen.layout.thought_length, num_virtual(model)
    tokens = _block_tokens(input_ids, thoughts, chosen, virtual)  # (B, P, K, W)
    blocks = model.get_input_embeddings()(tokens)
    where = torch.arange(tokens.shape[-1], device=tokens.device).unsqueeze(-1)  # (W, 1)
    start, end = (v.to(blocks.dtype) for v in (start_embedding, end_embedding))
    blocks = torch.where(where == 0, start, blocks)
    blocks = torch.where(where == length + 1, end, blocks)
    row = torch.cat([embed_text(model, input_ids).flatten(0, 1), blocks.flatten(0, 3)])
    position_ids = chosen.position_ids()
    states = run_backbone(model, row.unsqueeze(0), position_ids, ChosenLearnPass(chosen))[0]
    blocks = chosen.blocks(states).permute(3, 2, 0, 1, 4)  # (W, K, B, P, D)
    text = chosen.texts(states)[:, virtual:]
    return LearnStates(text, blocks[:length], blocks[length + 1 :])


def _block_tokens(
    input_ids: Tensor, thoughts: Tensor, chosen: ChosenLayout, virtual: int
) -> Int[Tensor, "batch positions thoughts block"]:
    """Tokens of every block; anything at the places of start and end."""
    thought = thoughts.permute(2, 3, 1, 0)  # (B, P, K, T)
    positions = shifted(chosen.positions, -virtual)
    true = lookahead_targets(input_ids, chosen.layout.lookahead, positions)[:-1]
    true = true.clamp(min=0).permute(1, 2, 0).unsqueeze(2)  # (B, P, 1, A - 1)
    true = true.expand(*thought.shape[:3], -1)
    vector = torch.zeros_like(thought[..., :1])
    return torch.cat([vector, thought, vector, true], dim=-1)
