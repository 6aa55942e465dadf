"""RLP (arXiv 2510.01265): thoughts are reinforced by the information they add, and nothing else."""

from __future__ import annotations

from quietstar.objectives._policy import PolicyObjective, settings_with


class Rlp(PolicyObjective):
    """The policy term alone: no loss on true tokens, so likelihood rises by thinking only.

    A thought's tokens count their mean, as in the paper (section 2): where thoughts end early its
    gradient is that of the expected reward only with ``loss.token_weighting: sum``.
    """

    Settings = settings_with(reward="information_gain", token_weighting="mean")
