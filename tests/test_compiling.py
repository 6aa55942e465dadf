"""training.torch_compile: the same step from compiled layers, and who cannot have it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import plain_model, random_texts, thinking_model

from quietstar.backbone import compiling
from quietstar.backbone.compiling import check_compile, compile_layers
from quietstar.backbone.run import decoder_layers, run_text
from quietstar.errors import UserError
from quietstar.sampling.rollout import policy_states


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, **inputs):
    model.zero_grad()
    output = model(random_texts(2, 12), sample_ids=torch.tensor([4, 0]), **inputs)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def make_model(**thoughts):
    thoughts = {"length": 3, "lookahead": 2, "num_thoughts": 2} | thoughts
    return thinking_model(plain_model(), thoughts=thoughts)


@pytest.mark.parametrize(
    ("thoughts", "checkpointing", "backend"),
    [
        ({}, False, "inductor"),
        ({}, True, "aot_eager"),
        ({"positions": "random", "position_fraction": 0.5}, False, "aot_eager"),
    ],
    ids=["inductor", "checkpointing", "random"],
)
def test_a_compiled_step_has_the_thoughts_loss_and_gradients_of_a_plain_one(
    thoughts, checkpointing, backend
):
    model = make_model(**thoughts)
    model.learn_chunk_tokens = 100
    if checkpointing:
        model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    plain, expected = step(model)
    names = list(model.state_dict())
    assert compile_layers(model.causal_lm, backend) == model.causal_lm.config.num_hidden_layers
    compiled, gradients = step(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert list(model.state_dict()) == names
    assert torch.equal(compiled.thoughts, plain.thoughts)
    torch.testing.assert_close(compiled.loss, plain.loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_other_lengths_of_text_compile_once_more_and_then_never():
    model = make_model()
    compile_layers(model.causal_lm, "eager")
    for length in (12, 9):
        model(random_texts(2, length), sample_ids=torch.tensor([4, 0]))
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (7, 11, 10, 14):
        model(random_texts(2, length), sample_ids=torch.tensor([4, 0]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


def test_steps_of_a_compiled_rollout_are_one_graph_for_all_layers():
    code = "import test_compiling; test_compiling.check_graphs_of_rollouts()"  # unhooked: the
    # checks of types that tests run with are breaks themselves
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def check_graphs_of_rollouts():
    lm, start = (model := make_model()).causal_lm, model.start_vectors.detach()
    texts = random_texts(2, 12)
    chosen = torch.tensor([[0, 3, 7], [2, 5, 6]])
    generator = torch.Generator().manual_seed(0)
    cases = [
        (places, torch.randint(0, 20, (4, 2, *shape), generator=generator))
        for places, shape in ((None, texts.shape), (chosen, chosen.shape))
    ]
    expected = [policy_states(lm, start, texts, thoughts, places) for places, thoughts in cases]
    text = run_text(lm, texts)
    compile_layers(lm, "aot_eager")
    counters = torch._dynamo.utils.counters
    for (places, thoughts), states in zip(cases, expected, strict=True):
        torch._dynamo.reset()
        counters.clear()
        found = policy_states(lm, start, texts, thoughts, places, text)
        torch.testing.assert_close(found, states, rtol=1e-5, atol=1e-5)
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 2  # start and thought


def test_layers_are_the_list_that_is_as_long_as_the_config_says():
    model = plain_model()
    assert decoder_layers(model) is model.model.layers
    model.config.num_hidden_layers += 1
    with pytest.raises(UserError, match=r"layers of .* not to be found; set training\.torch_comp"):
        compile_layers(model)


def test_weights_sharded_and_a_machine_without_compiler_are_refused(monkeypatch):
    check_compile(False, sharded=True)
    with pytest.raises(UserError, match=r"training\.torch_compile: true.*ZeRO-3.*zero2\.yaml"):
        check_compile(True, sharded=True)
    check_compile(True, sharded=False)
    monkeypatch.setattr(compiling, "find_compiler", lambda: None)
    with pytest.raises(
        UserError, match=r"training\.torch_compile: true needs a C\+\+ compiler.*false"
    ):
        check_compile(True, sharded=False)
