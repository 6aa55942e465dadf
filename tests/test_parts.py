"""Rewards, objectives and samplers of a user's own: the tutorial's, wrong ones, given thoughts."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import end_early, plain_model, random_texts, run_config, thinking_model

from quietstar import registry
from quietstar.cli import main as cli
from quietstar.config import loss_config
from quietstar.errors import UserError
from quietstar.model.scoring import read_thoughts
from quietstar.objectives import Objective

DOCS = Path(__file__).resolve().parents[1] / "docs"
TUTORIAL = {
    name: source
    for page in ("architecture.md", "tutorials/your-reward.md")
    for name, source in re.findall(
        r"<!-- (\w+)\.py -->\n```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.S
    )
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The tutorial's files in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, source in TUTORIAL.items():
        (tmp_path / f"{name}.py").write_text(source)
    return tmp_path


def trajectory(model, steps=4):
    """Loss of every step, and the weights at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model(random_texts(3, 12, seed=step), seed=step).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()]


def build(**settings):
    settings = {"thoughts": {"length": 3}, **settings}
    return thinking_model(plain_model(), **settings).train()


def test_the_tutorial_is_as_short_as_it_says(modules):
    lines = {name: len(source.strip().splitlines()) for name, source in TUTORIAL.items()}
    assert lines["my_rewards"] <= 10
    assert lines["my_objectives"] <= 30
    assert lines["my_samplers"] <= 30


def test_an_objective_from_outside_goes_the_way_of_the_built_in_one_bit_for_bit(modules):
    losses, weights = trajectory(build())
    outside = {"objective": "my_objectives:Mine"}
    own_losses, own_weights = trajectory(build(loss=outside))
    assert own_losses == losses
    assert all(torch.equal(a, b) for a, b in zip(own_weights, weights, strict=True))
    changed, _ = trajectory(build(loss={**outside, "policy": 5.0}))
    assert changed != losses


@pytest.mark.parametrize("learn_chunk_tokens", [None, 60])
def test_a_reward_from_outside_changes_what_is_learned(modules, learn_chunk_tokens):
    model, own = build(), build(loss={"reward": "my_rewards:brevity"})
    model.learn_chunk_tokens = own.learn_chunk_tokens = learn_chunk_tokens
    assert trajectory(own)[0] != trajectory(model)[0]


def test_a_sampler_from_outside_makes_the_thoughts(modules):
    model = build(thoughts={"length": 3, "num_thoughts": 2, "sampler": "my_samplers:Echo"})
    texts = random_texts(2, 6)
    thoughts = model(texts).thoughts  # (batch, positions, thoughts, length)
    assert torch.equal(thoughts[0, 4, 1], texts[0, 2:5])


def test_all_three_train_from_the_command_line(modules, monkeypatch):
    config = run_config(modules, training__max_steps=1)
    (modules / "run.yaml").write_text(
        "\n".join(f"{k}: {v}" for k, v in config.model_dump(exclude={"stages"}).items())
        .replace("None", "null").replace("True", "true").replace("False", "false")
    )  # fmt: skip
    parts = ["--loss.reward", "my_rewards:brevity", "--loss.objective", "my_objectives:Mine",
             "--thoughts.sampler", "my_samplers:Echo"]  # fmt: skip
    code = cli.main(["train", "--config", "run.yaml", *parts, "--loss.policy", "0.2"])
    assert code in (None, 0)
    assert (Path(config.training.output_dir) / "final" / "quietstar.json").exists()


WRONG = {
    "no module": ("nowhere:brevity", "module nowhere cannot be imported"),
    "no such name": ("wrong:missing", r"wrong\.py defines no missing. Define it"),
    "a misspelt name": ("wrong:shapes", r"wrong\.py defines no shapes; did you mean shape\?"),
    "a file": ("wrong.py:shape", r"such as my_module:mine, without \.py"),
    "other arguments": ("wrong:three", r"called as three\(thoughts, scores\)"),
    "another shape": ("wrong:shape", r"tensor of shape \(.*must return a tensor of shape"),
    "no tensor": ("wrong:number", "it returned float"),
    "not finite": ("wrong:infinite", "not finite"),
    "a gradient": ("wrong:gradient", "with a gradient"),
    "no name": ("wrong:", "written module:name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_reward_is_one_line(case, modules):
    (modules / "wrong.py").write_text(
        "import torch\n"
        "def three(thoughts, scores, more): return 0\n"
        "def shape(thoughts, scores): return scores.mixed\n"
        "def number(thoughts, scores): return 1.0\n"
        "def infinite(thoughts, scores): return scores.mixed.sum(-1) / 0\n"
        "def gradient(thoughts, scores):\n"
        "    return scores.mixed.sum(-1).requires_grad_()\n"
    )
    name, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        build(loss={"reward": name})(random_texts(2, 6))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"loss.reward ({name})")


def test_a_sampler_that_gives_something_else_is_one_line(modules):
    (modules / "odd.py").write_text(
        "class Short:\n"
        "    def sample(self, model, texts, positions, spec):\n"
        "        from quietstar.sampling.thoughts import ThoughtBatch\n"
        "        tokens = texts.input_ids[:, :, None, None]\n"
        "        return ThoughtBatch.of_texts(texts, positions, tokens)\n"
        "class Nothing:\n"
        "    def sample(self, model, texts, positions, spec):\n"
        "        return None\n"
    )
    for name, message in (("odd:Short", "must be torch.int64 of"), ("odd:Nothing", "NoneType")):
        model = build(thoughts={"length": 3, "num_thoughts": 2, "sampler": name})
        with pytest.raises(UserError, match=message):
            model(random_texts(2, 6))


def test_names_that_are_not_built_in_say_which_are():
    for key in registry.KINDS:
        with pytest.raises(UserError, match="built in: ") as caught:
            registry.find(key, "thougt")
        assert all(name in str(caught.value) for name in registry.choices(key))


class ByReward(Objective):
    """Every true token counts what its thought achieved (VeriFree's gradient, up to constants)."""

    def weigh(self, reward, scores):
        from quietstar.losses.weights import ThoughtWeights

        weight = reward.exp().unsqueeze(-1).expand_as(scores.mixed)
        return ThoughtWeights(None, thought=weight)


@pytest.mark.parametrize("learn_chunk_tokens", [None, 1, 60])
def test_weights_of_true_tokens_may_depend_on_all_thoughts_of_a_position(
    learn_chunk_tokens, monkeypatch
):
    """The loss is sum R * NLL, with R = exp(reward) as a constant, however blocks are grouped."""
    model = build()
    monkeypatch.setattr(model, "objective", ByReward(loss_config()))
    model.learn_chunk_tokens = learn_chunk_tokens
    texts = random_texts(2, 6)
    model(texts, sample_ids=torch.arange(2)).loss.backward()
    actual = model.end_embedding.grad.clone()
    model.zero_grad()
    batch = model.draw(texts, num_thoughts=2, temperature=1.0)
    states, _ = read_thoughts(model, texts, batch.tokens, None)
    logits = model.output_head.logits(states.ahead)  # (A, K, B, S, V)
    lookahead = len(logits)
    total = torch.zeros(())
    for b in range(2):
        for i in range(6):
            valid = [a for a in range(1, lookahead + 1) if i + a < 6]
            for k in range(2):
                logprobs = [logits[a - 1, k, b, i].log_softmax(-1)[texts[b, i + a]] for a in valid]
                if logprobs:
                    total = total - sum(logprobs).detach().exp() * sum(logprobs)
    (total / (lookahead * 2 * 2 * 5)).backward()  # A K M: five positions of each text
    torch.testing.assert_close(actual, model.end_embedding.grad, rtol=1e-4, atol=1e-6)


def test_given_thoughts_teach_what_sampled_ones_teach():
    texts = random_texts(2, 8)
    sampled, given = build(), build()
    output = sampled(texts, seed=3)
    output.loss.backward()
    batch = given.draw(texts, num_thoughts=2, temperature=1.0, seed=3)
    again = given(texts, thoughts=batch)
    again.loss.backward()
    assert torch.equal(output.loss, again.loss)
    for a, b in zip(sampled.parameters(), given.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_given_thoughts_at_some_positions():
    model = build(thoughts={"length": 3, "positions": "random", "position_fraction": 0.5})
    texts = random_texts(2, 8)
    output = model(texts, seed=3)
    batch = model.draw(texts, num_thoughts=2, temperature=1.0, seed=3, positions=output.positions)
    assert model(texts, thoughts=batch).loss.item() == pytest.approx(output.loss.item(), rel=1e-6)


def test_a_sampler_whose_thoughts_end_early():
    texts, own = random_texts(2, 8), end_early(build())
    output = own(texts, seed=3)
    assert output.thoughts.shape == (2, 8, 2, 3)
    assert (output.thoughts[:, :, 0, 1:] == -1).all()
    assert (output.thoughts[:, :, 1, 2:] == -1).all()
    assert (output.thoughts[:, :, 1, :2] >= 0).all()
    batch = own.draw(texts, num_thoughts=2, temperature=1.0, seed=3)
    assert batch.lengths.flatten().unique().tolist() == [1, 2]
    assert torch.equal(build()(texts, thoughts=batch).loss, output.loss)
    scored = own.score(texts, batch)
    again = own.score(texts, scored.tokens)
    assert torch.equal(scored.mixed_logprobs, again.mixed_logprobs)
    assert {len(tokens) for tokens in scored.to_frame().tokens} == {1, 2}
    mixed = own.score(texts, scored.tokens, only_mixed=True, lookahead=1).mixed_logprobs
    torch.testing.assert_close(mixed[..., 0], scored.mixed_logprobs[..., 0])


def test_thoughts_with_a_hole_or_other_lengths_are_an_error():
    model, texts = build(), random_texts(2, 8)
    batch = model.draw(texts)
    with pytest.raises(ValueError, match="other lengths than tokens before the first -1"):
        model(texts, thoughts=replace(batch, lengths=batch.lengths - 1))
    tokens = batch.tokens.clone()
    tokens[1, 2, 0, 1] = -1
    holed = replace(batch, tokens=tokens, lengths=(tokens != -1).sum(-1))
    with pytest.raises(ValueError, match="-1 stands before a token"):
        model(texts, thoughts=holed)
    with pytest.raises(ValueError, match="-1 stands before a token"):
        model.score(texts, tokens)
    with pytest.raises(ValueError, match=r"thoughts \(-2\): must be token ids from 0"):
        model.score(texts, tokens.clamp(max=-2))


def test_given_thoughts_of_other_texts_are_an_error():
    model = build()
    batch = model.draw(random_texts(2, 8))
    with pytest.raises(ValueError, match="thoughts of other texts"):
        model(random_texts(2, 8, seed=9), thoughts=batch)
    with pytest.raises(ValueError, match="do not fit"):
        model(random_texts(2, 7), thoughts=batch)


def test_texts_without_an_index_are_counted_over_calls_of_any_size(tmp_path, tokenizer):
    """An index that repeats would give two texts the same noise."""
    model, seen = build(), []
    sample = model.sampler.sample

    class Spy:
        def sample(self, model, texts, positions, spec):
            seen.extend(texts.sample_ids.tolist())
            return sample(model, texts, positions, spec)

    model.sampler = Spy()
    for size in (3, 1, 2):
        model(random_texts(size, 6))
    assert seen == list(range(6))
    model.save_pretrained(tmp_path, tokenizer)
    again = type(model).from_pretrained(tmp_path, trainable=True)
    assert again.texts_seen == 6
