"""Keyed noise and the inverse of the distribution: the numbers, and the thoughts they give."""

import pytest
import torch
from tiny import BYTES_VOCAB, plain_model, random_texts, thinking_model

from quietstar.backbone.output_head import find_output_head
from quietstar.errors import UserError
from quietstar.sampling import noise, rollout
from quietstar.sampling.noise import keyed_uniform, sample_inverse_cdf, thought_noise
from quietstar.sampling.rollout import sample_logits, sample_thoughts
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


# --- top_p and top_k ------------------------------------------------------------------------------


def kept_probabilities(logits, top_p, top_k):
    """Exact, renormalized over the tokens that both filters leave."""
    order = logits.double().argsort(descending=True)
    kept = order[:top_k]
    ends = logits[kept].double().softmax(-1).cumsum(-1)
    kept = kept[: int((ends < (1 if top_p is None else top_p)).sum()) + 1]
    probabilities = torch.zeros(len(logits), dtype=torch.double)
    probabilities[kept] = logits[kept].double().softmax(-1)
    return probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("top_p", "top_k"),
    [(0.8, None), (0.05, None), (None, 5), (0.6, 20), (0.9, 3), (1.0, 500)],
)
def test_filters_draw_by_the_renormalized_probabilities_of_what_they_leave(
    temperature, top_p, top_k
):
    logits, draws = random_logits(1, 130), 100_000
    sampling = Sampling(1, 1, temperature, top_p=top_p, top_k=top_k)
    uniform = ((torch.arange(draws) + 0.5) / draws)[None]
    tokens = sample_logits(logits.clone(), uniform, sampling)[0]
    counts = torch.bincount(tokens, minlength=130)
    expected = kept_probabilities(logits[0] / temperature, top_p, top_k)
    if top_p != 1.0:
        assert (expected == 0).any()
    assert (counts[expected == 0] == 0).all()
    assert (counts - expected * draws).abs().max() <= 2  # as above


def test_without_filters_draws_are_as_before():
    logits, uniform = random_logits(50, 130), torch.rand(50, 4)
    expected = sample_inverse_cdf(logits.clone(), uniform)
    for off in ({}, {"top_p": 1.0}):
        assert torch.equal(sample_logits(logits.clone(), uniform, Sampling(4, 1, 1.0, **off)),
                           expected)  # fmt: skip
    greedy = Sampling(4, 1, None, top_p=0.1, top_k=1)
    assert torch.equal(sample_logits(logits, uniform, greedy)[:, 0], logits.argmax(-1))


FILTERS = {"top_p": 0.7, "top_k": 6}


def test_filtered_thoughts_do_not_depend_on_how_a_batch_is_cut(model, monkeypatch):
    texts, ids = random_texts(4, 20), torch.tensor([8, 3, 5, 1])
    whole = sample(model, texts, ids, **FILTERS)
    assert not torch.equal(whole, sample(model, texts, ids))
    halves = [sample(model, texts[i : i + 2], ids[i : i + 2], **FILTERS) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(halves, 2))
    monkeypatch.setattr(rollout, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(rollout, "_LEAST_ROWS", 64)
    assert torch.equal(sample(model, texts, ids, **FILTERS), whole)


def test_the_model_and_its_generation_filter_their_thoughts():
    model, texts = thinking_model(thoughts=FILTERS).eval(), random_texts(2, 9)
    ids = {"sample_ids": torch.arange(2), "seed": 3}
    arguments = {**ids, "num_thoughts": 2, "temperature": 1.0}
    drawn = model.draw(texts, **arguments, **FILTERS).tokens
    assert torch.equal(model(texts, **ids).thoughts, drawn)
    assert not torch.equal(model.draw(texts, **arguments).tokens, drawn)
    greedy = model.draw(texts, **arguments, top_k=1).tokens
    assert torch.equal(greedy[:, :, :1], model.draw(texts).tokens)
    out = model.generate(
        texts[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0,
        num_thoughts=2, thought_temperature=1.0, thought_top_p=0.7, thought_top_k=6, seed=3,
        return_dict_in_generate=True,
    )  # fmt: skip
    seen = model.draw(out.sequences, **arguments, **FILTERS).tokens
    assert torch.equal(out.thoughts, seen[:, 4:8])


@pytest.mark.parametrize("wrong", [{"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}])
def test_a_filter_that_leaves_nothing_is_refused(wrong, model):
    with pytest.raises(UserError, match=r"top_. \(.*\): must be"):
        model.draw(random_texts(1), temperature=1.0, **wrong)


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


def test_noise_of_many_tokens_is_that_of_each(monkeypatch):
    ids, positions = torch.tensor([0, 5]), torch.tensor([[1, 9], [0, -1]])
    for most in (1, 24, 2**16):  # a token, three tokens and all at a time
        monkeypatch.setitem(noise._NUMBERS_AT_ONCE, "cpu", most)
        found = list(thought_noise(7, ids, 2, range(2, 9), positions))
        for token, numbers in zip(range(2, 9), found, strict=True):
            assert torch.equal(numbers, keyed_uniform(7, ids, 2, token, positions))
    # As recorded: a run that is resumed, or whose machine differs, draws the same.
    assert (found[1] * 2**24).int().flatten().tolist() == [
        6247906, 10592516, 10980478, 11555110, 14267252, 2565032, 3505095, 14072952,
    ]  # fmt: skip


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
