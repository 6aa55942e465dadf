"""Without thoughts the model is the plain one: loss, gradients, predictions."""

import pytest
import torch
from tiny import plain_model, random_texts, think, thinking_model

IDS = random_texts(batch=3, length=9)
MASK = torch.ones_like(IDS).bool()
MASK[1, 6:] = False


def plain_loss(base):
    labels = IDS.masked_fill(~MASK, -100)
    logits = base(input_ids=IDS).logits
    flat = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)


def test_loss_and_gradients_are_those_of_the_plain_model():
    base = plain_model()
    model = thinking_model(plain_model())
    wanted = plain_loss(base)
    wanted.backward()
    output = model(IDS, MASK, think=False)
    output.loss.backward()
    torch.testing.assert_close(output.loss, wanted, atol=1e-6, rtol=1e-6)
    for (name, ours), theirs in zip(
        model.causal_lm.named_parameters(), base.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert output.metrics.means()["base_nll"] == pytest.approx(output.loss.item(), rel=1e-6)
    assert all(p.grad is None for n, p in model.named_parameters() if "language" not in n)


def test_num_items_divides_the_sum():
    model = thinking_model()
    whole = model(IDS, MASK, think=False).loss
    count = int(MASK[:, 1:].sum())
    part = model(IDS, MASK, num_items_in_batch=2 * count, think=False).loss
    torch.testing.assert_close(part, whole / 2)


def test_predictions_without_thoughts_are_the_plain_models():
    base = plain_model()
    scores = thinking_model(plain_model()).score_plain(IDS, MASK)
    logprobs = base(input_ids=IDS).logits.log_softmax(-1)
    assert (scores.predicted == logprobs.argmax(-1)).all()
    wanted = logprobs[:, :-1].gather(2, IDS[:, 1:, None]).squeeze(2) * MASK[:, 1:]
    torch.testing.assert_close(scores.logprobs[:, :-1], wanted, atol=1e-5, rtol=1e-5)


def test_no_token_is_more_likely_than_the_predicted_one():
    model = thinking_model()
    thoughts = think(model, IDS)
    assert (thoughts.base_predicted == model.score_plain(IDS).predicted).all()

    def mixed_logprobs(labels):
        scored = model.score(IDS, thoughts.tokens, labels=labels)
        return scored.mixed_logprobs[:, :-1, 0, 0]

    predicted = IDS.clone()
    predicted[:, 1:] = thoughts.mixed_predicted[:, :-1, 0, 0]
    best = mixed_logprobs(predicted)
    assert (predicted != IDS).any()
    for seed in range(20):
        other = random_texts(batch=3, length=9, seed=seed)
        assert (mixed_logprobs(other) <= best + 1e-6).all()
