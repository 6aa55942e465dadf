"""How a plain causal LM becomes one that thinks: `from_base`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar.backbone.loading import drop_dropout_layers, load_base
from quietstar.backbone.run import embedding_weight
from quietstar.config import LossConfig, MixingHeadConfig, ThoughtsConfig, TuningConfig
from quietstar.config.loading import read_sections
from quietstar.data.tokenizer import check_tokenizer_fits, load_tokenizer
from quietstar.model import saving
from quietstar.model.markers import initial_vectors, marker_tokens
from quietstar.model.self_check import check_architecture, use_thinking_attention
from quietstar.model.tuning import apply_tuning, quantization


def from_base(
    cls: Any,
    name_or_path: str | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    thoughts: ThoughtsConfig | Mapping[str, Any] | None = None,
    mixing_head: MixingHeadConfig | Mapping[str, Any] | None = None,
    loss: LossConfig | Mapping[str, Any] | None = None,
    tuning: TuningConfig | Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    **hub: Any,
) -> Any:
    """Turn a plain causal LM into one that thinks.

    The sections of a config (``thoughts``, ``mixing_head``, ``loss``, ``tuning``) are given as
    their classes or as mappings of their keys, such as ``thoughts={"length": 4}``.

    Args:
        cls: `QuietStarForCausalLM`, of which this is a method.
        name_or_path: Hub id, folder, or a loaded model.
        tokenizer: Tokenizer; defaults to the one saved with the model.
        thoughts: Length, lookahead, number, temperature, initial vectors.
        mixing_head: Settings of the head.
        loss: Objective, reward and their settings, for training.
        tuning: Way to tune the base model.
        dtype: Type of the weights; float32 trains safely with small learning rates.
        trust_remote_code: Whether code that comes with the model may run.
        device_map: Where the weights go; this and ``max_memory`` as in `from_pretrained`.
        max_memory: Bytes that weights may take, with a ``device_map`` of "auto".
        **hub: Options of downloads, as in `from_pretrained`.

    Raises:
        UserError: A section or an argument is wrong, the model cannot be loaded or its
            architecture is not supported, or the tokenizer does not fit it.
    """
    given = {"thoughts": thoughts, "mixing_head": mixing_head, "loss": loss, "tuning": tuning}
    unknown = sorted(hub.keys() - saving.OF_DOWNLOADS)
    sections = read_sections("from_base", given, unknown)
    hub["trust_remote_code"] = trust_remote_code
    if isinstance(name_or_path, str):
        tokenizer = tokenizer or load_tokenizer(name_or_path, what="model.name_or_path", **hub)
        base = load_base(
            name_or_path, dtype=dtype, quantization=quantization(sections["tuning"]),
            device_map=device_map, max_memory=max_memory, **hub,
        )  # fmt: skip
    else:
        base = name_or_path
        drop_dropout_layers(base)
        tokenizer = tokenizer or load_tokenizer(str(base.name_or_path), **hub)
    check_architecture(base)
    check_tokenizer_fits(tokenizer, embedding_weight(base).shape[0])
    use_thinking_attention(base)
    start, end = marker_tokens(tokenizer, sections["thoughts"])
    model = cls(
        apply_tuning(base, sections["tuning"]),
        sections["thoughts"],
        sections["mixing_head"],
        sections["loss"],
        len(tokenizer),
        start[0],
        sections["tuning"],
        tokenizer,
        (len(start), len(end)),
    )
    vectors = initial_vectors(model, tokenizer)
    with torch.no_grad():
        model.start_embedding.copy_(vectors[0])
        model.end_embedding.copy_(vectors[1])
    return model
