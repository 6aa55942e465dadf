"""Wrong arguments of the model's methods: one line each, never other figures or a traceback."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny import plain_model, random_texts, thinking_model

from quietstar.checks import check_given, check_positions, check_texts
from quietstar.errors import UserError
from quietstar.sampling.stopping import StopTexts
from quietstar.sampling.thoughts import Texts, ThoughtBatch

TEXTS = random_texts(2, 9)
PLACES = torch.tensor([[1, 4], [2, -1]])
WRONG = [[[9], [8]], [[5, 3], [3, 5]], [[3, 3], [3, 5]], [[-1, 3], [3, 5]], [[3, -2], [3, 5]]]


@pytest.fixture(scope="module")
def model():
    base = plain_model(max_position_embeddings=32)
    return thinking_model(base, thoughts={"positions": "random", "position_fraction": 2}).eval()


@pytest.mark.parametrize("positions", WRONG, ids=str)
def test_positions_that_no_text_has(model, positions):
    wrong, blank = torch.tensor(positions), torch.full((*torch.tensor(positions).shape, 1, 1), -1)
    for call in (model.draw, partial(model.score, thoughts=blank)):
        with pytest.raises(UserError, match="positions: "):
            call(TEXTS, positions=wrong)


@pytest.mark.parametrize("positions", [[[3, 5]], [[], []], [3, 5], [[1.0], [2.0]]], ids=str)
def test_positions_of_another_shape_or_type(positions):
    with pytest.raises(UserError, match=r"positions: torch\..* of shape .* cannot be"):
        check_positions(torch.tensor(positions), TEXTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"temperature \(0.0\): must be above 0"),
        ({"temperature": float("nan")}, r"temperature \(nan\)"),
        ({"temperature": -1.0}, r"temperature \(-1.0\)"),
        ({"num_thoughts": 0}, r"num_thoughts \(0\): must be at least 1"),
        ({"seed": 2**70}, r"seed \(\d+\): must fit into 64 bits"),
    ],
)
def test_settings_of_the_sampling_that_cannot_be(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.draw(TEXTS, **arguments)


@pytest.mark.parametrize("texts", [TEXTS[:0], TEXTS[:, :0]], ids=lambda x: str(x.shape))
def test_texts_without_a_token(model, texts):
    for call in (model, model.draw, model.score_plain):
        with pytest.raises(UserError, match=r"input_ids of shape .*: must be \(texts, tokens\)"):
            call(texts)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"answer_mask": TEXTS[:1] > 0}, r"answers of shape \(1, 9\): must be \(2, 9\)"),
        ({"marked": TEXTS[:1] > 0}, r"marked of shape \(1, 9\): must be \(2, 9\)"),
        ({"sample_ids": torch.arange(1)}, r"sample_ids of shape \(1,\): must be \(2,\)"),
    ],
)
def test_what_is_given_beside_other_texts(beside, message):
    right = {"answer_mask": None, "marked": None, "sample_ids": torch.arange(2)}
    with pytest.raises(UserError, match=message):
        check_texts(SimpleNamespace(input_ids=TEXTS, **right | beside))


@pytest.mark.parametrize("shape", [(2, 2, 1, 0), (2, 3, 1, 2), (1, 2, 1, 2), (2, 2, 0, 2)])
def test_given_thoughts_of_another_shape(model, shape):
    thoughts = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(UserError, match=r"thoughts of shape .*: must be \(batch, positions, thou"):
        check_given(thoughts, TEXTS, PLACES, 258, None)


def test_given_thoughts_that_cannot_be_learned_from(model):
    long, texts = torch.zeros(2, 2, 2, 40, dtype=torch.long), Texts(TEXTS, TEXTS, None, PLACES[0])
    refusal = "thoughts of 40 tokens: after a text of 9 this model has room for 20"
    with pytest.raises(UserError, match=refusal):
        model.score(TEXTS, long, positions=PLACES)
    with pytest.raises(UserError, match=refusal):
        model(TEXTS, thoughts=ThoughtBatch.of_texts(texts, PLACES, long))
    one = ThoughtBatch.of_texts(texts, PLACES, long[:, :, :1, :2])
    with pytest.raises(UserError, match=r"loss.estimator \(leave_one_out\): .* there is one"):
        model(TEXTS, thoughts=one)


def test_thoughts_are_drawn_where_training_thinks(model):
    output = model(TEXTS, sample_ids=torch.arange(2), seed=3)
    batch = model.draw(TEXTS, num_thoughts=2, temperature=1.0, seed=3)
    assert torch.equal(batch.positions, output.positions)
    assert torch.equal(batch.tokens, output.thoughts)
    assert model.draw(TEXTS, positions=None).tokens.shape == (2, 9, 1, 2)


def test_a_stop_text_that_is_longer_than_a_thought():
    with pytest.raises(UserError, match=r"thoughts.stop: 'abc' takes at least 3 tokens, but"):
        thinking_model(thoughts={"length": 2, "stop": ["a", "abc"]})
    thinking_model(thoughts={"length": 3, "stop": ["a", "abc"]})


def test_special_tokens_write_their_whole_name_or_nothing():
    tokenizer = thinking_model().tokenizer
    pad = torch.tensor([tokenizer.pad_token_id])
    for text, ends in (("a", False), (tokenizer.pad_token, True)):
        stop = StopTexts.of_tokenizer([text], tokenizer, len(tokenizer))
        assert (stop.step(torch.zeros_like(pad), pad) == stop.ended).item() == ends
