"""Parallel attention, registered with transformers' attention interface.

The model's own attention layers call `thinking_attention`. Without a pass in its keywords it is
ordinary attention, so that the model stays a plain causal LM; with one it does what the pass says
(`quietstar.engine.passes`).
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quietstar.engine.dense import ScoreRules
from quietstar.engine.passes import Pass

ATTENTION_NAME = "quietstar"

# What transformers hands to every attention function and what our passes settle themselves
# (positions and causality come from the layout) or do not need.
_SETTLED_KEYWORDS = frozenset(
    {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}
    | {"output_hidden_states", "return_dict", "output_router_logits", "cu_seq_lens_q"}
    | {"position_embeddings", "num_items_in_batch", "logits_to_keep", "layer_idx"}
)


@torch.compiler.disable
def thinking_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    thought_pass: Pass | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' interface; returns (N, S, H, dv).

    Raises:
        ValueError: An attention keyword that this function does not understand, or dropout.
    """
    if thought_pass is None:
        return _plain_attention(
            module, query, key, value, attention_mask, scaling, dropout, keywords
        )
    if dropout:
        raise ValueError(
            f"attention dropout ({dropout}) must be 0: with it the learn pass would score other "
            "thoughts than the rollout sampled. Load the model with QuietStarForCausalLM.from_base."
        )
    rules = _score_rules(query, scaling, keywords)
    if not query.dtype == key.dtype == value.dtype:
        # Under autocast rotary embeddings leave queries and keys in float32 beside bfloat16
        # values; every attention kernel wants the one dtype that the matrix products use.
        query, key = query.to(value.dtype), key.to(value.dtype)
    out = thought_pass.attend(module, query, key, value, rules)
    return out.transpose(1, 2), None


def _score_rules(query: Tensor, scaling: float | None, keywords: dict[str, Any]) -> ScoreRules:
    """Read the attention keywords; one that is set but not understood is an error."""
    known = {"softcap", "sliding_window", "s_aux"} | _SETTLED_KEYWORDS
    unknown = [k for k, value in keywords.items() if k not in known and value is not None]
    if unknown:
        raise ValueError(
            f"the attention keyword {unknown[0]!r} is not understood; ignoring it would compute "
            "something else than the model does"
        )
    return ScoreRules(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=keywords.get("softcap"),
        window=keywords.get("sliding_window"),
        sinks=keywords.get("s_aux"),
    )


def _plain_attention(module, query, key, value, attention_mask, scaling, dropout, keywords):
    """Ordinary attention: torch's own function, explicit scores where it cannot serve."""
    if keywords.get("softcap") is None and keywords.get("s_aux") is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **keywords
        )
    rules = _score_rules(query, scaling, keywords)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)).float() * rules.scale
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if attention_mask is None:  # left to `is_causal`, as torch's own function would
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril(
            scores.shape[-1] - scores.shape[-2]
        )
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    if rules.sinks is not None:
        column = rules.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value).transpose(1, 2), None


_in_pass: contextvars.ContextVar[bool] = contextvars.ContextVar("_in_pass", default=False)


@contextmanager
def thought_pass_scope() -> Iterator[None]:
    """Inside, the model builds no attention mask: the pass knows who sees whom."""
    token = _in_pass.set(True)
    try:
        yield
    finally:
        _in_pass.reset(token)


def thinking_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask function for transformers' interface: none in a pass, torch's own otherwise."""
    if _in_pass.get():
        return None
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION_NAME, thinking_attention)
AttentionMaskInterface.register(ATTENTION_NAME, thinking_mask)
