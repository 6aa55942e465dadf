"""Parallel attention, registered with transformers' attention interface.

The model's own attention layers call `thinking_attention`. Without a pass in its keywords it is
ordinary attention, so that the model stays a plain causal LM; with one it does what the pass says
(`quietstar.attention.passes`).
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

from quietstar.attention.dense import ScoreRules, softcapped, softmax_with_sinks
from quietstar.attention.live_pass import LiveStep
from quietstar.attention.passes import Pass, RolloutStep

ATTENTION_NAME = "quietstar"

# What transformers hands to every attention function and what our passes settle themselves
# (positions and causality come from the layout) or do not need.
_SETTLED_KEYWORDS = frozenset(
    {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}
    | {"output_hidden_states", "return_dict", "output_router_logits", "cu_seq_lens_q"}
    | {"position_embeddings", "num_items_in_batch", "logits_to_keep", "layer_idx"}
)


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
    if torch.compiler.is_compiling() and isinstance(thought_pass, (RolloutStep, LiveStep)):
        rules = _score_rules(query, scaling, keywords)
        arguments = (rules.scale, rules.softcap, rules.window, rules.sinks)
        return rollout_attention(query, key, value, *arguments), None
    arguments = (module, query, key, value, attention_mask, scaling, dropout, thought_pass)
    return _not_compiled(*arguments, keywords)  # pyright: ignore[reportCallIssue]


@torch.compiler.disable
def _not_compiled(module, query, key, value, mask, scaling, dropout, thought_pass, keywords):
    """Attention of a pass, or that of an ordinary causal LM."""
    if thought_pass is not None:
        if dropout:
            raise ValueError(
                f"attention dropout ({dropout}) must be 0: with it the learn pass would score "
                "other thoughts than the rollout sampled. Load the model with "
                "QuietStarForCausalLM.from_base."
            )
        rules = _score_rules(query, scaling, keywords)
        out = thought_pass.attend(module, *_of_one_dtype(query, key, value), rules)
        return out.transpose(1, 2), None
    if keywords.get("softcap") is None and keywords.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **keywords)
    rules = _score_rules(query, scaling, keywords)  # torch's own function takes no such scores
    heads = (key.shape[1], query.shape[1] // key.shape[1])
    key, value = (x.repeat_interleave(heads[1], dim=1) for x in (key, value))
    scores = softcapped((query @ key.transpose(-1, -2)).float() * rules.scale, rules)
    if mask is None:  # left to `is_causal`, as torch's own function would
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        mask = seen.tril(scores.shape[-1] - scores.shape[-2])
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = softmax_with_sinks(scores.unflatten(1, heads), rules.sinks).flatten(1, 2)
    return (weights.to(value.dtype) @ value).transpose(1, 2), None


def _of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast rotary embeddings leave queries and keys in float32 beside bfloat16 values.

    Every attention kernel wants the one dtype that the matrix products use.
    """
    return query.to(value.dtype), key.to(value.dtype), value


@torch.library.custom_op(
    "quietstar::rollout_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, float scale, float? softcap, int? window, "
    "Tensor? sinks) -> Tensor",
)
def rollout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of the next layer in a step of the rollout, as one operator of a compiled graph.

    What else it reads (the keys of the text and of the thoughts so far) is the running pass's. So
    layers share their compiled code, and it has no break at the attention.
    """
    step = _running.get()
    assert isinstance(step, (RolloutStep, LiveStep)), "compiled for the rollout"
    rules = ScoreRules(scale, softcap, window, sinks)
    out = step.attend(None, *_of_one_dtype(query, key, value), rules)
    return out.transpose(1, 2).contiguous()


@rollout_attention.register_fake
def _(query, key, value, scale, softcap, window, sinks):
    rows, heads, tokens, _ = query.shape
    return value.new_empty(rows, tokens, heads, value.shape[-1])


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


WHOLE_TEXTS = "whole texts"
"""In place of a pass: an ordinary causal LM, whose texts have no padding that anything sees."""

_running: contextvars.ContextVar[Pass | str | None] = contextvars.ContextVar(
    "_running", default=None
)


@contextmanager
def thought_pass_scope(thought_pass: Pass | str) -> Iterator[None]:
    """Inside, the model builds no attention mask: the pass knows who sees whom."""
    token = _running.set(thought_pass)
    try:
        yield
    finally:
        _running.reset(token)


def thinking_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask function for transformers' interface: none in a pass, torch's own otherwise.

    Whether there is padding in whole texts it need not ask, which would wait for a device.
    """
    running = _running.get()
    if running == WHOLE_TEXTS:
        kwargs = kwargs | {"attention_mask": None}
    return sdpa_mask(*args, **kwargs) if running in (None, WHOLE_TEXTS) else None


AttentionInterface.register(ATTENTION_NAME, thinking_attention)
AttentionMaskInterface.register(ATTENTION_NAME, thinking_mask)
