"""Calling any Hugging Face decoder for a pass: embeddings in, final states out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.attention.interface import thought_pass_scope
from quietstar.attention.passes import VIRTUAL_TOKENS, Pass, TextKeys, TextPass


def embedding_weight(model: PreTrainedModel) -> Float[Tensor, "vocab embedding"]:
    """Weight of the input embeddings; their output may be scaled."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor), f"{type(model).__name__} embeds without one weight"
    return weight


def virtual_embeddings(model: PreTrainedModel) -> Float[Tensor, "virtual embedding"] | None:
    """Input embeddings of the learned virtual tokens in front of every text, if there are any."""
    tokens = getattr(model, VIRTUAL_TOKENS, None)
    return None if tokens is None else tokens.embeddings


def num_virtual(model: PreTrainedModel) -> int:
    """Virtual tokens in front of every text."""
    virtual = virtual_embeddings(model)
    return 0 if virtual is None else virtual.shape[0]


def embed_text(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch virtual_and_seq embedding"]:
    """Input embeddings of texts, virtual tokens in front."""
    embedded = model.get_input_embeddings()(input_ids)
    virtual = virtual_embeddings(model)
    if virtual is None:
        return embedded
    virtual = virtual.to(embedded.dtype).expand(input_ids.shape[0], -1, -1)
    return torch.cat([virtual, embedded], dim=1)


def embed_sparsely(
    model: PreTrainedModel, tokens: Int[Tensor, "*rows"]
) -> Float[Tensor, "*rows embedding"]:
    """Input embeddings whose gradient is no table of the whole vocabulary, but the tokens' rows.

    For tokens beside a text: autograd adds the rows to the gradient that the text leaves, in place.
    """
    embed = model.get_input_embeddings()
    if not isinstance(embed, torch.nn.Embedding) or tokens.device.type not in ("cpu", "cuda"):
        return embed(tokens)
    before, embed.sparse = embed.sparse, True
    try:
        return embed(tokens)
    finally:
        embed.sparse = before


def run_backbone(
    model: PreTrainedModel,
    embeddings: Float[Tensor, "rows seq embedding"],
    position_ids: Int[Tensor, "rows seq"],
    thought_pass: Pass,
) -> Float[Tensor, "rows seq width"]:
    """Final states (after the last norm) of every token of every row.

    Args:
        model: A causal LM whose attention implementation is ``quietstar``.
        embeddings: Input embeddings.
        position_ids: Position of every token.
        thought_pass: Who attends to whom.
    """
    # A mask of ones: without one, transformers compares the positions of each row on the host to
    # find packed sequences.
    everything = torch.ones(position_ids.shape, dtype=torch.bool, device=position_ids.device)
    with thought_pass_scope(thought_pass):
        output = model.base_model(
            inputs_embeds=embeddings,
            attention_mask=everything,
            position_ids=position_ids,
            use_cache=False,
            thought_pass=thought_pass,
        )
    return output.last_hidden_state


@dataclass(frozen=True)
class TextRun:
    """A text that was run once, for all that is done behind its tokens.

    Attributes:
        keys: Keys and values.
        states: Final states.
    """

    keys: TextKeys
    states: Float[Tensor, "batch seq width"]


def run_text(model: PreTrainedModel, input_ids: Int[Tensor, "batch seq"]) -> TextRun:
    """Run texts (padded on the right if at all) and keep what thoughts need of them."""
    keys: TextKeys = {}
    embedded = embed_text(model, input_ids)
    positions = torch.arange(embedded.shape[1], device=input_ids.device)
    positions = positions.expand(embedded.shape[:2])
    states = run_backbone(model, embedded, positions, TextPass(keys))
    return TextRun(keys, states[:, num_virtual(model) :])
