"""The optimizer step that a batch is part of: `Step`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from torch import Tensor

from quietstar.losses.cross_entropy import SoftTargets
from quietstar.losses.weights import Policy


@dataclass(frozen=True)
class Step:
    """The optimizer step that a batch is part of, and what is asked of its thoughts.

    Attributes:
        num_items: N; by default of this batch.
        num_thought_items: M; by default of this batch.
        fixed_mixing_weight: Replacement for the head's output.
        running: As in `ThoughtScores`.
        policy: The model as rewards may ask it; None unless the reward does.
        soft: A teacher's distributions of the targets, (A, B, P, ...); None without one.
        places: The positions in the host's memory; None where it does not know them.
        may_end_early: Whether thoughts can be shorter than others.
        learns: Whether reward and objective are asked. Otherwise thoughts are only scored: with the
            most likely tokens and the logits of ``candidates``, over ``lookahead`` tokens (by
            default the model's), or by the mixed prediction alone with ``only_mixed``.
    """

    num_items: Tensor | int | None = None
    num_thought_items: Tensor | int | None = None
    fixed_mixing_weight: float | None = None
    running: Tensor | None = None
    policy: Policy | None = None
    soft: SoftTargets | None = None
    places: Int[np.ndarray, "batch positions"] | None = None
    may_end_early: bool = True
    learns: bool = True
    only_mixed: bool = False
    lookahead: int | None = None
    candidates: Int[Tensor, " candidates"] | None = None
