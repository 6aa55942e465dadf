"""Weights cast once for all steps of a rollout."""

import contextlib

import pytest
import torch
from tiny import plain_model, random_texts, thinking_model
from torch import nn

from quietstar.backbone.casting import cast_weights
from quietstar.backbone.compiling import compile_layers
from quietstar.sampling import rollout


def weights_of(model):
    return [m.weight for m in model.modules() if type(m) is nn.Linear]


@pytest.fixture
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield
    torch._dynamo.reset()


def frozen():
    model = plain_model().requires_grad_(False)
    assert weights_of(model)
    return model


def compiled():
    model = plain_model()
    compile_layers(model, "eager")
    return model


@pytest.mark.parametrize("make", [frozen, compiled])
def test_inside_they_are_cast_and_afterwards_what_they_were(make, autocast):
    model = make()
    before = weights_of(model)
    inside = []

    def interrupted():
        with cast_weights(model):
            inside.extend(weights_of(model))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {w.dtype for w in inside} == {torch.bfloat16}
    assert all(torch.equal(w, old.bfloat16()) for w, old in zip(inside, before, strict=True))
    assert all(w is old for w, old in zip(weights_of(model), before, strict=True))


def learning():
    return plain_model()


def in_pieces():
    model = frozen()
    for weight in weights_of(model):
        weight.ds_id = 1  # as ZeRO-3 marks them
    return model


def checkpointing():
    model = frozen()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def half():
    return plain_model(dtype=torch.float16).requires_grad_(False)


@pytest.mark.parametrize("make", [learning, in_pieces, checkpointing, half])
def test_others_stay_as_they_are(make, autocast):
    model = make()
    before = weights_of(model)
    with cast_weights(model):
        assert all(w is old for w, old in zip(weights_of(model), before, strict=True))


def test_without_autocast_nothing_is_cast():
    model = frozen()
    with cast_weights(model):
        assert {w.dtype for w in weights_of(model)} == {torch.float32}


@pytest.mark.parametrize("think", ["all", "random"])
def test_thoughts_are_those_of_casts_at_every_call(think, monkeypatch):
    thoughts = {"positions": think, "position_fraction": 0.5, "length": 3}
    model = thinking_model(plain_model(), thoughts=thoughts)
    model.causal_lm.requires_grad_(False)
    seen = []
    real = cast_weights

    @contextlib.contextmanager
    def watched(backbone):
        with real(backbone):
            seen.extend(w.dtype for w in weights_of(backbone))
            yield

    def thoughts_with(cast):
        monkeypatch.setattr(rollout, "cast_weights", cast)
        with torch.autocast("cpu", torch.bfloat16):
            return model(random_texts(2, 12), sample_ids=torch.tensor([4, 0])).thoughts

    assert torch.equal(thoughts_with(watched), thoughts_with(lambda _: contextlib.nullcontext()))
    assert set(seen) == {torch.bfloat16}
