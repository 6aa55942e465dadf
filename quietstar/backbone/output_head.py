"""From final states to logits: the weight, and the scale or soft cap that a model applies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from quietstar.attention.kernels import at_least_float32

# config name -> multiplier of the logits, as transformers' models apply it
_SCALES = {
    "logit_scale": lambda value: value,  # cohere
    "logits_scaling": lambda value: 1.0 / value,  # granite
    "lm_head_multiplier": lambda value: value,  # falcon_h1
}


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap(scale * (states @ weight.T + bias)).

    Attributes:
        module: The model's own output layer, called where it is no plain linear layer.
        weight: Output weight, (V, D).
        bias: (V,) or None.
        scale: Multiplies the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        vocab_size: Rows that may be sampled; a padded vocabulary has more.
    """

    module: torch.nn.Module
    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    @property
    def is_linear(self) -> bool:
        """Whether mixing logits is mixing states, and the fused cross entropy serves."""
        return self.softcap is None and type(self.module) is torch.nn.Linear

    def logits(self, states: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        """Logits in float32 or wider over the whole vocabulary."""
        return self._finished(self.module(states.to(self.weight.dtype)))

    def candidate_logits(
        self, states: Float[Tensor, "*rows width"], candidates: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "*rows candidates"]:
        """Logits of a few tokens, in float32 or wider, without those of the others."""
        if type(self.module) is not torch.nn.Linear:
            return self.logits(states)[..., candidates]
        bias = None if self.bias is None else self.bias[candidates]
        few = F.linear(states.to(self.weight.dtype), self.weight[candidates], bias)
        return self._finished(few)

    def _finished(self, products: Tensor) -> Tensor:
        logits = at_least_float32(products)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def num_logits(self) -> int:
        """V."""
        return self.weight.shape[0]

    def sampled_only(self) -> OutputHead:
        """The same head over the rows that may be sampled (linear heads)."""
        if self.vocab_size is None or self.vocab_size == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        return replace(self, weight=self.weight[: self.vocab_size], bias=bias)


def find_output_head(model: PreTrainedModel, vocab_size: int | None = None) -> OutputHead:
    """Read the output head of a causal LM; the self-check compares what it gives.

    Raises:
        ValueError: The model has no output layer.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(f"{type(model).__name__} has no output layer (get_output_embeddings)")
    config = model.config.get_text_config()
    return OutputHead(
        module=module,
        weight=module.weight,
        bias=getattr(module, "bias", None),
        scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
        vocab_size=vocab_size,
    )


def _logit_scale(config: PreTrainedConfig) -> float:
    scale = 1.0
    for name, multiplier in _SCALES.items():
        value = getattr(config, name, None)
        if value is not None:
            scale *= multiplier(float(value))
    return scale
