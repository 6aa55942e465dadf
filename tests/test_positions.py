"""Thoughts at chosen positions: which, and exactly what the full computation says there."""

import pytest
import torch
from states_loss import quiet_star_loss
from tiny import LLAMA, plain_model, random_texts, thinking_model

from quietstar.attention import blocks, passes
from quietstar.attention.layout import IGNORE_INDEX, NO_TOKEN, text_lookahead
from quietstar.backbone.teacher_forced import ThoughtStates
from quietstar.config import loss_config
from quietstar.losses import next_token
from quietstar.losses.next_token import next_token_entropy
from quietstar.losses.scores import of_nearest_thought
from quietstar.model.scoring import read_thoughts
from quietstar.sampling.positions import choose_positions, count_positions, most_positions
from quietstar.sampling.rollout import sample_thoughts
from quietstar.sampling.thoughts import Sampling

POSITIONS = torch.tensor([[0, 3, 4, 7], [2, 5, -1, -1]])
"""Of two texts of nine tokens; the second one thinks at two places only."""


@pytest.fixture(params=["flash", "dense", "pieces"])
def path(request, monkeypatch):
    """Run the test on the kernels, on the dense path, and with prefixes cut into pieces."""
    if request.param == "dense":
        monkeypatch.setattr(passes, "find_kernel", lambda *args: None)
    if request.param == "pieces":
        monkeypatch.setattr(blocks, "_PIECE_POSITIONS", 1)
    return request.param


@pytest.fixture(params=["whole", "early"])
def early(request):
    """Whether thoughts end early."""
    return request.param == "early"


def model_and_inputs(dtype=torch.float64, early=False):
    base = plain_model(num_attention_heads=4, num_key_value_heads=2, dtype=dtype)
    model = thinking_model(base, thoughts={"length": 3, "lookahead": 2, "num_thoughts": 2})
    model = model.to(dtype)
    texts = random_texts(2, 9)
    generator = torch.Generator().manual_seed(5)
    thoughts = torch.randint(0, model.vocab_size, (3, 2, 2, 9), generator=generator)
    if early:
        lengths = torch.randint(0, 4, thoughts.shape[1:], generator=generator)
        thoughts = thoughts.where(torch.arange(3)[:, None, None, None] < lengths, NO_TOKEN)
    return model, texts, thoughts


def at(x, axis):
    """Entries of the full computation at POSITIONS; the batch lies before the axis."""
    index = POSITIONS.clamp(min=0)
    rows = torch.arange(2)[:, None]
    return x.movedim((axis - 1, axis), (0, 1))[rows, index].movedim((0, 1), (axis - 1, axis))


def both(model, texts, thoughts):
    """States of all positions, and of the chosen ones."""
    full, _ = read_thoughts(model, texts, thoughts.permute(2, 3, 1, 0), None, lookahead=2)
    chosen = at(thoughts, 3).permute(2, 3, 1, 0)
    some, _ = read_thoughts(model, texts, chosen, POSITIONS, lookahead=2)
    return full, some


def test_chosen_states_are_those_of_the_full_pass(path, early):
    model, texts, thoughts = model_and_inputs(early=early)
    full, some = both(model, texts, thoughts)
    real = (POSITIONS >= 0)[None, None, :, :, None]
    written = real & (at(thoughts, 3) != NO_TOKEN).unsqueeze(-1)
    torch.testing.assert_close(some.text, full.text)
    pairs = ((some.policy, full.policy, written), (some.ahead, full.ahead, real))
    for mine, whole, read in pairs:
        torch.testing.assert_close(mine.where(read, 0.0), at(whole, 3).where(read, 0.0))


def test_gradients_are_those_of_the_full_computation_restricted_to_the_chosen(path, early):
    model, texts, thoughts = model_and_inputs(early=early)
    config = loss_config(policy_weight=0.5, entropy_weight=0.1)
    full, some = both(model, texts, thoughts)
    restricted = ThoughtStates(full.text, at(full.policy, 3), at(full.ahead, 3))
    losses, gradients = [], []
    for states in (restricted, some):
        weight = model.mixing_head(text_lookahead(states.text, 2, POSITIONS), states.ahead)
        loss, _ = quiet_star_loss(
            states, weight, at(thoughts, 3), texts, model.output_head, config, 1.0,
            positions=POSITIONS,
        )  # fmt: skip
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(losses[0], losses[1])
    for mine, whole in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-8, atol=1e-10)


def test_the_rollout_draws_the_thoughts_of_the_full_one(path):
    model, texts, _ = model_and_inputs()
    args = (model.causal_lm, model.output_head, model.start_vectors, texts, torch.tensor([4, 9]))
    sampling = Sampling(num_thoughts=3, thought_length=4, temperature=1.0, seed=2)
    full, some = (sample_thoughts(*args, sampling, where) for where in (None, POSITIONS))
    real = POSITIONS >= 0
    assert torch.equal(some[:, :, real], at(full, 3)[:, :, real])


def test_all_positions_chosen_one_by_one_give_the_loss_without_a_choice():
    model, texts, thoughts = model_and_inputs()
    everywhere = torch.arange(9).expand(2, -1)
    whole, one_by_one = (
        quiet_star_loss(
            *read_thoughts(model, texts, thoughts.permute(2, 3, 1, 0), where),
            thoughts,
            texts,
            model.output_head,
            loss_config(),
            1.0,
            positions=where,
        )[0]
        for where in (None, everywhere)
    )
    torch.testing.assert_close(whole, one_by_one)


def test_terms_of_thoughts_are_means_over_the_chosen_and_the_base_over_all():
    model, texts, thoughts = model_and_inputs()
    _, some = both(model, texts, thoughts)
    weight = model.mixing_head(text_lookahead(some.text, 2, POSITIONS), some.ahead)
    args = (some, weight, at(thoughts, 3), texts, model.output_head)
    for name in ("base_weight", "mixed_weight", "thought_weight"):
        only = {f"{n}_weight": 0.0 for n in ("base", "mixed", "thought", "policy")} | {name: 1.0}
        loss, scored = quiet_star_loss(*args, loss_config(**only), 1.0, positions=POSITIONS)
        assert int(scored.valid[..., 0].sum()) == 6  # 4 and 2 places, all before a token
        if name == "base_weight":
            expected = -scored.text_logprobs.sum() / 16
        else:
            logprobs = getattr(scored, name.replace("_weight", "_logprobs"))
            # Place 7 of text 0 has one target, x_8; M = 6, K = 2, A = 2.
            expected = -logprobs.where(scored.valid.unsqueeze(2), 0.0).sum() / (6 * 2 * 2)
        torch.testing.assert_close(loss, expected)


COUNTED = ["every", "random", "entropy", "top_entropy", "weight", "weighted_entropy"]
"""Rules that take a share of the candidates, or a number of them."""
NAMED = ["one_random", "answer", "answer_start", "pattern", "field"]


@pytest.mark.parametrize(
    ("rule", "amount"),
    [(rule, {"position_fraction": 0.4}) for rule in COUNTED + NAMED]
    + [(rule, {"position_fraction": 2.0}) for rule in COUNTED],
    ids=str,
)
def test_a_batch_and_its_texts_alone_give_the_same_loss(rule, amount):
    base = plain_model(dtype=torch.float64)
    model = thinking_model(base, thoughts={"positions": rule, **amount}).to(torch.float64)
    texts, ids = random_texts(3, 9), torch.tensor([3, 8, 1])
    labels = texts.clone()
    labels[1, 6:] = IGNORE_INDEX
    answers = torch.zeros_like(texts, dtype=torch.bool)
    answers[0, 4:6] = answers[1, 3] = answers[2, 8] = True
    marked = answers.roll(-1, 1)
    counts = count_positions(rule, amount["position_fraction"], labels, answers, marked=marked)
    together = {"num_items_in_batch": 21, "num_thought_items": counts.sum()}

    def run(rows):
        inputs = {"labels": labels[rows], "answers": answers[rows], "sample_ids": ids[rows]}
        return model(texts[rows], marked=marked[rows], **inputs, **together).loss

    whole = run(slice(0, 3))
    torch.testing.assert_close(whole, sum(run(slice(n, n + 1)) for n in range(3)))
    by_default = model(texts, labels=labels, answers=answers, marked=marked, sample_ids=ids)
    torch.testing.assert_close(whole, by_default.loss)
    means = by_default.metrics.means()
    assert means["gain"] == pytest.approx(means["base_nll"] - means["mixed_nll"])
    assert means["text_gain"] == pytest.approx(means["gain"] * int(counts.sum()) / 21)


# --- Which positions ------------------------------------------------------------------------------

LABELS = torch.tensor([[7, 7, 7, 7, 7, 7, 7, 7, 7], [7, 7, 7, 7, 7, -100, -100, -100, -100]])
"""Candidates: 0 .. 7 and 0 .. 3."""


def test_every_takes_evenly_spaced_candidates():
    assert choose_positions("every", 0.25, LABELS).tolist() == [[0, 4], [0, -1]]
    assert choose_positions("every", 0.5, LABELS).tolist() == [[0, 2, 4, 6], [0, 2, -1, -1]]
    assert choose_positions("every", 1.0, LABELS[:1]).tolist() == [list(range(8))]


def test_every_takes_a_number_of_them_from_equal_parts():
    assert choose_positions("every", 3.0, LABELS).tolist() == [[0, 2, 5], [0, 1, 2]]
    chosen = choose_positions("every", 6.0, LABELS).tolist()
    assert chosen == [[0, 1, 2, 4, 5, 6], [0, 1, 2, 3, -1, -1]]
    labels = torch.full((1, 2**18 + 1), 7)  # float32 could not count these
    assert choose_positions("every", 2.0**17, labels)[0].diff().unique().tolist() == [2]


@pytest.mark.parametrize("rule", COUNTED)
@pytest.mark.parametrize("count", [2.0, 3.0, 100.0])
def test_a_number_of_positions_is_that_of_every_text_with_as_many_candidates(rule, count):
    score = torch.rand(LABELS.shape, generator=torch.Generator().manual_seed(0))
    chosen = choose_positions(rule, count, LABELS, score=score, explore=True)
    assert (chosen >= 0).sum(-1).tolist() == [min(count, 8), min(count, 4)]
    assert count_positions(rule, count, LABELS).tolist() == [min(count, 8), min(count, 4)]
    assert chosen.shape[1] == most_positions(rule, count, 9) == min(count, 8)


def test_one_random_is_what_random_takes_first():
    labels, ids = torch.full((50, 9), 7), torch.arange(100, 150)
    one = choose_positions("one_random", 0.25, labels, sample_ids=ids, seed=3)
    assert one.shape == (50, 1)
    assert torch.equal(one, choose_positions("random", 0.1, labels, sample_ids=ids, seed=3))
    assert torch.equal(
        one[7:9], choose_positions("one_random", 0.5, labels[:2], sample_ids=ids[7:9], seed=3)
    )
    assert len(one.unique()) > 4
    assert count_positions("one_random", 0.25, LABELS).tolist() == [1, 1]
    assert most_positions("one_random", 0.25, 9) == 1


@pytest.mark.parametrize("fields", [LLAMA, {**LLAMA, "model_type": "gemma2", "head_dim": 8}])
def test_top_entropy_is_that_of_the_sixteen_most_likely_tokens(monkeypatch, fields):
    monkeypatch.setattr(next_token, "chunk_rows", lambda _: 4)
    base = plain_model(fields)
    model = thinking_model(base, thoughts={"positions": "top_entropy", "position_fraction": 3})
    texts = random_texts(2, 9)
    logits = model.causal_lm(texts).logits.topk(16).values
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    mine = next_token_entropy(model.causal_lm.base_model(texts).last_hidden_state,
                              model.output_head, 16)  # fmt: skip
    torch.testing.assert_close(mine, entropy)
    expected = entropy[:, :-1].topk(3).indices.sort(-1).values
    assert torch.equal(model.choose_positions(texts), expected)
    model.configure(model.thoughts.model_copy(update={"positions": "entropy"}))
    assert not torch.equal(model.choose_positions(texts), expected)


@pytest.mark.parametrize("rule", ["pattern", "field"])
def test_marked_tokens_are_thought_before(rule):
    marked = torch.zeros_like(LABELS, dtype=torch.bool)
    marked[0, [0, 3, 8]] = marked[1, [2, 7]] = True  # before 0 is no position, 7 is no target
    chosen = choose_positions(rule, 0.25, LABELS, marked=marked)
    assert chosen.tolist() == [[2, 7], [1, -1]]
    assert count_positions(rule, 0.25, LABELS, marked=marked).tolist() == [2, 1]
    model = thinking_model(plain_model(), thoughts={"positions": rule})
    with pytest.raises(ValueError, match=rf"thoughts.positions {rule} .* pass marked \(batch, seq"):
        model(random_texts(1, 9))


def test_entropy_takes_the_hardest_in_the_order_of_the_text():
    entropy = torch.tensor([[1, 9, 2, 8, 0, 3, 7, 1, 99], [5, 1, 2, 6, 99, 99, 99, 99, 99]])
    chosen_ones = choose_positions("entropy", 0.3, LABELS, score=entropy.float())
    assert chosen_ones.tolist() == [[1, 3, 6], [0, 3, -1]]  # ceil(2.4) and ceil(1.2)


def test_learned_rules_leave_a_quarter_to_chance_in_training_alone():
    score = torch.arange(40.0).expand(500, 40)
    labels, ids = torch.full((500, 40), 7), torch.arange(500)

    def choose(**keywords):
        return choose_positions("weight", 0.2, labels, score=score, sample_ids=ids, **keywords)

    best = torch.arange(31, 39)  # ceil(0.2 * 39), the highest of 0 .. 38
    assert (choose() == best).all()
    explored = choose(explore=True)
    assert (explored[:, -6:] == best[-6:]).all()
    others = torch.bincount(explored[:, :2].flatten(), minlength=40)
    assert others[33:].sum() == 0
    assert (others[:33] - 1000 / 33).abs().max() < 5 * (1000 / 33) ** 0.5
    by_entropy = choose_positions("entropy", 0.2, labels, score=score, explore=True)
    assert (by_entropy == best).all()


def test_the_expected_mixing_weight_is_that_of_the_head_without_a_thought():
    base = plain_model()
    model = thinking_model(base, thoughts={"positions": "weight", "position_fraction": 0.3})
    # Weights of standard deviation 1 saturate the sigmoid: positions with weight 1.0 would tie.
    torch.nn.init.normal_(model.mixing_head.last_layer.weight, std=0.02)
    texts = random_texts(2, 9)
    states = model.causal_lm.base_model(texts).last_hidden_state
    ahead = text_lookahead(states, 1, None)
    expected = model.mixing_head(ahead, torch.zeros_like(states)[None, None])[0, 0]
    assert all(len(row.unique()) == len(row) for row in expected)
    chosen_ones = model.choose_positions(texts)
    assert torch.equal(chosen_ones, expected[:, :-1].topk(3).indices.sort(-1).values)
    product = (
        expected * torch.distributions.Categorical(logits=model.causal_lm(texts).logits).entropy()
    )
    model.configure(model.thoughts.model_copy(update={"positions": "weighted_entropy"}))
    chosen_ones = model.choose_positions(texts)
    assert torch.equal(chosen_ones, product[:, :-1].topk(3).indices.sort(-1).values)


def test_random_is_keyed_by_the_text_and_spread_evenly():
    labels = torch.full((4000, 9), 7)
    ids = torch.arange(4000)
    chosen_ones = choose_positions("random", 0.25, labels, sample_ids=ids)
    counts = torch.bincount(chosen_ones.flatten(), minlength=9)
    assert counts[8] == 0
    assert (counts[:8] - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
    part = choose_positions("random", 0.25, labels[:2], sample_ids=ids[[7, 11]])
    assert torch.equal(part, chosen_ones[[7, 11]])
    other = choose_positions("random", 0.25, labels, sample_ids=ids, seed=1)
    assert not torch.equal(other, chosen_ones)


def test_answers_are_thought_about_before_each_token_or_the_first():
    answers = torch.zeros_like(LABELS, dtype=torch.bool)
    answers[0, 3:6] = answers[0, 8] = answers[1, 2] = True
    each = choose_positions("answer", 0.25, LABELS, answers=answers)
    assert each.tolist() == [[2, 3, 4, 7], [1, -1, -1, -1]]
    first = choose_positions("answer_start", 0.25, LABELS, answers=answers)
    assert first.tolist() == [[2, 7], [1, -1]]
    assert count_positions("answer", 0.25, LABELS, answers).tolist() == [4, 1]


def test_a_rule_of_answers_needs_them():
    with pytest.raises(ValueError, match=r"thoughts.positions answer needs to know"):
        choose_positions("answer", 0.25, LABELS)


def test_all_is_no_choice():
    assert choose_positions("all", 0.25, LABELS) is None


def test_the_next_token_is_predicted_by_the_nearest_thought_that_reaches_it():
    predicted = of_nearest_thought(
        torch.tensor([[10, 11, 12, 13, 14]]),
        torch.tensor([[[[20, 21, 22]], [[30, 31, 32]], [[40, 41, 42]]]]),
        torch.tensor([[0, 2, -1]]),
    )
    # Position 1 is one ahead of the thought at 0; 3 and 4 are ahead of the one at 2.
    assert predicted[..., 0].tolist() == [[20, 21, 30, 31, 32]]


def test_a_position_counts_if_any_token_of_its_lookahead_is_a_target():
    """Its thoughts are reinforced, so the policy term must divide by it too."""
    labels = torch.full((1, 8), IGNORE_INDEX)
    labels[0, 5] = 3
    assert count_positions("all", 1.0, labels).tolist() == [1]
    assert count_positions("all", 1.0, labels, lookahead=3).tolist() == [3]
    model = thinking_model(plain_model(), thoughts={"length": 2, "lookahead": 3}).train()
    texts, total = random_texts(1, 8), 0.0
    for count in (None, torch.tensor(3)):
        loss = model(
            texts, labels=labels, num_thought_items=count, sample_ids=torch.zeros(1).long()
        )
        total = loss.loss.item() - total
    assert total == 0.0
