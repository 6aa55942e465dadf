"""Refusal by measurement: what must be refused is, and the measurement is not blind."""

from dataclasses import replace

import pytest
import torch
from architectures import REFUSED, SUPPORTED, meta_model, tiny_architecture
from transformers import LlamaConfig, LlamaForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.attention import block_attention, dense, passes
from quietstar.attention import interface as attention
from quietstar.attention.blocks import ContiguousBlocks
from quietstar.backbone import output_head
from quietstar.errors import UserError
from quietstar.model import self_check
from quietstar.model.self_check import TOLERANCE, check_architecture, worst_error


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_supported_architecture_passes(name):
    check_architecture(meta_model(name))


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_architecture_is_refused_in_one_line_that_names_its_class(name, tokenizer):
    model = meta_model(name)
    with pytest.raises(UserError) as caught:
        QuietStarForCausalLM.from_base(model, tokenizer=tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    assert type(model).__name__ in message
    assert "is not supported" in message


def test_the_check_runs_once_for_a_config(monkeypatch):
    runs = []
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setattr(self_check, "worst_error", lambda model: runs.append(model) or 0.0)
    check_architecture(meta_model("llama"))
    check_architecture(meta_model("llama"))
    check_architecture(meta_model("mistral"))
    assert len(runs) == 2


def test_the_check_leaves_the_model_and_the_random_state_as_they_were():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        rms_norm_eps=3e-6,  # a config that no other test has checked
    )
    model = LlamaForCausalLM(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    settings, state = config.to_json_string(), torch.get_rng_state()
    check_architecture(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_json_string() == settings
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- The check is not blind: each fault, on an architecture that has the feature ------------------


def _rules(**changes):
    """Attention that misreads its rules."""
    read = attention._score_rules

    def misread(*args):
        rules = read(*args)
        new = {key: change(getattr(rules, key)) for key, change in changes.items()}
        return replace(rules, **new)

    return lambda patch: patch.setattr(attention, "_score_rules", misread)


def _no_score_softcap(patch):
    patch.setattr(dense, "softcapped", lambda scores, rules: scores)


def _window_ignores_the_place_in_the_block(patch):
    visible = dense._visible
    patch.setattr(
        dense,
        "_visible",
        lambda where, length, index, *rest: visible(where, length, min(index, 0), *rest),
    )


def _no_sinks_in_blocks(patch):
    patch.setattr(dense, "softmax_with_sinks", lambda scores, sinks: scores.softmax(-1))


def _text_keys_moved(patch):
    near = ContiguousBlocks._near
    patch.setattr(ContiguousBlocks, "_near", lambda self, x: near(self, x).roll(1, 2))


def _block_positions_off_by_one(patch):
    position_ids = ContiguousBlocks.position_ids
    patch.setattr(
        ContiguousBlocks, "position_ids", lambda self, device: position_ids(self, device) + 1
    )


def _block_not_causal(patch):
    def scores(q, k, scale):
        groups = q.shape[1] // k.shape[1]
        return q @ k.repeat_interleave(groups, 1).mT * scale

    patch.setattr(block_attention, "inner_scores", scores)


def _thoughts_of_a_position_swapped(patch):
    from_rows = ContiguousBlocks.from_rows

    def swapped(self, x):
        start, rest = from_rows(self, x)
        return start, rest.flip(1)

    patch.setattr(ContiguousBlocks, "from_rows", swapped)


def _no_merge(patch):
    values = block_attention.inner_values
    patch.setattr(block_attention, "inner_values", lambda w, v: torch.zeros_like(values(w, v)))


def _rollout_keys_lost(patch):
    store = passes.RolloutCache.store_block

    def store_zeros(self, layer, index, k, v):
        return store(self, layer, index, torch.zeros_like(k), v)

    patch.setattr(passes.RolloutCache, "store_block", store_zeros)


def _no_logit_scale(patch):
    patch.setattr(output_head, "_logit_scale", lambda config: 1.0)


def _no_logit_softcap(patch):
    find = self_check.find_output_head
    patch.setattr(self_check, "find_output_head", lambda m: replace(find(m), softcap=None))


FAULTS = {
    "soft cap of the scores ignored": ("gemma2", _no_score_softcap),
    "soft cap of the scores read as none": ("gemma2", _rules(softcap=lambda cap: None)),
    "soft cap of the logits ignored": ("gemma2", _no_logit_softcap),
    "window ignored": ("mistral", _rules(window=lambda window: None)),
    "window ignored in some layers": ("gemma3_text", _rules(window=lambda window: None)),
    "window too long by one": ("mistral", _rules(window=lambda window: window + 1)),
    "window not moved with the block token": ("mistral", _window_ignores_the_place_in_the_block),
    "scale of the scores wrong": ("llama", _rules(scale=lambda scale: 1.01 * scale)),
    "scale of the scores wrong, dense": ("gemma2", _rules(scale=lambda scale: 1.01 * scale)),
    "own scale of the scores ignored": ("granite", _rules(scale=lambda scale: 0.25)),
    "sinks ignored": ("gpt_oss", _no_sinks_in_blocks),
    "sinks read as none": ("gpt_oss", _rules(sinks=lambda sinks: None)),
    "text keys moved by one": ("llama", _text_keys_moved),
    "rotary positions off by one": ("llama", _block_positions_off_by_one),
    "learned positions off by one": ("gpt2", _block_positions_off_by_one),
    "block not causal": ("llama", _block_not_causal),
    "thoughts swapped": ("llama", _thoughts_of_a_position_swapped),
    "block left out": ("llama", _no_merge),
    "keys of the rollout lost": ("llama", _rollout_keys_lost),
    "scale of the logits ignored": ("cohere", _no_logit_scale),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_sees_a_fault(fault, monkeypatch):
    name, break_it = FAULTS[fault]
    model = tiny_architecture(name)
    break_it(monkeypatch)
    assert worst_error(model) > TOLERANCE
