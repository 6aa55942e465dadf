"""VeriFree (arXiv 2505.21493): E_c[p(a* | c)], the chance to answer right after thinking."""

from __future__ import annotations

from quietstar.objectives._policy import PolicyObjective, settings_with


class Verifree(PolicyObjective):
    """The gradient of E_c[p(a* | c)]: thoughts by REINFORCE, true tokens with their probability."""

    Settings = settings_with(reward="prob", thought_weight=1.0, thought_weighting="reward")
