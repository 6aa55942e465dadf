"""A constant token in place of every thought token: a control that thinks nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quietstar.sampling.thoughts import Sampling, Texts, ThoughtBatch


class Pause:
    """Fills thoughts with the model's pause token."""

    def sample(
        self, model: Any, texts: Texts, positions: Tensor | None, spec: Sampling
    ) -> ThoughtBatch:
        """Return ``model.pause_token_id`` for every token of every thought."""
        places = texts.input_ids if positions is None else positions
        shape = (*places.shape, spec.num_thoughts, spec.thought_length)
        return ThoughtBatch.of_texts(
            texts, positions, texts.input_ids.new_full(shape, model.pause_token_id)
        )
