"""Students of a thinking teacher: divergence in buckets, teachers live and stored, objectives."""

import itertools
import json
import math

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import (
    MARKERS,
    plain_model,
    random_texts,
    read_metrics,
    run_config,
    thinking_model,
    write_texts,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.attention.layout import TextLookahead
from quietstar.backbone.output_head import OutputHead
from quietstar.cli.main import main as quietstar
from quietstar.config import ThoughtsConfig, TuningConfig, loss_config
from quietstar.config.loading import save_config
from quietstar.data import build_data, byte_tokenizer
from quietstar.errors import UserError
from quietstar.losses.cross_entropy import Segment, SoftTargets, divergence_from, objective
from quietstar.losses.distillation import nearest_thought
from quietstar.losses.predictions import Predictions
from quietstar.losses.weights import ThoughtWeights
from quietstar.model.scoring import teach as teach_thoughts
from quietstar.training import teaching
from quietstar.training.run import run_training
from quietstar.training.teaching import TeacherFolder

ROWS, WIDTH, VOCAB = 7, 5, 11
SOFTCAP = 3.0


def head_of(softcap=None, seed=0):
    linear = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for parameter in linear.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return OutputHead(linear, linear.weight, linear.bias, softcap=softcap)


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_a_frozen_head_is_not_copied_for_each_row():
    """As torch does where a slice with several dimensions is multiplied by a frozen matrix."""
    linear = nn.Linear(8, 1000, bias=False).requires_grad_(False)
    head, states = OutputHead(linear, linear.weight, None), torch.randn(3, 4, 6, 2, 8)
    few, largest = states[:, :, 1:3], LargestTensor()
    candidates = torch.arange(900)
    with torch.no_grad(), largest:
        logits = head.logits(few)
        head.candidate_logits(few, candidates)
    assert largest.numel == logits.numel() == 48 * 1000
    torch.testing.assert_close(logits, few @ linear.weight.T)
    assert head.logits(states[:0]).shape == (0, 4, 6, 2, 1000)


def soft_targets(logits, top):
    """The most likely tokens of distributions, and the rest as one bucket."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(top, dim=-1)
    rest = logprobs.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    return SoftTargets(best.indices, best.values, rest)


def merged(probs, tokens):
    """Probabilities of some tokens, and of all others together."""
    few = probs.gather(-1, tokens)
    if tokens.shape[-1] == VOCAB:
        return few
    return torch.cat([few, 1 - few.sum(-1, keepdim=True)], dim=-1)


def bucketed(teacher, student, tokens):
    """KL(teacher || student) over the buckets, by its definition."""
    q, p = merged(teacher, tokens), merged(student, tokens)
    return (q * (q / p).log()).sum(-1)


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize("top", [1, 4, VOCAB - 1, VOCAB])
def test_the_divergence_and_its_gradient_are_those_of_the_buckets(top, softcap):
    teacher, head = random(ROWS, VOCAB, seed=2) * 2, head_of(softcap)
    states = random(ROWS, WIDTH).requires_grad_()
    weights = random(ROWS, seed=3).abs()
    targets = torch.arange(ROWS)
    targets[2] = -100  # a row without a target counts for nothing
    soft = soft_targets(teacher, top)
    value, results = objective([Segment(states, targets, weights, soft=soft)], head)
    grads = torch.autograd.grad(value, [states, head.weight, head.bias])

    logits = head.logits(states)
    wanted = bucketed(teacher.softmax(-1), logits.softmax(-1), soft.tokens)
    wanted = wanted.where(targets >= 0, 0.0)
    torch.testing.assert_close(results[0].divergence, wanted.detach(), rtol=1e-9, atol=1e-12)
    by_hand = torch.autograd.grad((wanted * weights).sum(), [states, head.weight, head.bias])
    for ours, theirs in zip(grads, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    # The NLL in the results stays that of the true tokens.
    nll = -logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(results[0].nll, nll.where(targets >= 0, 0.0).detach())


@pytest.mark.parametrize("top", [VOCAB - 1, VOCAB])
def test_all_buckets_are_the_whole_divergence(top):
    teacher, student = random(ROWS, VOCAB, seed=2), random(ROWS, VOCAB, seed=4)
    student.requires_grad_()
    wanted = nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    ours = divergence_from(soft_targets(teacher, top), student.log_softmax(-1))
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (ours, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_fewer_buckets_hide_divergence_and_never_add_any():
    teacher, student = random(ROWS, VOCAB, seed=2), random(ROWS, VOCAB, seed=4).log_softmax(-1)
    values = [divergence_from(soft_targets(teacher, k), student) for k in range(1, VOCAB + 1)]
    for fewer, more in itertools.pairwise(values):
        assert (fewer <= more + 1e-12).all()
    assert (values[0] < values[-1]).all()


def test_tokens_that_the_student_all_but_excludes_stay_finite():
    """Logits 200 apart: probabilities of float32 are 0, their logarithms are not."""
    linear = nn.Linear(1, 4, bias=False)
    linear.weight.data = torch.tensor([[200.0], [0.0], [0.0], [0.0]])
    head, states = OutputHead(linear, linear.weight, None), torch.ones(1, 1, requires_grad=True)
    soft = SoftTargets(torch.tensor([[1]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log())
    segment = Segment(states, torch.tensor([1]), torch.ones(1), soft=soft)
    value, results = objective([segment], head)
    assert float(results[0].divergence) == pytest.approx(0.5 * 200 - math.log(2), rel=1e-5)
    value.backward()
    assert states.grad.isfinite().all()
    # A point of all logits: 0.5 of the teacher's mass is on token 1, which gets -0.5 * 0.
    assert float(states.grad) == pytest.approx(200.0 * 0.5, rel=1e-5)


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
def test_a_mixed_prediction_learns_the_same_divergence(softcap):
    lookahead, thoughts, batch, places = 2, 3, 2, 4
    shape, head = (lookahead, thoughts, batch, places), head_of(softcap)
    text = random(batch, places + lookahead - 1, WIDTH).requires_grad_()
    states = random(*shape, WIDTH, seed=5).requires_grad_()
    weight = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    weight.requires_grad_()
    targets = torch.randint(0, VOCAB, (lookahead, batch, places))
    targets[1, 0, 2] = -100
    teacher = random(lookahead, batch, places, VOCAB, seed=7)
    soft = soft_targets(teacher, 3)
    coefficients = random(batch, places, thoughts, lookahead, seed=8).abs()
    results = Predictions(
        head, TextLookahead(text, lookahead, contiguous=True), states, weight, targets, soft=soft
    )
    for chunk in results:
        weights = ThoughtWeights(None, coefficients[chunk.texts, chunk.places])
        chunk.learn(weights, torch.tensor(lookahead * thoughts))
    inputs = [text, states, weight, head.weight]
    grads = torch.autograd.grad(results.loss, inputs)

    base = torch.stack([head.logits(text[:, a : a + places]) for a in range(lookahead)])
    logits = torch.lerp(
        base.unsqueeze(1).expand(*shape, VOCAB), head.logits(states), weight[..., None]
    )
    tokens = soft.tokens.unsqueeze(1).expand(*shape, 3)
    wanted = bucketed(
        teacher.softmax(-1).unsqueeze(1).expand_as(logits), logits.softmax(-1), tokens
    )
    wanted = wanted.where(targets.unsqueeze(1) >= 0, 0.0)
    torch.testing.assert_close(results.divergence, wanted.detach(), rtol=1e-9, atol=1e-12)
    each = coefficients.permute(3, 2, 0, 1) / (lookahead * thoughts)
    by_hand = torch.autograd.grad((wanted * each).sum(), inputs)
    for ours, theirs in zip(grads, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


# --- Teachers -------------------------------------------------------------------------------------
def student(**loss):
    return thinking_model(loss={"objective": "distill", **loss}, thoughts={"num_thoughts": 3})


@pytest.mark.parametrize("positions", ["all", "random"])
def test_a_teacher_averages_its_mixed_predictions(positions):
    model, texts = student(), random_texts()
    model.configure(model.thoughts.model_copy(update={"positions": positions}))
    result = teach_thoughts(model, texts, seed=3, top=5)
    drawn = model.draw(texts, num_thoughts=3, temperature=1.0, seed=3)
    assert int(result.num_tokens) == int((drawn.positions >= 0).sum()) * 3 * model.thoughts.length
    out = model.score(texts, drawn)
    lookahead = result.lookahead
    assert lookahead == (1 if positions == "all" else model.thoughts.lookahead)
    wanted = out.mixed_logprobs.logsumexp(2) - math.log(3)
    valid = out.valid[..., :lookahead]
    torch.testing.assert_close(
        result.true_logprobs.where(valid, 0.0), wanted[..., :lookahead].where(valid, 0.0),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    total = result.logprobs.exp().sum(-1) + result.rest.exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-4, atol=1e-5)
    assert (result.logprobs[..., 1:] <= result.logprobs[..., :-1]).all()


def test_the_nearest_thought_teaches():
    positions = torch.tensor([[1, 3, 4], [2, -1, -1]])
    nearest = nearest_thought(positions, 3).permute(1, 2, 0)  # (B, P, A)
    assert nearest[0].tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert nearest[1, 0].tolist() == [True, True, True]
    assert nearest_thought(None, 3).flatten().tolist() == [True, False, False]


@pytest.mark.parametrize("positions", ["all", "random"])
def test_a_student_learns_the_divergence_from_the_text_alone(positions):
    model, texts = student(), random_texts()
    thoughts = {"positions": positions, "position_fraction": 0.4}
    model.configure(model.thoughts.model_copy(update=thoughts))
    teacher = teach_thoughts(model, texts, seed=2, top=4)
    output = model(texts, seed=2, teacher=teacher)
    output.loss.backward()
    names = [n for n, p in model.named_parameters() if p.grad is not None]
    assert all(name.startswith("language_model.") for name in names)
    own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logprobs = model.causal_lm(texts).logits.log_softmax(-1)
    total, seen = 0.0, set()
    for b in range(len(texts)):
        places = range(texts.shape[1]) if teacher.positions is None else teacher.positions[b]
        for index, place in reversed(list(enumerate(int(p) for p in places))):
            for a in range(teacher.lookahead):
                token = (b, place + a + 1)
                if place < 0 or token in seen or token[1] >= texts.shape[1]:
                    continue
                seen.add(token)
                row = [x[b, index, a][None] for x in (teacher.tokens, teacher.logprobs)]
                soft = SoftTargets(*row, teacher.rest[b, index, a][None])
                total = total + divergence_from(soft, logprobs[b, place + a][None]).sum()
    wanted = total / (texts.shape[0] * (texts.shape[1] - 1))
    torch.testing.assert_close(output.loss.detach(), wanted.detach(), rtol=1e-4, atol=1e-6)
    wanted.backward()
    for name, parameter in model.named_parameters():
        if name in own:
            torch.testing.assert_close(own[name], parameter.grad, rtol=1e-3, atol=1e-6)
    figures = output.metrics.means()
    assert figures["divergence"] * len(seen) == pytest.approx(total.item(), rel=1e-4)
    assert {"teacher_nll", "student_nll", "base_nll"} <= figures.keys()


def test_without_a_teacher_a_student_has_itself():
    model, texts = student(), random_texts()
    teacher = teach_thoughts(model, texts, seed=2, sample_ids=torch.arange(2))
    given = model(texts, seed=2, teacher=teacher, sample_ids=torch.arange(2))
    alone = model(texts, seed=2, sample_ids=torch.arange(2))
    assert torch.equal(given.loss, alone.loss)


def test_fast_rl_weighs_the_true_token_by_the_reward():
    model, texts = student(), random_texts()
    teacher = teach_thoughts(model, texts, seed=2)
    logprobs = model.causal_lm(texts).logits.log_softmax(-1)[:, :-1]
    true = logprobs.gather(2, texts[:, 1:, None])[..., 0]
    reward = (true - teacher.true_logprobs[:, :-1, 0]).detach()
    count = reward.numel()

    model.configure(loss=loss_config(objective="fast_rl"))
    paper = model(texts, teacher=teacher)
    torch.testing.assert_close(paper.loss, -(reward * true).sum() / count, rtol=1e-4, atol=1e-6)
    figures = paper.metrics.means()
    assert figures["student_reward"] == pytest.approx(float(reward.mean()), rel=1e-3, abs=1e-6)


# --- Runs -----------------------------------------------------------------------------------------
DISTILLED = {
    "loss__objective": "distill",
    "thoughts__positions": "random",
    "training__max_steps": 4,
}


def run(folder, resume=None, **changes):
    folder.mkdir(exist_ok=True)
    run_training(run_config(folder, **changes), resume=resume)
    return folder / "run"


def records(folder):
    return read_metrics(folder, "train")


def weights(folder, name="final"):
    return load_file(folder / name / "language_model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("reference", ["base", "current", "ema"])
def test_a_run_asks_its_teacher(tmp_path, reference):
    folder = run(tmp_path, **DISTILLED, loss__reference=reference, training__ema_decay=0.9)
    for record in records(folder):
        assert record["divergence"] >= -1e-6
        assert record["teacher_tokens"] > 0
        assert record["thought_tokens_per_second"] > 0


def test_each_reference_teaches_with_weights_of_its_own(tmp_path):
    nlls = {}
    for reference in ("base", "current", "ema"):
        changes = {**DISTILLED, "loss__reference": reference, "training__ema_decay": 0.5}
        folder = run(tmp_path / reference, **changes)
        nlls[reference] = [record["teacher_nll"] for record in records(folder)]
    first, *_, last = zip(*nlls.values(), strict=True)
    assert max(first) - min(first) < 1e-6  # all the same model before the first update
    assert min(abs(a - b) for a, b in itertools.combinations(last, 2)) > 1e-4


def test_a_student_comes_closer_to_its_teacher():
    model, texts = student(), random_texts()
    teacher = teach_thoughts(model, texts)
    optimizer, values = torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(20):
        optimizer.zero_grad()
        output = model(texts, teacher=teacher)
        output.loss.backward()
        optimizer.step()
        values.append(output.metrics.means()["divergence"])
    assert values[0] > 0.1
    assert values[-1] < 0.2 * values[0]


def test_micro_batches_change_nothing(tmp_path):
    whole, parts = (
        records(run(tmp_path / str(size), **DISTILLED, training__micro_batch_size=size))
        for size in (8, 3)
    )
    for ours, theirs in zip(parts, whole, strict=True):
        for key in ("loss", "base_nll", "divergence", "teacher_nll", "grad_norm_total"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective_of", ["distill", "fast_rl"])
def test_a_run_resumes_bit_for_bit(tmp_path, objective_of):
    more = {**DISTILLED, "loss__objective": objective_of, "training__save_steps": 2}
    whole = run(tmp_path / "whole", **more)
    part = run(tmp_path / "part", str(whole / "checkpoints" / "step-000002"), **more)
    assert same(weights(part), weights(whole))


def test_a_thinking_student_learns_in_shorter_thoughts(tmp_path):
    more = {"loss__student": "thinking", "loss__teacher_length": 6, "thoughts__length": 2}
    # At first student and teacher agree: without another term Adam would take steps of rounding.
    more["loss__base_weight"] = 1.0
    whole, parts = (
        run(tmp_path / str(size), **{**DISTILLED, **more}, training__micro_batch_size=size)
        for size in (8, 3)
    )
    for ours, theirs in zip(records(parts), records(whole), strict=True):
        assert ours["divergence"] == pytest.approx(theirs["divergence"], rel=1e-4, abs=1e-6)
        if ours["step"] > 1:  # before, student and teacher agree up to rounding
            # All places have A targets, but the last ones.
            assert -ours["policy_reward"] > 0.5 * ours["divergence"] > 0
    saved = json.loads((whole / "final" / "quietstar.json").read_text())
    assert saved["thoughts"]["length"] == 2


def test_groups_of_blocks_change_nothing_for_a_thinking_student():
    model, texts = student(student="thinking"), random_texts(4)
    teacher = teach_thoughts(model, texts, seed=1)
    losses, grads = [], []
    for size in (None, 10):
        model.learn_chunk_tokens = size
        model.zero_grad()
        output = model(texts, seed=1, teacher=teacher, sample_ids=torch.arange(4))
        output.loss.backward()
        losses.append(float(output.loss))
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-6)


def stored(tmp_path, **changes):
    """A teacher, what it predicts of the texts of a run, and the config of that run."""
    teacher = run(tmp_path / "teacher", training__max_steps=2, thoughts__positions="random")
    data = write_texts(tmp_path / "texts.jsonl")
    config = {**DISTILLED, "model__config": None, "model__name_or_path": str(teacher / "final")}
    config |= {"data__train": data, **changes}
    save_config(run_config(tmp_path, **config), tmp_path / "config.yaml")
    return teacher / "final", config


def teach(tmp_path, *more):
    return quietstar(
        ["teach", "--model", str(tmp_path / "teacher" / "run"), "--config",
         str(tmp_path / "config.yaml"), "--out", str(tmp_path / "taught"), "--top", "8", *more]
    )  # fmt: skip


def test_a_stored_teacher_says_what_a_live_one_says(tmp_path):
    folder, config = stored(tmp_path)
    assert teach(tmp_path) == 0
    student_run = run(tmp_path / "stored", **config, loss__teacher=str(tmp_path / "taught"))
    model = QuietStarForCausalLM.from_pretrained(folder)
    # A run makes its vectors and mixing head anew: the live teacher is the saved model itself.
    model.configure(loss=loss_config(objective="distill"))
    settings = run_config(tmp_path, **config)
    data, _, _ = build_data(settings.data, byte_tokenizer(), 0, model.thoughts)
    batch = data.batch(0, 8)
    live = teach_thoughts(
        model,
        batch.input_ids,
        batch.attention_mask,
        batch.labels,
        sample_ids=batch.sample_ids,
        top=8,
    )
    found = TeacherFolder(tmp_path / "taught", "loss.teacher").find(batch)
    assert torch.equal(found.positions, live.positions)
    is_real = live.positions >= 0
    for name in ("tokens", "logprobs", "rest", "true_logprobs"):
        assert torch.equal(getattr(found, name)[is_real], getattr(live, name)[is_real]), name
    assert records(student_run)[0]["teacher_nll"] > 0


def test_teaching_goes_on_where_it_was_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teaching, "TEXTS_AT_ONCE", 8)
    stored(tmp_path)
    calls = []
    method = teaching.teach

    def counted(self, input_ids, *rest, **more):
        calls.append(len(input_ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return method(self, input_ids, *rest, **more)

    monkeypatch.setattr(teaching, "teach", counted)
    assert teach(tmp_path, "--batch-size", "8") == 130
    monkeypatch.setattr(teaching, "teach", method)
    assert teach(tmp_path, "--batch-size", "8") == 0
    assert "predictions for 32 texts" in capsys.readouterr().out
    assert calls == [8, 8]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"training__inner_epochs": 2}, "training.inner_epochs"),
        ({"thoughts__sampler": "pause", "loss__policy_weight": 0.0}, "has nothing to teach"),
        ({"loss__reference": "ema"}, r"training.ema_decay \(null\)"),
        ({"loss__student": "thinking", "loss__mixed_weight": 1.0}, "takes the place"),
        ({"loss__student": "thinking", "loss__kl_weight": 1.0}, "loss.reference is the teacher"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, problem):
    with pytest.raises(ValidationError, match=problem):
        run_config(tmp_path, **{**DISTILLED, **changes})


def test_a_teacher_of_other_texts_is_refused(tmp_path):
    _, config = stored(tmp_path)
    assert teach(tmp_path) == 0
    other = {**config, "loss__teacher": str(tmp_path / "taught"), "data__seq_len": 10}
    with pytest.raises(UserError, match=r"32 texts, but for 8 of the 8 of step 1 there are none"):
        run(tmp_path / "other", **other)
    assert not (tmp_path / "other" / "run").exists()
    longer = {**config, "loss__teacher": str(tmp_path / "taught"), "training__max_steps": 7}
    with pytest.raises(UserError, match=r"of step 5 there are none. Write them by quietstar teach"):
        run(tmp_path / "longer", **longer)
    with pytest.raises(UserError, match=r"teacher.json is missing"):
        run(tmp_path / "none", **{**config, "loss__teacher": str(tmp_path)})


def test_another_teacher_does_not_write_into_the_folder(tmp_path, capsys):
    stored(tmp_path)
    assert teach(tmp_path) == 0
    assert teach(tmp_path, "--training.seed", "1") == 2
    assert "was written with other settings (seed 0, now 1)" in capsys.readouterr().err
    assert teach(tmp_path, "--thoughts.length", "1") == 0
    assert "--thoughts.length: has no effect on the teacher" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{", '{"format_version": 1}'])
def test_a_damaged_teacher_is_told_in_one_line(tmp_path, content):
    (tmp_path / "teacher.json").write_text(content)
    with pytest.raises(UserError, match=r"^loss.teacher .*Write a new one by quietstar teach\.$"):
        run(tmp_path / "student", **DISTILLED, loss__teacher=str(tmp_path))


def test_a_student_that_never_thought_is_scored_without_thoughts(tmp_path):
    _, config = stored(tmp_path)
    assert teach(tmp_path) == 0
    folder = run(tmp_path / "student", **config, loss__teacher=str(tmp_path / "taught"))
    assert all("base_nll" in r and "gain" not in r for r in read_metrics(folder, "eval"))
    card = (folder / "final" / "README.md").read_text("utf-8")
    assert "learned to predict without thoughts" in card
    assert "think=False)[0]" in card


@pytest.mark.parametrize("tuning", [{}, {"method": "lora", "lora_r": 2}])
def test_a_student_is_saved_as_a_plain_model(tmp_path, tuning):
    base = plain_model()
    base.save_pretrained(tmp_path / "base")
    model = QuietStarForCausalLM.from_base(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer=byte_tokenizer(),
        thoughts=ThoughtsConfig(length=2, lookahead=2, **MARKERS), tuning=TuningConfig(**tuning),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "saved", byte_tokenizer())
    saved, out = str(tmp_path / "saved"), str(tmp_path / "plain")
    assert quietstar(["export", "--model", saved, "--out", out, "--plain"]) in (None, 0)
    assert not list((tmp_path / "plain").glob("quietstar*"))
    plain, texts = AutoModelForCausalLM.from_pretrained(out), random_texts()
    with torch.no_grad():
        ours, theirs = plain(texts).logits, model.causal_lm(texts).logits
    # Merging rounds: float32 products of weights with a gain far above 1.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
