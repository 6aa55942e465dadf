"""The loss of Quiet-STaR from given states, its objective and reward bound as in the model."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from quietstar import registry
from quietstar.algorithm import Step, learn_group
from quietstar.attention.layout import (
    IGNORE_INDEX,
    lookahead_states,
    lookahead_targets,
    text_lookahead,
)
from quietstar.losses.groups import Group
from quietstar.losses.next_token import next_token_loss
from quietstar.losses.scores import Scores
from quietstar.sampling.thoughts import Texts, ThoughtBatch


def quiet_star_loss(
    states, weight, thoughts, labels, head, config, temperature, *, num_items=None, weighs=True,
    positions=None, num_thought_items=None, drawn=None, reference=None, reference_text=None,
    running=None,
):  # fmt: skip
    model = SimpleNamespace(
        objective=registry.find("loss.objective", config.objective)(config),
        reward=registry.find("loss.reward", config.reward),
        objective_name=config.objective, reward_name=config.reward,
        output_head=head, policy_temperature=temperature,
    )  # fmt: skip
    texts = Texts(labels, labels, None, torch.arange(len(labels)))
    batch = ThoughtBatch.of_texts(texts, positions, thoughts.permute(2, 3, 1, 0))
    drawn, reference = (x if x is None else x.permute(2, 3, 1, 0) for x in (drawn, reference))
    batch = replace(
        batch, reference_text=reference_text, sampling_logprobs=drawn, reference_logprobs=reference
    )
    targets = lookahead_targets(labels, len(weight), positions)
    base_loss, base, text_valid = next_token_loss(
        states.text, labels, head, num_items, model.objective.base_weight,
        needs_predicted=not weighs,
    )  # fmt: skip
    base_nll = lookahead_states(base.nll.view(labels.shape), len(weight), positions)
    count = (targets != IGNORE_INDEX).any(0).sum()
    count = count if num_thought_items is None else torch.as_tensor(num_thought_items)
    group = Group.__new__(Group)
    vars(group).update(
        texts=slice(None), places=slice(None), tokens=thoughts, targets=targets,
        policy=states.policy, ahead=states.ahead, mixing_weight=weight, rows=None,
        text=text_lookahead(states.text, len(weight), positions),
    )  # fmt: skip
    step, valid = Step(running=running, learns=weighs), (targets != IGNORE_INDEX).movedim(0, -1)
    loss, results = learn_group(model, batch, group, -base_nll, count.clamp(min=1), step, None)
    return base_loss + loss, Scores(
        tokens=batch.tokens, positions=positions, valid=valid, **results,
        base_logprobs=(-base_nll.movedim(0, -1)).where(valid, 0.0),
        text_logprobs=-base.nll.view(labels.shape), text_valid=text_valid,
    )  # fmt: skip
