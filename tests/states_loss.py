"""The loss of Quiet-STaR from given states, its objective and reward bound as in the model."""

import torch

from quietstar import registry
from quietstar.losses.thought_loss import LossTerms, loss_from_states
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.objectives.quiet_star import QuietStar
from quietstar.sampling.thoughts import Texts, ThoughtBatch


class Bound:
    """What `QuietStarForCausalLM` holds of a method, without a model."""

    weigher = QuietStarForCausalLM.weigher

    def __init__(self, config):
        self.objective, self.reward_name = QuietStar(config), config.reward
        self.objective_name = "quiet_star"
        self.reward = registry.find("loss.reward", config.reward)


def quiet_star_loss(
    states, weight, thoughts, labels, head, config, temperature, *, num_items=None, scoring=False,
    positions=None, num_thought_items=None,
):  # fmt: skip
    bound = Bound(config)
    texts = Texts(labels, labels, None, torch.arange(len(labels)))
    batch = ThoughtBatch.of_texts(texts, positions, thoughts.permute(2, 3, 1, 0))
    objective = bound.objective
    terms = LossTerms(
        bound.weigher(batch),
        temperature,
        objective.base_weight,
        objective.draft_weight,
        objective.entropy_weight,
        objective.needs_thought or getattr(bound.reward, "reads_thought", True),
        scoring,
    )
    return loss_from_states(
        states, weight, thoughts, labels, head, terms, num_items, positions, num_thought_items
    )
