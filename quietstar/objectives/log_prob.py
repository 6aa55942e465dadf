"""Rewards by log-probability (arXiv 2602.03979): E_c[log p(a* | c)], in both of its factors."""

from __future__ import annotations

from quietstar.objectives._policy import PolicyObjective, settings_with


class LogProb(PolicyObjective):
    """The gradient of E_c[log p(a* | c)]: thoughts by REINFORCE, true tokens with weight 1.

    JEPO with one sample (arXiv 2503.19618, section 3) is the same.
    """

    Settings = settings_with(thought_weight=1.0)
