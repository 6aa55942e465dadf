"""Thoughts that the model itself samples, at all positions in parallel."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from quietstar.sampling.rollout import sample_thoughts
from quietstar.sampling.thoughts import Sampling, Texts, ThoughtBatch


class Rollout:
    """Samples thoughts from the model, token by token for all positions at once."""

    def sample(
        self, model: Any, texts: Texts, positions: Tensor | None, spec: Sampling
    ) -> ThoughtBatch:
        """Draw thoughts (`quietstar.sampling.rollout.sample_thoughts`)."""
        tokens = sample_thoughts(
            model.causal_lm, model.output_head, model.start_vectors, texts.input_ids,
            texts.sample_ids, spec, positions, texts.run, model.passes_together, texts.places,
        )  # fmt: skip
        return ThoughtBatch.of_texts(texts, positions, rearrange(tokens, "t k b p -> b p k t"))
