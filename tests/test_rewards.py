"""The built-in rewards by their formulas, on scores written out by hand."""

import math

import pytest
import torch
from tiny import end_early, random_texts, thinking_model

from quietstar import registry
from quietstar.losses.weights import ThoughtScores
from quietstar.sampling.thoughts import ThoughtBatch

# One text, two positions, three thoughts, two targets ahead; the second position has one target.
THOUGHT = torch.tensor(
    [[[[0.5, 0.2], [0.1, 0.4], [0.5, 0.2]], [[0.9, 1.0], [0.3, 1.0], [0.2, 1.0]]]]
)
BASE = torch.tensor([[[0.25, 0.1], [0.6, 1.0]]])
REFERENCE = torch.tensor([[[0.5, 0.5], [0.1, 1.0]]])
VALID = torch.tensor([[[True, True], [True, False]]])


def reward(name, reference=None):
    tokens = torch.zeros(1, 2, 3, 1, dtype=torch.long)
    ids = torch.zeros(1, 4, dtype=torch.long)
    thoughts = ThoughtBatch(
        ids, ids, None, torch.arange(1), torch.tensor([[0, 1]]), tokens, tokens[..., 0] + 1
    )
    reference = None if reference is None else reference.log()
    scores = ThoughtScores(BASE.log(), THOUGHT.log(), THOUGHT.log(), reference, VALID)
    return registry.find("loss.reward", name)(thoughts, scores)


@pytest.mark.parametrize(("name", "reference", "expected"), [
    ("information_gain", None, [[math.log(4), math.log(1.6), math.log(4)],
                                [math.log(1.5), math.log(0.5), math.log(1 / 3)]]),
    ("information_gain", REFERENCE, [[math.log(0.4), math.log(0.16), math.log(0.4)],
                                     [math.log(9), math.log(3), math.log(2)]]),
    ("prob", None, [[0.1, 0.04, 0.1], [0.9, 0.3, 0.2]]),
    ("mean_prob", None, [[0.175, 0.075, 0.175], [0.3, 0.0, 0.0]]),
    ("mean_prob", REFERENCE, [[0.0, 0.0, 0.0], [0.8, 0.2, 0.1]]),
    ("rank", None, [[0.75, 0.0, 0.75], [1.0, 0.5, 0.0]]),
])  # fmt: skip
def test_rewards_are_their_formulas(name, reference, expected):
    torch.testing.assert_close(reward(name, reference), torch.tensor([expected]))


def test_the_length_of_a_thought_counts_in_a_sum():
    means = {}
    for name in ("thought", "length", "thought + -0.5*length"):
        model = end_early(thinking_model(loss={"reward": name, "policy_weight": 1.0}))
        output = model(random_texts(), sample_ids=torch.arange(2))
        means[name] = output.metrics.means()["policy_reward"]
    lengths = output.drawn.lengths[:, :-1].float()  # nothing follows the last token
    assert 1 < lengths.mean() < 2
    assert means["length"] == pytest.approx(float(lengths.mean()))
    expected = means["thought"] - 0.5 * means["length"]
    assert means["thought + -0.5*length"] == pytest.approx(expected)


def test_positions_without_a_target_earn_nothing(monkeypatch):
    monkeypatch.setitem(globals(), "VALID", torch.zeros_like(VALID))
    for name in ("information_gain", "prob", "mean_prob"):
        assert not reward(name).any()
    assert torch.equal(reward("rank"), torch.full((1, 2, 3), 0.5))  # all alike: no signal


def test_a_baseline_over_the_thoughts_cancels_what_there_is_without_one():
    """So the reference of RLP's reward changes what is logged, not the gradient."""
    texts = random_texts()
    grads = []
    for name in ("thought", "information_gain"):
        model = thinking_model(loss={"reward": name, "policy_weight": 1.0})
        model(texts, sample_ids=torch.arange(len(texts))).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
