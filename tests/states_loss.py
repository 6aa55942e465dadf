"""The loss of Quiet-STaR from given states, its objective and reward bound as in the model."""

from dataclasses import replace

import torch

from quietstar import registry
from quietstar.losses.thought_loss import loss_from_states
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.sampling.thoughts import Texts, ThoughtBatch


class Bound:
    """What `QuietStarForCausalLM` holds of a method, without a model."""

    weigher, _asks_policy = QuietStarForCausalLM.weigher, False

    def __init__(self, config):
        self.objective_name, self.reward_name = config.objective, config.reward
        self.objective = registry.find("loss.objective", config.objective)(config)
        self.reward = registry.find("loss.reward", config.reward)


def quiet_star_loss(
    states, weight, thoughts, labels, head, config, temperature, *, num_items=None, scoring=False,
    positions=None, num_thought_items=None, drawn=None, reference=None, reference_text=None,
    running=None,
):  # fmt: skip
    bound = Bound(config)
    texts = Texts(labels, labels, None, torch.arange(len(labels)))
    batch = ThoughtBatch.of_texts(texts, positions, thoughts.permute(2, 3, 1, 0))
    batch = replace(batch, reference_text=reference_text)
    terms = bound.objective.terms(
        bound.weigher(batch, running), temperature, getattr(bound.reward, "reads_thought", True)
    )
    terms = replace(terms, scoring=scoring)
    return loss_from_states(
        states, weight, thoughts, labels, head, terms, num_items, positions, num_thought_items,
        drawn=drawn, reference=reference,
    )  # fmt: skip
