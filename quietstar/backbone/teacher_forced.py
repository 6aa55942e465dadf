"""Phase 2: thoughts that are given, teacher-forced, with every state that a loss needs.

A text runs once (`run_text`); blocks of ``start.., thought, end.., true tokens`` then run against
its keys and values (`block_pass`), in one group or in many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.attention.blocks import ContiguousBlocks, PackedBlocks, SelectedBlocks
from quietstar.attention.layout import NO_POSITION, OnHost, lookahead_targets, shifted
from quietstar.attention.passes import BlockPass, TextKeys
from quietstar.backbone.run import TextRun, embed_sparsely, num_virtual, run_backbone

PACKED_FROM = 48
"""Tokens of a block from which blocks at chosen positions are packed."""


@dataclass(frozen=True)
class ThoughtStates:
    """Final states of texts and of the blocks after ``positions``: all, (seq,), or chosen ones.

    Attributes:
        text: The text's own states; the one at i predicts x_{i+1}.
        policy: States that predict the thought tokens t_1 .. t_T.
        ahead: States from the last end token on; entry a - 1 predicts x_{i+a}.
    """

    text: Float[Tensor, "batch seq width"]
    policy: Float[Tensor, "length thoughts batch positions width"]
    ahead: Float[Tensor, "lookahead thoughts batch positions width"]


@dataclass(frozen=True)
class BlockInputs:
    """Input embeddings of blocks, and where the blocks lie.

    Attributes:
        start: Inputs that open every thought.
        end: Inputs that close every thought.
        thought: Embeddings of the thought tokens.
        true: Of the true tokens after, the same for all thoughts.
        positions: Positions of the thoughts, ascending, -1 after the last; None for contiguous
            ones.
        lengths: Tokens of each thought; None where all have the whole length.
        on_host: Positions and lengths as the host knows them; None where a pass is to read them,
            which waits for a device, if it needs them.
    """

    start: Float[Tensor, "start embedding"]
    end: Float[Tensor, "end embedding"]
    thought: Float[Tensor, "length thoughts batch positions embedding"]
    true: Float[Tensor, "true batch positions embedding"]
    positions: Int[Tensor, "batch positions"] | None
    lengths: Int[Tensor, "thoughts batch positions"] | None = None
    on_host: OnHost | None = None


def embed_blocks(
    model: PreTrainedModel,
    start: Float[Tensor, "start embedding"],
    end: Float[Tensor, "end embedding"],
    input_ids: Int[Tensor, "batch seq"],
    thoughts: Int[Tensor, "length thoughts batch positions"],
    lookahead: int,
    positions: Int[Tensor, "batch positions"] | None = None,
    lengths: Int[Tensor, "thoughts batch positions"] | None = None,
    on_host: OnHost | None = None,
) -> BlockInputs:
    """Embed the blocks after ``positions`` (ascending; all by default) of texts.

    Texts are padded on the right if at all; after each thought come A - 1 of their tokens. With
    ``lengths``, thoughts end early and are padded with `NO_TOKEN`.
    """
    true = lookahead_targets(input_ids, lookahead, positions)[:-1].clamp(min=0)
    thoughts = thoughts if lengths is None else thoughts.clamp(min=0)
    thought, true = embed_sparsely(model, thoughts), embed_sparsely(model, true)
    return BlockInputs(start, end, thought, true, positions, lengths, on_host)


def is_packed(positions: Tensor | None, block_length: int) -> bool:
    """Say whether blocks run without padding (`PackedBlocks`).

    Shorter ones are so many that one call of a kernel for all of them pays more.
    """
    return positions is not None and block_length >= PACKED_FROM


def teacher_forced(model: PreTrainedModel, text: TextRun, inputs: BlockInputs) -> ThoughtStates:
    """Run all blocks against the run of their texts, as one group with an ordinary graph."""
    policy, ahead = block_pass(model, inputs, text.keys, text.states.shape[1])
    return ThoughtStates(text.states, policy, ahead)


def block_pass(
    model: PreTrainedModel, inputs: BlockInputs, keys: TextKeys, text_length: int, first: int = 0
) -> tuple[
    Float[Tensor, "length thoughts batch positions width"],
    Float[Tensor, "lookahead thoughts batch positions width"],
]:
    """Run the model over blocks alone; their states, as ``policy`` and ``ahead``.

    Args:
        model: A causal LM whose attention implementation is ``quietstar``.
        inputs: Embeddings of the blocks.
        keys: Keys and values of the texts, as far as the blocks see them.
        text_length: Tokens of the whole texts.
        first: First position of contiguous blocks.
    """
    thought, virtual = inputs.thought, num_virtual(model)
    length, num_thoughts, batch_size, count = thought.shape[:4]
    num_start, behind = len(inputs.start), len(inputs.end) + len(inputs.true)
    block_length = num_start + length + behind
    if inputs.positions is None:
        blocks = ContiguousBlocks(
            batch_size, num_thoughts, block_length, virtual + first, count, num_start
        )
    else:
        seen = next(iter(keys.values()))[0].shape[2]
        if is_packed(inputs.positions, block_length):
            blocks = _packed(inputs, virtual, seen, behind)
        else:
            places = shifted(inputs.positions, virtual)
            blocks = SelectedBlocks(places, num_thoughts, block_length, seen, num_start)
    grid = (-1, *thought.shape[1:])
    start = inputs.start.to(thought.dtype)[:, None, None].expand(-1, *thought.shape[2:])
    end = inputs.end.to(thought.dtype)[:, None, None, None].expand(grid)
    true = inputs.true.unsqueeze(1).expand(-1, *thought.shape[1:])
    rest = torch.cat([thought, end, true])
    if inputs.lengths is not None:
        # Token w is the thought's, or, after its end, as far after `thought` in `rest`. The tail
        # repeats the last token: nothing that is read sees it.
        w = torch.arange(len(rest), device=rest.device).view(-1, 1, 1, 1)
        source = w.where(w < inputs.lengths, w + length - inputs.lengths)
        rest = _take(rest, source.clamp(max=len(rest) - 1))
    rows = blocks.to_rows(start, rest)
    num_positions = virtual + text_length + block_length
    states = run_backbone(
        model, rows, blocks.position_ids(rows.device), BlockPass(keys, blocks, num_positions)
    )
    start, rest = blocks.from_rows(states)  # (M, B, P, D) and (W - M, K, B, P, D)
    start = start[-1:].unsqueeze(1).expand(-1, num_thoughts, -1, -1, -1)
    first_ahead = len(inputs.end) - 1  # after the thought
    policy, ahead = torch.cat([start, rest[: length - 1]]), rest[length + first_ahead :]
    if inputs.lengths is not None:
        a = torch.arange(len(ahead), device=rest.device).view(-1, 1, 1, 1)
        ahead = _take(rest, inputs.lengths + first_ahead + a)
    return policy, ahead


def _packed(inputs: BlockInputs, virtual: int, seen: int, behind: int) -> PackedBlocks:
    """Lay out long blocks; of a run that is only planned, the largest."""
    positions, thought = inputs.positions, inputs.thought
    assert positions is not None, "blocks at chosen positions"
    known = inputs.on_host or OnHost.read(positions, inputs.lengths)
    if known is None or known.positions is None:
        known, at = None, np.full(positions.shape, seen - virtual - 1)
    else:
        at = known.positions
    return PackedBlocks(
        np.where(at < 0, NO_POSITION, at + virtual),
        None if known is None or known.lengths is None else known.lengths + behind,
        thought.shape[1],
        len(inputs.start) + len(thought) + behind,
        thought.device,
        len(inputs.start),
    )


def _take(
    x: Float[Tensor, "tokens thoughts batch positions width"],
    index: Int[Tensor, "chosen thoughts batch positions"],
) -> Float[Tensor, "chosen thoughts batch positions width"]:
    """Tokens of every block by their index in it."""
    return x.gather(0, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
