"""The model of cost gives what the arithmetic by hand gives."""

from dataclasses import replace

import pytest
from transformers import Qwen2Config

from quietstar.training.gpu_cost import GPUS, Shape, Work, step_cost

QWEN = {
    "0.5b": (896, 24, 14, 2, 4864, 151_936),
    "1.5b": (1536, 28, 12, 2, 8960, 151_936),
    "7b": (3584, 28, 28, 4, 18_944, 152_064),
}
LONG = Work(texts=32, text_length=128, places=1, num_thoughts=8, thought_length=512)
EVERYWHERE = Work(
    texts=8, text_length=1024, places=1024, num_thoughts=1, thought_length=12, lookahead=4
)


def shape(name):
    hidden, layers, heads, key_heads, inner, vocab = QWEN[name]
    return Shape.of(
        Qwen2Config(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_heads, intermediate_size=inner, vocab_size=vocab,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "work", "seconds", "tflop", "mfu"),
    [
        ("1.5b", EVERYWHERE, 3.5, 1726, 0.50),
        ("1.5b", LONG, 9.0, 1640, 0.19),
        ("0.5b", LONG, 6.4, 525, 0.087),
        ("7b", LONG, 18.5, 7521, 0.42),
    ],
)
def test_steps_on_an_h100(name, work, seconds, tflop, mfu):
    cost = step_cost(shape(name), work, GPUS["H100"])
    assert cost.seconds == pytest.approx(seconds, rel=0.025)
    assert cost.tflop == pytest.approx(tflop, rel=0.055)  # by hand without the prompts' tokens
    assert cost.mfu == pytest.approx(mfu, rel=0.03)


def test_long_thoughts_are_bound_by_launches_and_small_chunks_by_the_heads_bytes():
    h100 = GPUS["H100"]
    cost = step_cost(shape("1.5b"), LONG, h100)
    assert cost.rollout == pytest.approx(512 * (69 * 28 + 153) * 6e-6, rel=0.01)
    small = step_cost(shape("1.5b"), EVERYWHERE, h100, chunk_rows=96)
    large = step_cost(shape("1.5b"), EVERYWHERE, h100)
    assert small.seconds - large.seconds == pytest.approx(0.8, abs=0.1)


def test_frozen_weights_save_their_gradients_and_plain_training_has_no_rollout():
    h100 = GPUS["H100"]
    whole = step_cost(shape("7b"), LONG, h100)
    lora = step_cost(shape("7b"), replace(LONG, trained=0.0), h100)
    assert lora.learning == pytest.approx(2 / 3 * whole.learning, rel=0.02)
    assert lora.optimizer == 0
    plain = step_cost(shape("7b"), replace(LONG, places=0), h100)
    assert plain.rollout == 0 < plain.learning
