"""The oracle: every thought written out as one ordinary sequence, position by position.

Nothing of the package's engine or losses is used, only the parameters of its model: a copy of the
causal LM with eager attention runs ``x_1..x_i start.. t_1..t_T end.. x_{i+1}..x_{i+A-1}`` for each
text, position and thought, and the losses follow by their formulas. Slow, and meant to be obvious.

Letters: B texts, S tokens, K thoughts, T thought tokens, A lookahead, D width. Indices from 0.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar import QuietStarForCausalLM


@dataclass
class Reference:
    """What the loop gives; tables are zero where there is nothing to compute.

    Attributes:
        model: The copy; ``loss.backward()`` leaves the gradients in its parameters.
        loss: Scalar, differentiable.
        text: (B, S, D), final states of the text.
        policy: (T, K, B, S, D), states that predict the thought tokens.
        ahead: (A, K, B, S, D), states from the end token on.
        mixing_weight, thought_logprobs, mixed_logprobs: (A, K, B, S).
        base_logprobs: (A, B, S).
        policy_logprobs: (T, K, B, S), of the thought tokens, at the policy temperature.
        policy_argmax: (T, K, B, S), the most likely token in place of each thought token.
        real: (B, S), tokens that are not padding.
        reached: (A, B, S), where the block's true tokens are inside the text.
        valid: (A, B, S), where there is a target.
    """

    model: QuietStarForCausalLM
    loss: Tensor
    text: Tensor
    policy: Tensor
    ahead: Tensor
    mixing_weight: Tensor
    base_logprobs: Tensor
    thought_logprobs: Tensor
    mixed_logprobs: Tensor
    policy_logprobs: Tensor
    policy_argmax: Tensor
    real: Tensor
    reached: Tensor
    valid: Tensor


def run_reference(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    lengths: list[int],
    thoughts: Tensor,
    labels: Tensor | None = None,
    positions: Tensor | None = None,
) -> Reference:
    """Loss and tables by the loop.

    Args:
        model: Any; it is copied.
        input_ids: (B, S).
        lengths: Real tokens of each text; the rest is padding.
        thoughts: (B, K, S, T), -1 after the last token of a thought that ends early.
        labels: (B, S), -100 where a token is no target; default: all real tokens are.
        positions: (B, S), whether there are thoughts; default: at all. Elsewhere ``thoughts`` are
            not read.
    """
    model = copy.deepcopy(model)
    model.zero_grad()
    model.causal_lm.set_attn_implementation("eager")
    batch_size, num_thoughts, length, thought_length = thoughts.shape
    lookahead = model.thoughts.lookahead
    dtype = model.start_embedding.dtype
    width = model.mixing_head.text_layer.in_features
    labels = input_ids if labels is None else labels

    def table(*shape: int) -> Tensor:
        return torch.zeros(*shape, batch_size, length, dtype=dtype)

    def states_table(*shape: int) -> Tensor:
        return torch.zeros(*shape, batch_size, length, width, dtype=dtype)

    r = Reference(
        model=model,
        loss=torch.zeros(()),
        text=states_table(),
        policy=states_table(thought_length, num_thoughts),
        ahead=states_table(lookahead, num_thoughts),
        mixing_weight=table(lookahead, num_thoughts),
        base_logprobs=table(lookahead),
        thought_logprobs=table(lookahead, num_thoughts),
        mixed_logprobs=table(lookahead, num_thoughts),
        policy_logprobs=table(thought_length, num_thoughts),
        policy_argmax=table(thought_length, num_thoughts).long(),
        real=table().bool(),
        reached=table(lookahead).bool(),
        valid=table(lookahead).bool(),
    )
    terms = dict.fromkeys(("base", "mixed", "thought", "policy"), torch.zeros(()))
    num_items = 0
    for b in range(batch_size):
        text = input_ids[b, : lengths[b]]
        base = _run(model, _embed(model, text))
        r.text[b, : len(text)] = base[0].detach()
        r.real[b, : len(text)] = True
        for i in range(len(text)):
            if positions is not None and not positions[b, i]:
                if _is_target(labels[b], i + 1, len(text)):
                    terms["base"] = terms["base"] - base[1][i].log_softmax(-1)[text[i + 1]]
                    num_items += 1
                continue
            valid = [a for a in range(1, lookahead + 1) if _is_target(labels[b], i + a, len(text))]
            for a in range(1, lookahead + 1):
                r.valid[a - 1, b, i] = a in valid
                r.reached[a - 1, b, i] = i + a - 1 < len(text)
            _add_position(r, terms, text, base, (b, i), valid, thoughts[b, :, i])
    num_items += r.valid[0].sum().item()
    positions = r.valid.any(0).sum().item()
    pairs, loss = num_thoughts * positions, model.objective.settings
    r.loss = (
        loss.base_weight * terms["base"] / num_items
        + loss.mixed_weight * terms["mixed"] / (lookahead * pairs)
        + loss.thought_weight * terms["thought"] / (lookahead * pairs)
        + loss.policy_weight * terms["policy"] / pairs
    )
    return r


def _add_position(
    r: Reference,
    terms: dict[str, Tensor],
    text: Tensor,
    base: tuple[Tensor, Tensor],
    place: tuple[int, int],
    valid: list[int],
    thoughts: Tensor,
) -> None:
    """All thoughts after one token: fills the tables, adds to the terms of the loss."""
    _, i = place
    if 1 in valid:
        terms["base"] = terms["base"] - base[1][i].log_softmax(-1)[text[i + 1]]
    rewards, mean_logprobs = [], []
    for k, padded in enumerate(thoughts):
        thought = padded[padded >= 0]
        states, logits = _run(r.model, _sequence(r.model, text, i, thought))
        start, end = r.model.start_embedding, r.model.end_embedding
        # Of the block (start, the thought, end, true tokens): the last token of start, and of end.
        first = i + (len(start) if start.ndim == 2 else 1)
        end = first + len(thought) + (len(end) if end.ndim == 2 else 1)
        before = slice(first, first + len(thought))
        logprobs = _policy(r, k, place, states[before], logits[before], thought)
        block = (states[end:], logits[end:])
        rewards.append(_add_predictions(r, terms, text, base, block, (k, *place), valid))
        mean_logprobs.append(logprobs.sum() / len(padded))
    for k in range(len(thoughts)):
        if valid:
            advantage = _advantage(r.model.objective.settings.estimator, rewards, k)
            terms["policy"] = terms["policy"] - advantage * mean_logprobs[k]


def _policy(
    r: Reference, k: int, place: tuple[int, int], states: Tensor, logits: Tensor, thought: Tensor
) -> Tensor:
    """Log-probabilities of the thought tokens, among the tokens that may be sampled."""
    b, i = place
    logits = logits[:, : r.model.vocab_size]
    logprobs = (logits / _policy_temperature(r.model)).log_softmax(-1)
    logprobs = logprobs[torch.arange(len(thought)), thought]
    r.policy[: len(thought), k, b, i] = states.detach()
    r.policy_logprobs[: len(thought), k, b, i] = logprobs.detach()
    r.policy_argmax[: len(thought), k, b, i] = logits.argmax(-1)
    return logprobs


def _add_predictions(
    r: Reference,
    terms: dict[str, Tensor],
    text: Tensor,
    base: tuple[Tensor, Tensor],
    block: tuple[Tensor, Tensor],
    place: tuple[int, int, int],
    valid: list[int],
) -> float:
    """One thought's predictions of the true tokens x_{i+a}; returns its reward."""
    k, b, i = place
    (base_states, base_logits), (states, logits) = base, block
    reward = 0.0
    for a in range(1, r.model.thoughts.lookahead + 1):
        if i + a - 1 < len(text):
            r.ahead[a - 1, k, b, i] = states[a - 1].detach()
        if a not in valid:
            continue
        weight = mixing_weight(r.model, base_states[i + a - 1], states[a - 1])
        mixed_logits = (1 - weight) * base_logits[i + a - 1] + weight * logits[a - 1]
        target = text[i + a]
        base_logprob = base_logits[i + a - 1].log_softmax(-1)[target]
        mixed_logprob = mixed_logits.log_softmax(-1)[target]
        own_logprob = logits[a - 1].log_softmax(-1)[target]
        terms["mixed"] = terms["mixed"] - mixed_logprob
        terms["thought"] = terms["thought"] - own_logprob
        reward += (
            mixed_logprob if r.model.objective.settings.reward == "mixed" else own_logprob
        ).item()
        r.mixing_weight[a - 1, k, b, i] = weight.detach()
        r.base_logprobs[a - 1, b, i] = base_logprob.detach()
        r.mixed_logprobs[a - 1, k, b, i] = mixed_logprob.detach()
        r.thought_logprobs[a - 1, k, b, i] = own_logprob.detach()
    return reward


def _is_target(labels: Tensor, place: int, length: int) -> bool:
    return place < length and labels[place].item() != -100


def _embed(model: QuietStarForCausalLM, tokens: Tensor) -> Tensor:
    return model.causal_lm.get_input_embeddings()(tokens)


def _sequence(model: QuietStarForCausalLM, text: Tensor, i: int, thought: Tensor) -> Tensor:
    """Input embeddings of one thought after text token i, with the true tokens that follow."""
    return torch.cat(
        [
            _embed(model, text[: i + 1]),
            model.start_embedding.view(-1, model.start_embedding.shape[-1]),
            _embed(model, thought),
            model.end_embedding.view(-1, model.end_embedding.shape[-1]),
            _embed(model, text[i + 1 : i + model.thoughts.lookahead]),
        ]
    )


def _run(model: QuietStarForCausalLM, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Final states and logits of one sequence, by the model's own code."""
    inputs = {"inputs_embeds": embeddings[None], "use_cache": False}
    states = model.causal_lm.base_model(**inputs).last_hidden_state
    return states[0], model.causal_lm(**inputs).logits[0]


def mixing_weight(model: QuietStarForCausalLM, text: Tensor, thought: Tensor) -> Tensor:
    """The head's formula on its parameters, for one pair of states; or the weight that is fixed."""
    if model.mixing_head_config.fixed_weight is not None:
        return torch.tensor(model.mixing_head_config.fixed_weight)
    p = dict(model.mixing_head.named_parameters())
    hidden = (
        p["text_layer.weight"] @ text + p["text_layer.bias"] + p["thought_layer.weight"] @ thought
    )
    hidden = p["middle_layer.weight"] @ hidden.clamp(min=0) + p["middle_layer.bias"]
    weight = p["last_layer.weight"][0] @ hidden.clamp(min=0) + p["last_layer.bias"][0]
    config = model.mixing_head_config
    if config.initial_weight == 0:
        return weight
    return config.floor + (1 - config.floor) / (1 + torch.exp(-weight))


def _policy_temperature(model: QuietStarForCausalLM) -> float:
    return 3.0 if model.objective.settings.estimator == "paper" else model.thoughts.temperature


def _advantage(estimator: str, rewards: list[float], k: int) -> float:
    if estimator == "leave_one_out":
        others = rewards[:k] + rewards[k + 1 :]
        return rewards[k] - math.fsum(others) / len(others)
    assert estimator == "paper", estimator
    return max(0.0, rewards[k] - math.fsum(rewards) / len(rewards))
