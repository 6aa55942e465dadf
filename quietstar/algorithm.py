"""Quiet-STaR on one page: from texts to a loss (arXiv 2403.09629, section 4).

B texts of S tokens; P positions of each think; K thoughts at each have up to T tokens, and are
scored on the A ground-truth tokens after their position (the lookahead). D is the model's width.

1. `choose` where to think: positions (B, P).
2. `draw` the thoughts, all positions in parallel: tokens (B, P, K, T), -1 after the end of one that
   stops early. The text runs once; K thoughts share its keys and values, and a position's start
   tokens (`quietstar.sampling.rollout`, `quietstar.attention`).
3. `learn` from them. Thoughts are read again, with gradient, in groups (`quietstar.losses.groups`).
   The mixing head blends the logits after a thought with those without; `weigh` rewards a thought
   by what it did to the ground-truth tokens, and makes advantages of rewards; the loss is that of
   the text, of the predictions after thoughts, and REINFORCE on the thoughts' own tokens.

Every sum is divided by a count of the *whole* optimizer step, over micro-batches and ranks: N next
tokens, M positions with a target after them. So the parts of a step add up, however it is cut.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from quietstar import registry
from quietstar.attention.layout import IGNORE_INDEX, lookahead_states, to_device
from quietstar.backbone.run import TextRun
from quietstar.checks import check_drawn, check_output, check_weights
from quietstar.losses.groups import Group, Groups
from quietstar.losses.next_token import next_token_loss, position_scores
from quietstar.losses.policy import policy_loss, thought_logprobs
from quietstar.losses.predictions import Predictions
from quietstar.losses.scores import Scores, by_position
from quietstar.losses.step import Step
from quietstar.losses.weights import ThoughtScores, ThoughtWeights
from quietstar.objectives import Objective
from quietstar.sampling.positions import SCORED_RULES, choose_positions
from quietstar.sampling.thoughts import Sampling, Texts, ThoughtBatch


@torch.no_grad()
def choose(
    model: Any, texts: Texts, seed: int, explore: bool
) -> Int[Tensor, "batch positions"] | None:
    """Choose where to think by ``thoughts.positions``; None for all positions."""
    if texts.places is not None:
        return to_device(texts.places, texts.input_ids.device)
    rule, score = model.thoughts.positions, None
    if rule in SCORED_RULES:
        assert texts.run is not None, "the text ran"
        score = position_scores(rule, texts.run.states, model.mixing_head, model.output_head)
    return choose_positions(
        rule, model.thoughts.position_fraction, texts.labels, answers=texts.answer_mask,
        marked=texts.marked, score=score, sample_ids=texts.sample_ids, seed=seed, explore=explore,
    )  # fmt: skip


@torch.no_grad()
def draw(
    model: Any, texts: Texts, positions: Int[Tensor, "batch positions"] | None, sampling: Sampling
) -> ThoughtBatch:
    """Draw K thoughts at every position, in parallel, by ``thoughts.sampler``."""
    name = model.thoughts.sampler
    with registry.running("thoughts.sampler", name):
        batch = model.sampler.sample(model, texts, positions, sampling)
    check_drawn(batch, texts, positions, sampling, model.num_embeddings, name)
    return batch


def learn(
    model: Any,
    text: TextRun,
    batch: ThoughtBatch,
    positions: Int[Tensor, "batch positions"] | None,
    step: Step,
) -> tuple[Float[Tensor, ""], Scores]:
    """Compute the loss of texts and their thoughts; and what the thoughts did, without gradient.

    Args:
        model: `QuietStarForCausalLM` that learns.
        text: Keys, values and states of the texts, with their graph.
        batch: The texts and their thoughts.
        positions: Where these are; None for all positions.
        step: Counts of the whole step.
    """
    groups = Groups(
        model, text, batch, positions, step.lookahead or model.thoughts.lookahead,
        step.fixed_mixing_weight, step.may_end_early, step.places,
    )  # fmt: skip
    valid = rearrange(groups.targets != IGNORE_INDEX, "a b p -> b p a")
    results: dict[str, Any] = {}  # of all positions; zeros where no group was
    loss, base_ahead = groups.loss, None
    if not step.only_mixed:
        loss, base, text_valid = next_token_loss(  # sum_i -log p(x_{i+1}) / N
            text.states, batch.labels, model.output_head, step.num_items,
            model.objective.base_weight, groups.accumulator, needs_predicted=not step.learns,
        )  # fmt: skip
        text_logprobs = -base.nll.view(batch.labels.shape)
        base_ahead = lookahead_states(text_logprobs, valid.shape[2], positions)  # (A, B, P)
        base_logprobs = rearrange(base_ahead, "a b p -> b p a").where(valid, 0.0)
        results |= {"text_logprobs": text_logprobs, "text_valid": text_valid,
                    "base_logprobs": base_logprobs}  # fmt: skip
        if base.predicted is not None:
            results["base_predicted"] = base.predicted.view(batch.labels.shape)
    given = step.num_thought_items
    count = (valid.any(-1).sum() if given is None else torch.as_tensor(given)).clamp(min=1)  # M
    for group in groups:
        group_loss, parts = learn_group(model, batch, group, base_ahead, count, step,
                                        groups.accumulator)  # fmt: skip
        groups.learn(group, group_loss)
        for name, part in parts.items():
            if part is not None and results.get(name) is None:
                results[name] = part.new_zeros(*valid.shape[:2], *part.shape[2:])
            if part is not None:
                results[name][group.texts, group.places] = part
    loss = groups.loss if step.only_mixed else loss + groups.loss
    return loss, Scores(tokens=batch.tokens, positions=positions, valid=valid, **results)


def learn_group(
    model: Any,
    batch: ThoughtBatch,
    group: Group,
    base_logprobs: Float[Tensor, "lookahead all_texts all_positions"] | None,
    count: Int[Tensor, ""],
    step: Step,
    accumulator: Any,
) -> tuple[Float[Tensor, ""], dict[str, Tensor | None]]:
    """Compute the loss of some positions of some texts, and what their thoughts did (`Scores`).

        mixed    sum_{a,k,i}  u(i,k,a) * -log p_mixed(x_{i+a})     / (A K M)
        thought  sum_{a,k,i}  v(i,k,a) * -log p_thought(x_{i+a})   / (A K M)
        policy   sum_{k,i}    g(i,k)   * -sum_t log p(t) / L       / (K M)

    with the weights u, v and advantages g of `weigh`. The policy term is clipped where thoughts
    were drawn by an earlier policy (`quietstar.losses.policy`).
    """
    head, where = model.output_head, (group.texts, group.places)
    objective: Objective = model.objective if step.learns else Objective(None)
    temperature = model.policy_temperature if step.learns else 1.0
    thoughts = batch.part(*where)
    drawn, reference = (
        None if x is None else rearrange(x, "b p k t -> t k b p")
        for x in (thoughts.sampling_logprobs, thoughts.reference_logprobs)
    )
    has_target, log_ratio = (group.targets != IGNORE_INDEX).any(0), None
    if objective.needs_log_ratio and reference is not None:  # of each thought's tokens together
        by_policy = drawn
        if by_policy is None:
            by_policy = thought_logprobs(group.policy, group.tokens, head, temperature)
        gap = (by_policy - reference).where(has_target & (group.tokens >= 0), 0.0)
        log_ratio = by_position(gap.sum(0))

    reads_thought = objective.needs_thought or getattr(model.reward, "reads_thought", True)
    predictions = Predictions(
        head, group.text, group.ahead, group.mixing_weight, group.targets,
        None if base_logprobs is None else -base_logprobs[(..., *where)],
        None if step.soft is None else step.soft.part((slice(None), *where)), accumulator,
        needs_thought=reads_thought if step.learns else not step.only_mixed,
        needs_predicted=not step.learns,
    )  # fmt: skip
    everything = None
    if step.learns and step.policy is not None:  # such a reward is asked once for the group
        everything = weigh(model, thoughts, predictions.known(), log_ratio, step)
    num_targets = 1 if objective.target_weighting == "sum" else len(group.targets)
    for chunk in predictions:  # logits exist for a chunk at a time, and are made once
        some = chunk.texts, chunk.places
        if everything is not None:
            chunk.learn(everything.part(*some), num_targets * group.tokens.shape[1] * count)
        elif step.learns:
            ratio = None if log_ratio is None else log_ratio[some]
            weights = weigh(model, thoughts.part(*some), chunk.scores, ratio, step)
            chunk.learn(weights, num_targets * group.tokens.shape[1] * count)

    loss, policy = predictions.loss, {}
    if not step.only_mixed:
        policy_term, of_policy = policy_loss(
            group.policy, group.tokens, has_target, predictions.advantage, objective, temperature,
            count.to(loss.dtype), head, drawn=drawn, reference=reference,
            rows=group.rows, accumulator=accumulator,
        )  # fmt: skip
        loss, policy = loss + policy_term, of_policy._asdict()
    parts = policy | predictions.results()
    results = {name: by_position(x) for name, x in parts.items()}
    if step.candidates is not None:
        results["candidates"] = predictions.candidates(step.candidates)
    return loss, results


@torch.no_grad()
def weigh(
    model: Any,
    thoughts: ThoughtBatch,
    scores: ThoughtScores,
    log_ratio: Float[Tensor, "batch positions thoughts"] | None,
    step: Step,
) -> ThoughtWeights:
    """Reward every thought, (B, P, K), and let the objective weigh it against the others.

    The baseline, such as the mean reward of a position's other thoughts, is the objective's
    (`quietstar.losses.estimators`).
    """
    reference = None
    if thoughts.reference_text is not None:
        ahead = lookahead_states(
            thoughts.reference_text, scores.valid.shape[2], thoughts.positions.clamp(min=0)
        )
        reference = rearrange(ahead, "a b p -> b p a").where(scores.valid, 0.0)
    scores = replace(
        scores, reference=reference, log_ratio=log_ratio, lengths=thoughts.lengths,
        running=step.running, policy=step.policy,
    )  # fmt: skip
    device, name = scores.mixed.device, f"loss.reward ({model.reward_name})"
    reward, advantage = thoughts.reward, thoughts.advantage
    if reward is None or advantage is None:  # later updates of a step keep those of the first
        with registry.running("loss.reward", model.reward_name):
            reward = model.reward(thoughts, scores)
    check_output(reward, thoughts.lengths.shape, device, name)
    with registry.running("loss.objective", model.objective_name):
        weights = model.objective.weigh(reward, scores)
    check_weights(weights, thoughts, scores, f"loss.objective ({model.objective_name})")
    if thoughts.reward is not None:
        thoughts.reward.copy_(reward)
    if weights.reward is None:
        weights = replace(weights, reward=reward)
    return weights if advantage is None else replace(weights, advantage=advantage)
