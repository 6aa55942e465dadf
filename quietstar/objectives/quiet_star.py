"""Quiet-STaR (arXiv 2403.09629): REINFORCE on thoughts beside the likelihood of the true tokens."""

from __future__ import annotations

from quietstar.objectives._policy import PolicyObjective, settings_with


class QuietStar(PolicyObjective):
    """REINFORCE beside NLL terms: base and mixed in the paper (section 4.4); more terms here."""

    Settings = settings_with(
        base_weight=0.3, mixed_weight=0.3, thought_weight=0.4, policy_weight=0.1,
        target_weighting="mean", token_weighting="constant",
    )  # fmt: skip
