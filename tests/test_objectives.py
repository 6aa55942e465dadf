"""The expected gradient of every objective against the derivative that its paper states.

By enumeration, in float64: V = D = 3 with logits = states, thoughts of T = 2 tokens, K = 2 of them
after position 0 of one text, lookahead 2. The policy has the logits ``theta1`` (3) for the first
token and ``theta2[first token]`` (3 x 3) for the second; the true tokens have the logits ``ahead``
(9 thoughts x 2 tokens x 3). All 81 pairs of thoughts, weighted with their probabilities, give the
expectation of the loss's gradient in all of these; autograd gives the derivative of the objective,
written down as in its paper, over the 9 thoughts (81 pairs for JEPO).
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from states_loss import quiet_star_loss
from torch import Tensor, nn

from quietstar.backbone.output_head import OutputHead
from quietstar.backbone.teacher_forced import ThoughtStates
from quietstar.config import loss_config
from quietstar.losses.policy import token_terms
from quietstar.losses.weights import ThoughtScores
from quietstar.objectives._policy import group_logmeanexp

LENGTH, LOOKAHEAD = 2, 2
THOUGHTS = list(itertools.product(range(3), repeat=LENGTH))
PAIRS = list(itertools.product(range(9), repeat=2))
LABELS = torch.tensor([[0, 1, 2]])
TARGETS = LABELS[0, 1:]
TOLERANCE = 1e-8

_generator = torch.Generator().manual_seed(5)


def normal(*shape):
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


TEXT, WEIGHT = normal(1, 3, 3), 0.6


@dataclass
class Parameters:
    """What is learned; each a leaf."""

    theta1: Tensor
    theta2: Tensor
    ahead: Tensor

    @classmethod
    def draw(cls) -> "Parameters":
        return cls(normal(3), normal(3, 3), normal(9, 2, 3)).leaves()

    def leaves(self) -> "Parameters":
        return Parameters(*(x.detach().clone().requires_grad_() for x in self.all()))

    def all(self) -> tuple[Tensor, ...]:
        return self.theta1, self.theta2, self.ahead

    def gradient(self, value: Tensor) -> Tensor:
        grads = torch.autograd.grad(value, self.all(), allow_unused=True)
        pairs = zip(grads, self.all(), strict=True)
        return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for g, x in pairs])

    def token_logprobs(self) -> Tensor:
        """Of both tokens of every thought, (9, 2)."""
        first = self.theta1.log_softmax(-1)
        second = self.theta2.log_softmax(-1)
        return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in THOUGHTS])

    def logprobs(self) -> Tensor:
        """Of every thought, (9,)."""
        return self.token_logprobs().sum(1)

    def target_logprobs(self) -> Tensor:
        """Of both true tokens after every thought, (9, 2)."""
        return self.ahead.log_softmax(-1)[:, [0, 1], TARGETS]

    def mixed_logprobs(self) -> Tensor:
        mixed = (1 - WEIGHT) * TEXT[0, :2] + WEIGHT * self.ahead
        return mixed.log_softmax(-1)[:, [0, 1], TARGETS]


BASE = TEXT[0, :2].log_softmax(-1)[[0, 1], TARGETS]  # of the true tokens without a thought
REFERENCE = Parameters.draw()
P = Parameters.draw()


def loss_gradient(pair, config, **known):
    """Gradient of the real loss when these two thoughts were drawn, in all parameters."""
    p = P.leaves()
    chosen = [THOUGHTS[n] for n in pair]
    first = torch.stack([p.theta1 for _ in chosen])
    second = torch.stack([p.theta2[t[0]] for t in chosen])
    states = ThoughtStates(
        text=TEXT,
        policy=torch.stack([first, second])[:, :, None, None],  # (T, K, B, P, D)
        ahead=torch.stack([p.ahead[n] for n in pair], 1)[:, :, None, None],
    )
    layer = nn.Linear(3, 3, bias=False)
    layer.weight = nn.Parameter(torch.eye(3, dtype=torch.float64))
    loss, scored = quiet_star_loss(
        states,
        torch.full((LOOKAHEAD, 2, 1, 1), WEIGHT, dtype=torch.float64),
        torch.tensor(chosen).T[:, :, None, None],
        LABELS,
        OutputHead(layer, layer.weight, None),
        config,
        1.0,
        positions=torch.zeros(1, 1, dtype=torch.long),
        **{k: v(pair) if callable(v) else v for k, v in known.items()},
    )
    return p.gradient(loss), loss.detach(), scored


def expected_gradient(config, **known):
    """Expectation of the loss's gradient over all pairs of independent thoughts."""
    probabilities = P.logprobs().detach().exp()
    return sum(  # the loss is the same for thoughts in the other order
        (2 - (i == j)) * probabilities[i] * probabilities[j]
        * loss_gradient((i, j), config, **known)[0]
        for i, j in PAIRS if i <= j
    )  # fmt: skip


def reference_of(pair):
    """Log-probabilities of the thoughts' tokens by the reference, (T, K, B, P)."""
    return REFERENCE.token_logprobs().detach()[list(pair)].T[:, :, None, None]


def objective(name, **changes):
    return loss_config(objective=name, **changes)


def check(gradient, value, parameters):
    """Compare with the derivative of what is to be maximized."""
    exact = -parameters.gradient(value)
    assert exact.abs().max() > 0.01
    assert (gradient - exact).abs().max() < TOLERANCE


def test_log_prob():
    p = P.leaves()
    check(
        expected_gradient(objective("log_prob")),
        (p.logprobs().exp() * p.target_logprobs().sum(1)).sum(),
        p,
    )


def test_verifree():
    p = P.leaves()
    check(
        expected_gradient(objective("verifree")),
        (p.logprobs().exp() * p.target_logprobs().sum(1).exp()).sum(),
        p,
    )


def test_jepo_of_two_samples():
    p = P.leaves()
    likelihood, probability = p.target_logprobs().sum(1).exp(), p.logprobs().exp()
    bound = (0.5 * (likelihood[:, None] + likelihood[None])).log()
    check(expected_gradient(objective("jepo")), (probability.outer(probability) * bound).sum(), p)


def test_latro():
    p, beta = P.leaves(), 0.3
    ratio = p.logprobs() - REFERENCE.logprobs().detach()
    check(
        expected_gradient(objective("latro", reward_kl_weight=beta), reference=reference_of),
        (p.logprobs().exp() * (p.target_logprobs().sum(1) - beta * ratio)).sum(),
        p,
    )


@pytest.mark.parametrize("token_weighting", ["sum", "mean", "constant"])
def test_rlp_moves_thoughts_only(token_weighting):
    p = P.leaves()
    gain = (p.target_logprobs() - BASE).sum(1).detach()
    scale = 1.0 if token_weighting == "sum" else 1 / LENGTH  # both thoughts have all tokens
    check(
        expected_gradient(objective("rlp", token_weighting=token_weighting)),
        scale * (p.logprobs().exp() * gain).sum(),
        p,
    )


@pytest.mark.parametrize("reward", ["mixed", "thought"])
def test_quiet_star(reward):
    p, config = P.leaves(), objective("quiet_star", reward=reward)
    own, mixed = p.target_logprobs(), p.mixed_logprobs()
    rewarded = (mixed if reward == "mixed" else own).sum(1).detach()
    fixed = p.logprobs().exp().detach()
    value = config.policy_weight / LENGTH * (p.logprobs().exp() * rewarded).sum()
    value = value + config.mixed_weight * (fixed * mixed.mean(1)).sum()
    check(expected_gradient(config), value + config.thought_weight * (fixed * own.mean(1)).sum(), p)


WEAK = torch.full((1, 3), -1.5, dtype=torch.float64)
"""Log-probabilities of true tokens by a reference that some thoughts beat."""


def mean_prob_reward(p):
    reward = (p.target_logprobs().exp() - WEAK[0, :2].exp()).mean(1).clamp(min=0.0).detach()
    assert 2 <= (reward > 0).sum() < 9
    return reward


def test_rlpr_without_its_scaling_is_the_gradient_of_its_reward():
    p = P.leaves()
    config = objective("rlpr", scaling="none", estimator="leave_one_out", token_weighting="sum")
    gradient = expected_gradient(config, reference_text=WEAK)
    check(gradient, (p.logprobs().exp() * mean_prob_reward(p)).sum(), p)


RLPR = (0.9543, 2.6791)
"""Cosine and scale of RLPR's gradient on this problem, as computed; there is no closed form."""


def test_rlpr_is_biased_by_this_much():
    p = P.leaves()
    exact = -p.gradient((p.logprobs().exp() * mean_prob_reward(p)).sum())
    gradient = expected_gradient(objective("rlpr"), reference_text=WEAK)
    cosine = torch.cosine_similarity(gradient, exact, dim=0).item()
    assert (cosine, (gradient @ exact / (exact @ exact)).item()) == pytest.approx(RLPR, abs=1e-4)


# --- What a reference changes ---------------------------------------------------------------------
TEXT_BY_REFERENCE = normal(1, 3)


def test_the_reference_of_a_gain_cancels_in_a_leave_one_out_advantage():
    """RLP's moving average changes the reward of all thoughts of a position alike."""
    for pair in PAIRS[1:5]:
        gradients = [
            loss_gradient(pair, objective("rlp", estimator=estimator), reference_text=reference)
            for estimator in ("leave_one_out", "no_baseline")
            for reference in (None, TEXT_BY_REFERENCE)
        ]
        torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=1e-12)
        assert (gradients[2][0] - gradients[3][0]).abs().max() > 0.01
        rewards = [scored.reward.flatten() for _, _, scored in gradients]
        expected = P.target_logprobs()[list(pair)].sum(1) - TEXT_BY_REFERENCE[0, :2].sum()
        torch.testing.assert_close(rewards[1], expected.detach())
        assert (rewards[0] - rewards[1]).abs().min() > 0.01


def test_the_k3_term_has_the_gradient_of_the_other_divergence():
    """E[grad k3] is that of KL(pi_ref || pi), not of KL(pi || pi_ref) whose value k3 estimates."""
    p, weight = P.leaves(), 0.7
    config = objective("rlp", kl_weight=weight, token_weighting="sum")
    plain = expected_gradient(objective("rlp", token_weighting="sum"))
    gradient = expected_gradient(config, reference=reference_of) - plain
    by_state = [(p.theta1, REFERENCE.theta1, 1.0)]
    first = P.theta1.softmax(-1).detach()
    by_state += [(p.theta2[n], REFERENCE.theta2[n], first[n]) for n in range(3)]
    divergence = sum(
        share * (q.softmax(-1) * (q.log_softmax(-1) - x.log_softmax(-1))).sum()
        for x, q, share in ((x, q.detach(), share) for x, q, share in by_state)
    )
    exact = p.gradient(weight * divergence)
    assert exact.abs().max() > 0.01
    assert (gradient - exact).abs().max() < TOLERANCE


# --- Older thoughts -------------------------------------------------------------------------------
OLD = Parameters.draw()


def drawn_by_old(pair):
    return OLD.token_logprobs().detach()[list(pair)].T[:, :, None, None]


def test_thoughts_of_the_current_policy_are_reinforced_as_without_a_ratio():
    for pair in PAIRS[1:5]:
        config = objective("rlp", clip_low=0.2, clip_high=0.2)
        drawn = P.token_logprobs().detach()[list(pair)].T[:, :, None, None]
        gradient = loss_gradient(pair, config, drawn=drawn)[0]
        torch.testing.assert_close(gradient, loss_gradient(pair, config)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.2, 0.2), (0.1, None), (None, 0.3)])
def test_older_thoughts_count_by_a_clipped_ratio(low, high):
    differences = 0
    for pair in PAIRS[1:20]:
        config = objective("rlp", clip_low=low, clip_high=high, token_weighting="sum")
        gradient, value, _ = loss_gradient(pair, config, drawn=drawn_by_old)
        p = P.leaves()
        gain = p.target_logprobs()[list(pair)].sum(1).detach()
        advantage = (gain - gain.flip(0))[:, None]
        ratio = (p.token_logprobs() - OLD.token_logprobs().detach())[list(pair)].exp()
        bounded = ratio.clamp(0 if low is None else 1 - low, None if high is None else 1 + high)
        surrogate = -torch.minimum(ratio * advantage, bounded * advantage).sum() / 2
        torch.testing.assert_close(value, surrogate.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, p.gradient(surrogate), rtol=1e-10, atol=1e-12)
        differences += bool((bounded != ratio).any())
    assert (differences > 0) is (low is not None or high is not None)


def test_the_surrogate_of_rows_that_are_no_tokens_is_zero():
    nothing = torch.zeros(2, dtype=torch.float64)
    drawn = torch.tensor([0.0, -torch.inf], dtype=torch.float64)
    values_and_slopes = token_terms(
        nothing, slice(None), advantage=torch.ones_like(drawn), scale=nothing, drawn=drawn,
        reference=drawn, settings=objective("rlp", kl_weight=1.0, reference="base"),
    )  # fmt: skip
    for x in values_and_slopes:
        assert torch.equal(x, nothing)


# --- Parts ----------------------------------------------------------------------------------------
def scores_of(logprob, **more):
    valid = torch.ones(*logprob.shape[:2], 1, dtype=torch.bool)
    nothing = torch.zeros(*logprob.shape[:2], 1)
    return ThoughtScores(nothing, logprob[..., None], logprob[..., None], None, valid, **more)


def weigh(name, reward, *, thoughts=None, **changes):
    from quietstar import registry

    config = objective(name, **changes)
    scores = scores_of(reward, **(thoughts or {}))
    return registry.find("loss.objective", name)(config).weigh(reward, scores)


REWARD = torch.tensor([[[1.0, 3.0, 2.0], [5.0, 5.0, 5.5]]])


def test_baselines_and_scales_of_advantages():
    running = torch.tensor([2.0, 1.2])
    expected = {
        ("leave_one_out", "none"): [[-1.5, 1.5, 0.0], [-0.25, -0.25, 0.5]],
        ("group_mean", "none"): [[-1.0, 1.0, 0.0], [-1 / 6, -1 / 6, 1 / 3]],
        ("paper", "none"): [[0.0, 1.0, 0.0], [0.0, 0.0, 1 / 3]],
        ("no_baseline", "none"): REWARD[0].tolist(),
        ("running_mean", "none"): (REWARD[0] - 2).tolist(),
        ("group_mean", "std"): [[-1.0, 1.0, 0.0], [-0.57735, -0.57735, 1.1547]],
    }
    for (estimator, scaling), values in expected.items():
        weights = weigh(
            "rlp", REWARD, estimator=estimator, scaling=scaling, thoughts={"running": running}
        )
        torch.testing.assert_close(weights.advantage[0], torch.tensor(values), rtol=0, atol=1e-3)
        assert weights.thought is None
        assert weights.mixed is None
    first = weigh("rlp", REWARD, estimator="running_mean")
    assert not first.advantage.any()


def test_positions_whose_rewards_differ_little_are_dropped():
    running = torch.tensor([2.0, 1.2])
    weights = weigh(
        "rlp", REWARD, min_signal=0.5, thought_weight=1.0, thoughts={"running": running}
    )
    assert weights.advantage[0, 0].any()
    assert not weights.advantage[0, 1].any()
    assert weights.thought[0, :, :, 0].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert weigh("rlp", REWARD, min_signal=0.5).advantage[0, 1].any()  # nothing to compare with


def test_divergences_are_part_of_the_reward():
    ratio = torch.tensor([[[0.0, 1.0, -1.0], [0.5, 0.5, 0.5]]])
    weights = weigh(
        "rlp", REWARD, estimator="no_baseline", reward_kl_weight=2.0, reference="base",
        thoughts={"log_ratio": ratio},
    )  # fmt: skip
    expected = REWARD - 2 * ratio
    torch.testing.assert_close(weights.advantage, expected)
    torch.testing.assert_close(weights.reward, expected)


def test_true_tokens_count_by_reward_or_by_their_share_of_the_likelihood():
    constant, reward, softmax = (
        weigh("log_prob", REWARD, thought_weight=0.5, thought_weighting=kind).thought[..., 0]
        for kind in ("constant", "reward", "softmax")
    )
    torch.testing.assert_close(constant, torch.full_like(REWARD, 0.5))
    torch.testing.assert_close(reward, 0.5 * REWARD)
    torch.testing.assert_close(softmax, 0.5 * 3 * REWARD.softmax(-1))


def test_the_bound_of_all_thoughts_and_of_all_but_one():
    logprob = torch.tensor([[[0.2, 0.3, 0.1]]]).log()
    everything, others = group_logmeanexp(logprob)
    torch.testing.assert_close(everything, torch.tensor([[[0.2]]]).log())
    torch.testing.assert_close(others, torch.tensor([[[0.2, 0.15, 0.25]]]).log())
