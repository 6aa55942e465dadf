"""Keyed noise and the inverse of the distribution: the numbers, and the thoughts they give."""

import pytest
import torch
from tiny import BYTES_VOCAB, plain_model, random_texts, thinking_model

from quietstar.backbone.output_head import find_output_head
from quietstar.sampling import rollout
from quietstar.sampling.noise import keyed_uniform, sample_inverse_cdf
from quietstar.sampling.rollout import sample_thoughts
from quietstar.sampling.thoughts import Sampling

LOWEST, HIGHEST = 2.0**-25, 1 - 2.0**-25  # the second is 1.0 in float32


def random_logits(rows, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * 2


# --- sample_inverse_cdf ---------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 64, 130])
def test_samples_have_the_distribution_of_the_logits(vocab):
    logits = random_logits(1, vocab)
    draws = 200_000
    # Evenly spaced numbers: every token's share is its probability up to one number.
    uniform = (torch.arange(draws) + 0.5) / draws
    tokens = sample_inverse_cdf(logits.expand(draws, -1).clone(), uniform[:, None])[:, 0]
    counts = torch.bincount(tokens, minlength=vocab)
    expected = logits[0].double().softmax(-1) * draws
    # One number at each end of the token's interval, one for rounding of the sums (2e5 * 6e-8).
    assert (counts - expected).abs().max() <= 2


@pytest.mark.parametrize("vocab", [7, 64, 130])
def test_samples_with_keyed_noise_pass_a_chi_square_test(vocab):
    logits = random_logits(1, vocab)
    uniform = keyed(3, torch.arange(40), 5, 0, 500).flatten()
    tokens = sample_inverse_cdf(logits.expand(len(uniform), -1).clone(), uniform[:, None])[:, 0]
    counts = torch.bincount(tokens, minlength=vocab)
    expected = logits[0].double().softmax(-1) * len(uniform)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = vocab - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5  # mean n, variance 2n


@pytest.mark.parametrize("vocab", [7, 64, 130, 200])
def test_samples_agree_with_searching_the_whole_cumulative_distribution(vocab):
    rows = 4000
    logits = random_logits(rows, vocab, seed=1)
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(2))
    ends = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(ends, uniform.double()[:, None]).squeeze(1)
    tokens = sample_inverse_cdf(logits.clone(), uniform[:, None])[:, 0]
    clear = (ends - uniform[:, None]).abs().min(-1).values > 1e-6  # float32 sums
    assert clear.float().mean() > 0.99
    assert torch.equal(tokens[clear], expected[clear])


@pytest.mark.parametrize("excluded", [float("-inf"), -200.0])
@pytest.mark.parametrize("vocab", [7, 64, 65, 130, 200])
def test_extreme_numbers_never_give_a_token_of_probability_zero(vocab, excluded):
    generator = torch.Generator().manual_seed(4)
    rows = 300
    possible = torch.rand(rows, vocab, generator=generator) < 0.2
    possible[:100, vocab // 2 :] = False  # whole blocks at the end, and at the start, without
    possible[100:200, : vocab // 2] = False
    possible[torch.arange(rows), torch.randint(0, vocab, (rows,), generator=generator)] = True
    logits = random_logits(rows, vocab).where(possible, excluded)
    for number in (LOWEST, 2.0**-24, 0.5, 1 - 2.0**-24, HIGHEST):
        tokens = sample_inverse_cdf(logits.clone(), torch.full((rows, 1), number))[:, 0]
        assert possible.gather(1, tokens[:, None]).all(), number


def test_extreme_numbers_give_the_first_and_the_last_token():
    logits = torch.zeros(1, 130)
    assert sample_inverse_cdf(logits.clone(), torch.tensor([[LOWEST]])).item() == 0
    assert sample_inverse_cdf(logits.clone(), torch.tensor([[HIGHEST]])).item() == 129


def keyed(seed, ids, num_thoughts, token, length):
    positions = torch.arange(length).expand(len(ids), -1)
    return keyed_uniform(seed, ids, num_thoughts, token, positions)


# --- keyed_uniform --------------------------------------------------------------------------------


def test_keyed_numbers_are_uniform():
    numbers = keyed(0, torch.arange(50), 4, 1, 500).double()  # 100,000
    assert numbers.min() > 0
    assert numbers.max() < 1
    # Standard errors: sqrt(1/12/n) = 9e-4 and sqrt(1/180/n) = 2.4e-4; four of each.
    assert numbers.mean() == pytest.approx(1 / 2, abs=3.6e-3)
    assert numbers.var() == pytest.approx(1 / 12, abs=1e-3)
    counts = torch.histc(numbers, 20, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 19 + 4 * 38**0.5


def test_the_largest_keyed_number_is_below_one():
    # At this key all 24 random bits are ones; half a unit more is not a float32 below 1.
    number = keyed(0, torch.tensor([6315]), 1, 0, 1456)[0, 0, 1455]
    assert number == 1 - 2.0**-24


def test_neighbouring_keys_give_independent_numbers():
    table = torch.stack([keyed(0, torch.arange(30), 6, t, 100) for t in range(4)])
    centred = table.double() - 0.5  # (token, thought, sample, position), 72,000 numbers
    other_seed = torch.stack([keyed(1, torch.arange(30), 6, t, 100) for t in range(4)])
    pairs = {
        "token": (centred[1:], centred[:-1]),
        "thought": (centred[:, 1:], centred[:, :-1]),
        "sample": (centred[:, :, 1:], centred[:, :, :-1]),
        "position": (centred[..., 1:], centred[..., :-1]),
        "seed": (centred, other_seed.double() - 0.5),
        # sums of keys must not coincide either
        "token against position": (centred[1:, ..., :-1], centred[:-1, ..., 1:]),
        "sample against thought": (centred[:, 1:, :-1], centred[:, :-1, 1:]),
        "seed against sample": (centred[:, :, 1:], other_seed[:, :, :-1].double() - 0.5),
    }
    for name, (a, b) in pairs.items():
        correlation = 12 * (a * b).mean()
        assert abs(correlation) < 4.5 / a.numel() ** 0.5, name


def test_keyed_numbers_depend_on_every_part_of_the_key():
    ids = torch.tensor([5, 9])
    numbers = keyed(0, ids, 2, 0, 4)  # (K, B, S)
    assert numbers.unique().numel() == numbers.numel()  # thought, sample, position
    for other in (keyed(1, ids, 2, 0, 4), keyed(0, ids, 2, 1, 4)):
        assert not torch.isin(other, numbers).any()


def test_part_of_a_batch_gets_the_same_numbers():
    whole = keyed(7, torch.tensor([4, 0, 11, 2]), 3, 1, 6)
    part = keyed(7, torch.tensor([11, 0]), 2, 1, 5)
    assert torch.equal(part, whole[:2, [2, 1], :5])


# --- sample_thoughts ------------------------------------------------------------------------------


def sample(model, texts, ids=None, **settings):
    sampling = Sampling(**{"num_thoughts": 2, "thought_length": 3, "temperature": 1.0, **settings})
    ids = torch.arange(len(texts)) if ids is None else ids
    start = model.start_vectors
    return sample_thoughts(model.causal_lm, model.output_head, start, texts, ids, sampling)


@pytest.fixture(scope="module")
def model():
    return thinking_model()


def test_a_batch_and_its_halves_draw_the_same_thoughts(model):
    texts = random_texts(4)
    ids = torch.tensor([8, 3, 5, 1])
    whole = sample(model, texts, ids)
    halves = [sample(model, texts[i : i + 2], ids[i : i + 2]) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(halves, 2))
    assert not torch.equal(whole, sample(model, texts, ids, seed=1))


@pytest.mark.parametrize("temperature", [1.0, 0.6, None])
def test_thoughts_do_not_depend_on_the_chunks_of_logits(temperature, model, monkeypatch):
    texts = random_texts(4, 20)  # 160 rows a step
    whole = sample(model, texts, temperature=temperature)
    monkeypatch.setattr(rollout, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(rollout, "_LEAST_ROWS", 64)
    assert torch.equal(sample(model, texts, temperature=temperature), whole)


def test_the_thoughts_of_a_text_differ_among_each_other(model):
    thoughts = sample(model, random_texts(1, 40))
    assert (thoughts[:, 0] != thoughts[:, 1]).any(0).float().mean() > 0.5


def test_padded_rows_of_the_vocabulary_are_never_sampled():
    base = plain_model(vocab_size=BYTES_VOCAB + 14, tie_word_embeddings=False)
    with torch.no_grad():  # far more likely than any token
        weight = base.lm_head.weight
        weight[BYTES_VOCAB:] = 10 * weight[:14]
    model = thinking_model(base)
    texts = random_texts(2, 30)
    all_rows = find_output_head(model.causal_lm)  # the same head, unrestricted
    args = (model.start_vectors, texts, torch.arange(2))
    for temperature in (1.0, 0.5, None):
        sampling = Sampling(2, 3, temperature)
        free = sample_thoughts(model.causal_lm, all_rows, *args, sampling)
        assert (free >= BYTES_VOCAB).float().mean() > 0.5  # the trap is there
        assert sample(model, texts, temperature=temperature).max() < BYTES_VOCAB


def test_greedy_thoughts_are_the_most_likely_tokens(model):
    texts = random_texts(1, 8)
    thoughts = sample(model, texts, temperature=None, num_thoughts=1)[:, 0, 0]  # (T, S)
    embed = model.causal_lm.get_input_embeddings()
    for position in range(8):
        sequence = torch.cat([embed(texts[0, : position + 1]), model.start_embedding[None]])
        for token in thoughts[:, position]:  # the plain model, one token after another
            logits = model.causal_lm(inputs_embeds=sequence[None]).logits[0, -1]
            assert token == logits.argmax()
            sequence = torch.cat([sequence, embed(token)[None]])


def test_a_tiny_temperature_gives_the_greedy_thoughts(model):
    texts = random_texts(3)
    greedy = sample(model, texts, temperature=None)
    assert torch.equal(sample(model, texts, temperature=1e-4), greedy)
    assert not torch.equal(sample(model, texts), greedy)
