"""LaTRO (arXiv 2411.04282): E_c[log p(a* | c)] with thoughts kept close to where they began."""

from __future__ import annotations

from quietstar.objectives._policy import PolicyObjective, settings_with


class Latro(PolicyObjective):
    """The gradient of E_c[log p(a* | c) - beta log(pi(c) / pi_ref(c))] (section 3.2)."""

    Settings = settings_with(thought_weight=1.0, reward_kl_weight=0.05, reference="base")
