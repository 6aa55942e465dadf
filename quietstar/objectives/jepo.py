"""JEPO with n samples (arXiv 2503.19618): E[log mean_j p(a* | c_j)], a tighter bound."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from quietstar.losses.weights import ThoughtScores
from quietstar.objectives._policy import (
    PolicyObjective,
    group_logmeanexp,
    logprob_of_targets,
    settings_with,
)


class Jepo(PolicyObjective):
    """The gradient of E[log mean_j p(a* | c_j)] over all K thoughts of a position together.

    A thought's advantage is the bound less what the others reach without it; true tokens count by
    the softmax of their likelihood over the thoughts. Neither uses ``loss.reward``.
    """

    Settings = settings_with(thought_weight=1.0, thought_weighting="softmax")

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.needs_thought = True

    def advantage(self, reward: Tensor, scores: ThoughtScores) -> Tensor:
        """Compute log mean_j p_j - log mean_{j != i} p_j, times K: the loss divides by K."""
        everything, others = group_logmeanexp(logprob_of_targets(scores))
        return (everything - others) * reward.shape[-1]

    @staticmethod
    def problems(config: Any) -> Iterable[tuple[tuple[str, ...], str]]:
        """Refuse what would change nothing: the advantage is not made of the reward."""
        loss, broken = config.loss, False
        unread = ("reward", "estimator", "scaling", "reward_kl_weight")
        for name in (*unread, "min_signal", "thought_weighting"):
            default = Jepo.Settings.model_fields.get(name) or type(loss).model_fields[name]
            value = getattr(loss, name)
            if value != default.default:
                broken = True
                yield (
                    (f"loss.{name}", "loss.objective"),
                    f"loss.{name} ({value}) must be {default.default} with loss.objective: jepo,"
                    " whose advantages are made of the likelihoods of a position's thoughts"
                    " together. Leave it out.",
                )
        if config.thoughts.num_thoughts == 1:
            yield (
                ("thoughts.num_thoughts",),
                "thoughts.num_thoughts (1) must be at least 2 with loss.objective: jepo, which"
                " compares a thought with the others. Raise it, or set loss.objective: log_prob.",
            )
        elif not broken:
            yield from PolicyObjective.problems(config)
