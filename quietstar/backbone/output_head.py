"""From final states to logits: the weight, and the scale or soft cap that a model applies."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from quietstar.attention.kernels import at_least_float32


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
        return self._finished(self.module(self._rows(states)), states)

    def candidate_logits(
        self, states: Float[Tensor, "*rows width"], candidates: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "*rows candidates"]:
        """Logits of a few tokens, in float32 or wider, without those of the others."""
        if type(self.module) is not torch.nn.Linear:
            return self.logits(states)[..., candidates]
        bias = None if self.bias is None else self.bias[candidates]
        few = F.linear(self._rows(states), self.weight[candidates], bias)
        return self._finished(few, states)

    def _rows(self, states: Tensor) -> Tensor:
        """One row for each state.

        With more dimensions and a frozen weight, torch may copy the whole weight once for each
        index of the leading ones (where `states` is a slice), which is gigabytes.
        """
        return states.to(self.weight.dtype).reshape(-1, states.shape[-1])

    def _finished(self, products: Tensor, states: Tensor) -> Tensor:
        logits = at_least_float32(products).view(*states.shape[:-1], products.shape[-1])
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def num_logits(self) -> int:
        """V, rows that are never sampled included."""
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
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(module, "bias", None)
    return OutputHead(module, module.weight, bias, _logit_scale(config), softcap, vocab_size)


def _logit_scale(config: PreTrainedConfig) -> float:
    # as transformers' models of cohere, falcon_h1 and granite apply them
    values = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
    scale = math.prod((float(x) for x in values if x is not None), start=1.0)
    divisor = getattr(config, "logits_scaling", None)
    return scale if divisor is None else scale / float(divisor)
