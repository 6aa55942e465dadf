"""Refuse by measurement: a tiny copy of the architecture against a per-position loop.

Before a model is used, parallel thoughts on a tiny copy of it are compared with what the copy's own
attention computes for every single thought written out as an ordinary sequence. A model class that
takes its own way (own attention code, dropped keywords, recurrent layers) is refused by name.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from quietstar.attention.interface import ATTENTION_NAME
from quietstar.backbone.output_head import find_output_head
from quietstar.backbone.run import embedding_weight, run_text
from quietstar.backbone.teacher_forced import ThoughtStates, embed_blocks, teacher_forced
from quietstar.errors import UserError
from quietstar.sampling.rollout import policy_states

TOLERANCE = 1e-4
"""Of logits of unit scale, float32; a wrong mask, scale or cap is off by 1e-2 and more."""
_LENGTH, _NUM_THOUGHTS, _THOUGHT_LENGTH, _LOOKAHEAD = 8, 2, 3, 3
_CHOSEN = torch.tensor([1, 4, 6])

_passed: set[tuple[type, str]] = set()


def check_architecture(model: PreTrainedModel) -> None:
    """Compare parallel thoughts on a tiny copy of ``model`` with the per-position loop.

    Raises:
        UserError: The architecture cannot be run in parallel, or comes out wrong.
    """
    key = (type(model), model.config.to_json_string())
    if key in _passed:
        return
    name = f"{type(model).__name__} (model_type {model.config.model_type})"
    try:
        error = worst_error(tiny_model(model))
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        raise UserError(
            f"model.name_or_path: the architecture {name} is not supported: its tiny copy cannot "
            f"run thoughts in parallel ({reason[:160]}). Choose one that README lists."
        ) from problem
    if not error < TOLERANCE:
        raise UserError(
            f"model.name_or_path: the architecture {name} is not supported: parallel thoughts "
            f"differ from the per-position loop by {error:.2g} in the logits (at most {TOLERANCE}"
            " is rounding). Its attention takes a way of its own. Choose one that README lists."
        )
    _passed.add(key)


def use_thinking_attention(model: PreTrainedModel) -> None:
    """Switch the model's attention layers to ``quietstar``; without a pass they act as before.

    Raises:
        ValueError: The model's attention does not go through transformers' attention interface.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would only warn, and keep its own attention
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise ValueError("its attention code does not use transformers' attention interface")


@torch.no_grad()
def worst_error(model: PreTrainedModel) -> float:
    """Largest difference of any logit between the parallel way and the per-position loop."""
    embed = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(1)
    vocab_size = embedding_weight(model).shape[0]
    text = torch.randint(1, vocab_size, (1, _LENGTH), generator=generator)
    shape = (_THOUGHT_LENGTH, _NUM_THOUGHTS, 1, _LENGTH)
    thoughts = torch.randint(1, vocab_size, shape, generator=generator)
    start, end = torch.randn(3, embed(text).shape[-1], generator=generator).split([2, 1])

    # First with the copy's own attention: every thought as a sequence of its own.
    slow = [_loop_logits(model, text, thoughts, start, end, i) for i in range(_LENGTH)]
    plain = model(input_ids=text).logits[0]
    use_thinking_attention(model)
    head = find_output_head(model)

    def learned(thoughts: Tensor, positions: Tensor | None = None) -> ThoughtStates:
        blocks = embed_blocks(model, start, end, text, thoughts, _LOOKAHEAD, positions)
        return teacher_forced(model, run_text(model, text), blocks)

    states = learned(thoughts)
    pairs = [
        (head.logits(states.text[0]), plain),
        (model(input_ids=text).logits[0], plain),
        (policy_states(model, start, text, thoughts), states.policy),
    ]
    for position, logits in enumerate(slow):
        true = min(_LOOKAHEAD, _LENGTH - position)
        rows = torch.cat([states.policy[:, :, 0, position], states.ahead[:true, :, 0, position]])
        pairs.append((head.logits(rows.transpose(0, 1)), logits))

    # Thoughts at chosen positions only are those of all; after the end of the text fillers differ.
    places, chosen = _CHOSEN.expand(1, -1), thoughts[..., _CHOSEN]
    some, policy = learned(chosen, places), states.policy[..., _CHOSEN, :]
    real = (_CHOSEN + torch.arange(_LOOKAHEAD)[:, None] < _LENGTH)[:, None, None, :, None]
    pairs += [
        (some.text, states.text),
        (some.policy, policy),
        (policy_states(model, start, text, chosen, places), policy),
        (some.ahead.where(real, 0.0), states.ahead[..., _CHOSEN, :].where(real, 0.0)),
    ]
    errors = torch.stack([(a.float() - b.float()).abs().max() for a, b in pairs])
    return errors.max().nan_to_num(torch.inf).item()


def _loop_logits(
    model: PreTrainedModel, text: Tensor, thoughts: Tensor, start: Tensor, end: Tensor, i: int
) -> Tensor:
    """Logits at every token of the blocks after position i that predicts one, (K, T + A', V).

    The copy's own attention runs ``x_1..x_i start.. t_1..t_T end.. x_{i+1}..`` as one sequence.
    """
    embed = model.get_input_embeddings()
    before, after = embed(text[0, : i + 1]), embed(text[0, i + 1 : i + _LOOKAHEAD])
    sequences = [
        torch.cat([before, start, embed(thought), end, after]) for thought in thoughts[:, :, 0, i].T
    ]
    output = model(inputs_embeds=torch.stack(sequences), use_cache=False)
    block = output.logits[:, i + len(start) :]  # from the last start token on
    first_ahead = _THOUGHT_LENGTH + len(end)
    return torch.cat([block[:, :_THOUGHT_LENGTH], block[:, first_ahead:]], 1)


_SIZES = {
    "intermediate_size": 48,
    "ffn_dim": 48,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "vocab_size": 61,
    "vocab_size_per_layer_input": 61,
    "rotary_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_PEAKED = ("q_proj", "k_proj", "query", "key", "qkv", "c_attn", "q_b_proj", "kv_b_proj", "Wqkv")


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture, small: few layers (one of each kind), heads, experts and words."""
    tiny = copy.deepcopy(config)
    for name, value in _SIZES.items():
        if _number(tiny, name):
            setattr(tiny, name, min(value, getattr(tiny, name)))
    for name in _TOKEN_IDS:
        setattr(tiny, name, None)
    # Whether and how query heads share keys is kept; 2 key/value heads at most, heads of 16.
    heads, old_width = tiny.num_attention_heads, tiny.hidden_size
    kv_heads = getattr(tiny, "num_key_value_heads", None)
    tiny.num_attention_heads = 4
    if kv_heads is not None:
        tiny.num_key_value_heads = 1 if kv_heads == 1 else 2
        tiny.num_attention_heads = tiny.num_key_value_heads * (1 if kv_heads == heads else 2)
    # The factor lists of long rotary embeddings have the length of the real head.
    rope = getattr(tiny, "rope_parameters", None) or {}
    keeps_size = any(isinstance(value, list) for value in rope.values())
    head_size = old_width // heads if keeps_size else 16
    latent = _number(tiny, "qk_rope_head_dim")  # latent attention: small sizes of its own
    if "head_dim" in vars(tiny) and _number(tiny, "head_dim") and not latent:
        head_size = tiny.head_dim if keeps_size else 16
        tiny.head_dim = head_size
    tiny.hidden_size = tiny.num_attention_heads * head_size
    if _number(tiny, "word_embed_proj_dim"):
        same = tiny.word_embed_proj_dim == old_width
        tiny.word_embed_proj_dim = tiny.hidden_size if same else tiny.hidden_size // 2
    # The first layer of each kind, two layers at least.
    old = tiny.num_hidden_layers
    kinds: list[Any] = list(getattr(tiny, "layer_types", None) or [None] * old)
    layers = sorted({kinds.index(kind) for kind in kinds})
    if len(layers) < 2:
        layers = list(range(min(old, 2)))
    tiny.num_hidden_layers = len(layers)
    for name, value in list(vars(tiny).items()):
        if isinstance(value, list) and len(value) == old:
            setattr(tiny, name, [value[i] for i in layers])
        elif name in _WINDOWS and _number(tiny, name):
            setattr(tiny, name, min(4, value))  # shorter than the text of the check
        elif "softcapping" in name and _number(tiny, name):
            setattr(tiny, name, 3.0)  # low enough to bend its logits
    return tiny


def _number(config: PreTrainedConfig, name: str) -> bool:
    value = getattr(config, name, None)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@torch.no_grad()
def tiny_model(model: PreTrainedModel) -> PreTrainedModel:
    """A tiny copy of a causal LM in float32 on the CPU, with weights that make faults show.

    Matrices have unit gain, queries and keys twice that (so that attention is peaked), and
    biases, norms and sinks are not at their neutral values.
    """
    config = tiny_config(model.config)
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        tiny = type(model)(config).float().eval()
    for name, parameter in tiny.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            gain = 0.5 if "sink" in name else 0.1
            parameter.add_(noise * gain)
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.copy_(noise)
        else:
            gain = 2.0 if any(part in name for part in _PEAKED) else 1.0
            parameter.copy_(noise * gain * parameter.shape[-1] ** -0.5)
    return tiny
