"""Plain language modeling, without thoughts: warm-up stages and controls."""

from __future__ import annotations

from quietstar.objectives import Objective


class NextToken(Objective):
    """Learns the next token alone; nothing thinks."""

    thinks = False
    base_weight = 1.0
