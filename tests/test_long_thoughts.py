"""Long thoughts that end anywhere, between markers of several tokens, everywhere and at few."""

import pytest
import torch
from architectures import SUPPORTED
from reference import run_reference
from test_parity import (
    Comparison,
    batch,
    build,
    check,
    compare,
    gradient_errors,
    relative_error,
)
from tiny import plain_model, thinking_model

from quietstar.attention.layout import NO_TOKEN
from quietstar.backbone import teacher_forced
from quietstar.sampling.thoughts import Texts, ThoughtBatch

LENGTHS = [7, 5]
MARKERS = ((5, 5, 6), (1, 1, 1), (5, 1, 6), (1, 5, 1))
"""Tokens that open and that close a thought, and the lookahead."""


def ragged(model, positions=None, seed=6):
    """Given thoughts of any length: none, one, all, and what lies between."""
    input_ids, mask = batch(model, LENGTHS)
    most, generator = model.thoughts.length, torch.Generator().manual_seed(seed)
    if positions is None:
        positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    shape = (*positions.shape, 2)
    tokens = torch.randint(0, model.vocab_size, (*shape, most), generator=generator)
    lengths = torch.randint(0, most + 1, shape, generator=generator)
    lengths[0, 0] = torch.tensor([most, 0])
    lengths[0, 1] = torch.tensor([1, most - 1])
    texts = Texts(input_ids, input_ids.where(mask, -100), None, torch.arange(len(input_ids)))
    return ThoughtBatch.of_texts(texts, positions, tokens, lengths), mask


def compare_few(model, positions) -> Comparison:
    """As `test_parity.compare`, with thoughts at a few positions only."""
    thoughts, mask = ragged(model, positions)
    ids, places = thoughts.input_ids, positions.clamp(min=0)
    output = model(ids, mask, thoughts=thoughts)
    model.zero_grad()
    output.loss.backward()
    everywhere = torch.full((*ids.shape, *thoughts.tokens.shape[2:]), NO_TOKEN)
    chosen = torch.zeros(ids.shape, dtype=torch.bool)
    for b, p in (positions >= 0).nonzero().tolist():
        everywhere[b, positions[b, p]] = thoughts.tokens[b, p]
        chosen[b, positions[b, p]] = True
    expected = run_reference(model, ids, LENGTHS, everywhere.transpose(1, 2), positions=chosen)
    expected.loss.backward()
    with torch.no_grad():
        states, weight = model.states_with(ids, thoughts.token_major(), positions)
    index = places.expand(*states.policy.shape[:2], -1, -1)
    real = positions >= 0
    written = (thoughts.token_major() != NO_TOKEN) & real
    of_policy = expected.policy.gather(3, index.unsqueeze(-1).expand_as(states.policy))
    index = index[:1, :1].expand(*states.ahead.shape[:2], -1, -1)
    of_ahead = expected.ahead.gather(3, index.unsqueeze(-1).expand_as(states.ahead))
    reached = expected.reached.unsqueeze(1).expand_as(expected.mixing_weight).gather(3, index)
    reached = reached & real
    of_weight = expected.mixing_weight.gather(3, index)
    valid = expected.valid.unsqueeze(1).expand_as(expected.mixing_weight).gather(3, index) & real
    pairs = {
        "loss": (output.loss.detach(), expected.loss.detach()),
        "policy": (states.policy[written], of_policy[written]),
        "ahead": (states.ahead[reached], of_ahead[reached]),
        "mixing_weight": (weight[valid], of_weight[valid]),
    }
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    return Comparison(errors, gradient_errors(model, expected.model), "")


FEW = torch.tensor([[1, 4], [2, -1]])


@pytest.mark.parametrize("number", range(len(SUPPORTED)))
def test_long_thoughts_at_few_positions_equal_the_per_position_loop(number):
    start, end, lookahead = MARKERS[number % 4]
    model = build(SUPPORTED[number], length=64, lookahead=lookahead, num_markers=(start, end))
    check(compare_few(model, FEW))


@pytest.mark.parametrize("number", range(1, len(SUPPORTED), 2))
def test_long_thoughts_at_all_positions_equal_the_per_position_loop(number):
    start, end, lookahead = MARKERS[number // 2 % 4]
    model = build(SUPPORTED[number], length=16, lookahead=lookahead, num_markers=(start, end))
    check(compare(model, LENGTHS, thoughts=ragged(model)[0]))


@pytest.mark.parametrize("learn_chunk_tokens", [1, 200, 300, 10_000])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_groups_of_any_size_learn_the_same(name, learn_chunk_tokens):
    model = build(name, length=64, lookahead=3, num_markers=(2, 3))
    model.learn_chunk_tokens = learn_chunk_tokens
    check(compare_few(model, FEW))


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_tuned_models_run_packed_blocks_as_padded_ones(method, monkeypatch):
    model = thinking_model(
        plain_model(max_position_embeddings=128),
        thoughts={"length": 50, "lookahead": 3, "start_init": "ab", "end_init": "xyz"},
        tuning={"method": method, "lora_r": 2, "num_virtual_tokens": 3},
    )
    thoughts, mask = ragged(model, FEW)
    figures = []
    for packed_from in (10, 10**6):
        monkeypatch.setattr(teacher_forced, "PACKED_FROM", packed_from)
        model.zero_grad()
        loss = model(thoughts.input_ids, mask, thoughts=thoughts).loss
        loss.backward()
        figures.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*figures, rtol=1e-4, atol=1e-5)


def test_what_pads_is_never_run():
    model = build("llama", length=64)
    rows = []
    model.causal_lm.model.layers[0].register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].shape[:2])
    )
    thoughts, mask = ragged(model, FEW)
    model(thoughts.input_ids, mask, thoughts=thoughts)
    tokens = sum(1 + (thoughts.lengths[b, p] + 1 + 1).sum() for b, p in ((0, 0), (0, 1), (1, 0)))
    assert rows == [(2, 7), (1, tokens)]
