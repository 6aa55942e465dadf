"""What benchmarks run on: built-in models with random weights, or folders."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.floor import Sizes
from quietstar.backbone.devices import keep_freed_memory
from quietstar.backbone.loading import load_base
from quietstar.checks import check_room
from quietstar.config import MixingHeadConfig, ThoughtsConfig, loss_config
from quietstar.errors import UserError
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.self_check import use_thinking_attention

MODELS: dict[str, dict[str, Any]] = {
    "mistral-tiny": {
        "model_type": "mistral",
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 688,
        "vocab_size": 2048,
        "sliding_window": None,
        "max_position_embeddings": 8192,
    }
}


def load_plain(name: str, vocab_size: int | None = None) -> PreTrainedModel:
    """A model of `MODELS` with random weights, or one of a folder."""
    if name not in MODELS:
        return load_base(name)
    fields = dict(MODELS[name])
    if vocab_size is not None:
        fields["vocab_size"] = vocab_size
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), trust_remote_code=False
    )


def make_thinker(
    base: PreTrainedModel, args: argparse.Namespace, **thoughts: Any
) -> QuietStarForCausalLM:
    """A Quiet-STaR model around a plain one."""
    use_thinking_attention(base)
    config = ThoughtsConfig(length=args.thought_length, **thoughts)
    size = base.config.vocab_size
    single = thoughts.get("num_thoughts") == 1  # nothing to compare a thought with
    loss = loss_config(estimator="no_baseline" if single else "leave_one_out")
    return QuietStarForCausalLM(base, config, MixingHeadConfig(), loss, size)


@dataclass(frozen=True)
class Contest:
    """A Quiet-STaR model and the plain one of its floor, with the same weights.

    Attributes:
        model: The Quiet-STaR model that is measured.
        plain: A copy of its base.
        tokens: Token ids of random texts, (B, S).
        sizes: Sizes of the step.
    """

    model: QuietStarForCausalLM
    plain: PreTrainedModel
    tokens: Tensor
    sizes: Sizes


def make_contest(args: argparse.Namespace, device: str) -> Contest:
    """Build both of the arguments of `benchmarks.options.sizes_parser`."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = load_plain(args.model, args.vocab_size)
    plain = copy.deepcopy(base)
    names = ("positions", "num_thoughts", "lookahead")
    thoughts = {name: getattr(args, name) for name in names}
    model = make_thinker(base, args, **thoughts, position_fraction=args.share)
    if device == "cpu":  # as in training, once the models are built
        keep_freed_memory()
    plain.to(device)  # pyright: ignore[reportArgumentType]  (a wrapper hides its type)
    tokens = torch.randint(base.config.vocab_size, (args.batch_size, args.seq_len), device=device)
    sizes = Sizes(
        args.batch_size, args.seq_len, args.num_thoughts, args.thought_length, args.lookahead
    )
    try:
        check_room(tokens, model.max_text_length, model.thoughts, sum(model.num_markers))
    except ValueError as problem:
        raise UserError(f"--seq-len: {problem}") from problem
    return Contest(model.to(device), plain, tokens, sizes)
