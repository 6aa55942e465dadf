"""Calling any Hugging Face decoder for a pass: embeddings in, final states out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from quietstar.attention.interface import WHOLE_TEXTS, thought_pass_scope
from quietstar.attention.passes import VIRTUAL_TOKENS, Pass, TextKeys, TextPass
from quietstar.errors import UserError


def embedding_weight(model: PreTrainedModel) -> Float[Tensor, "vocab embedding"]:
    """Weight of the input embeddings; their output may be scaled."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor), f"{type(model).__name__} embeds without one weight"
    return weight


def decoder_layers(
    model: PreTrainedModel, remedy: str = "tuning.method: lora or full"
) -> torch.nn.ModuleList:
    """The list of decoder layers.

    Raises:
        UserError: There is no list as long as the config says; set ``remedy`` instead.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for layers in lists:
        if len(layers) == count and find_attention(layers[0]) is not None:
            return layers
    raise UserError(
        f"the decoder layers of {type(model).__name__} are not to be found; set {remedy}"
    )


def find_attention(layer: torch.nn.Module) -> torch.nn.Module | None:
    """The attention of a decoder layer."""
    parts = (m for m in layer.children() if "attention" in type(m).__name__.lower())
    return next(parts, None)


def num_virtual(model: PreTrainedModel) -> int:
    """Learned virtual tokens in front of every text."""
    tokens = getattr(model, VIRTUAL_TOKENS, None)
    return 0 if tokens is None else tokens.embeddings.shape[0]


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
        embeddings: Input embedding of every token.
        position_ids: Position of every token.
        thought_pass: Who attends to whom.
    """
    with thought_pass_scope(thought_pass):
        output = model.base_model(
            inputs_embeds=embeddings,
            attention_mask=_whole(position_ids),
            position_ids=position_ids,
            use_cache=False,
            thought_pass=thought_pass,
        )
    return output.last_hidden_state


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Inside, decoder layers keep their inputs only, and run again in the backward pass."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    before = [(layer.gradient_checkpointing, layer.training) for layer in layers]
    for layer in layers:
        if not layer.gradient_checkpointing:
            again: Any = partial(checkpoint, use_reentrant=False)
            layer._gradient_checkpointing_func = again
        layer.gradient_checkpointing = layer.training = True  # that of the layer alone
    try:
        yield
    finally:
        for layer, (recomputes, trains) in zip(layers, before, strict=True):
            layer.gradient_checkpointing, layer.training = recomputes, trains


@dataclass(frozen=True)
class TextRun:
    """Keys, values and final states of texts that were run once, for all that follows."""

    keys: TextKeys
    states: Float[Tensor, "batch seq width"]


def run_text(model: PreTrainedModel, input_ids: Int[Tensor, "batch seq"]) -> TextRun:
    """Run texts (padded on the right if at all) and keep what thoughts need of them."""
    keys: TextKeys = {}
    return TextRun(keys, _text_states(model, input_ids, TextPass(keys)))


def plain_pass(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq width"]:
    """Final states of a text alone, without thoughts.

    Padding is on the right, where causal attention does not see it.
    """
    if num_virtual(model):
        return _text_states(model, input_ids, TextPass())
    with thought_pass_scope(WHOLE_TEXTS):
        output = model.base_model(
            input_ids=input_ids, attention_mask=_whole(input_ids), use_cache=False
        )
    return output.last_hidden_state


def _whole(rows: Int[Tensor, "rows seq"]) -> Bool[Tensor, "rows seq"]:
    """A mask of ones: without one transformers compares positions on the host to find packing."""
    return torch.ones(rows.shape, dtype=torch.bool, device=rows.device)


def _text_states(model: PreTrainedModel, input_ids: Tensor, text_pass: TextPass) -> Tensor:
    embedded = model.get_input_embeddings()(input_ids)
    tokens = getattr(model, VIRTUAL_TOKENS, None)
    if tokens is not None:
        virtual = tokens.embeddings.to(embedded.dtype).expand(input_ids.shape[0], -1, -1)
        embedded = torch.cat([virtual, embedded], dim=1)
    positions = torch.arange(embedded.shape[1], device=input_ids.device)
    states = run_backbone(model, embedded, positions.expand(embedded.shape[:2]), text_pass)
    return states[:, num_virtual(model) :]
