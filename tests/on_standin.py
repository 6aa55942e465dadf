"""Devices, host syncs and kernels of CUDA, on a stand-in for a GPU (`standin`)."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from standin import StandIn, to_host
from tiny import LLAMA, plain_model, random_texts, run_config, thinking_model

from quietstar.attention import kernels
from quietstar.backbone import teacher_forced
from quietstar.checks import raise_failed
from quietstar.errors import UserError
from quietstar.generation.continuations import continue_thoughts
from quietstar.sampling.thoughts import ThoughtBatch
from quietstar.training import loop
from quietstar.training.run import run_training

LETTERS = [chr(c) for c in range(97, 123)]
SMALL = {**LLAMA, "num_hidden_layers": 1, "hidden_size": 32, "max_position_embeddings": 128}
LENGTH = 26  # tokens of a long thought
CHECK = {"training/loop.py __call__": 1}  # the loss, before the weights change
LAYOUT = {"attention/layout.py read": 1}  # how long thoughts are, which rows are laid out by
LOOKS = {"sampling/rollout.py sample": LENGTH // 8}  # whether all have ended, every eight tokens


@pytest.fixture(autouse=True)
def _nothing_is_left():
    kernels._find_kernel.cache_clear()
    yield
    kernels._find_kernel.cache_clear()


class Enough(Exception):
    pass


def syncs_of_a_step(folder, monkeypatch, **settings):
    """Waits of the third step of a run; the first one also tries the kernels."""
    inner = settings.get("training__inner_epochs", 1)
    settings |= {"training__global_batch_size": 4, "training__micro_batch_size": 4}
    settings |= {"model__config": SMALL, "logging__logging_steps": 100}
    read, found = loop.StepCheck.__call__, []

    def check(*arguments, **keywords):
        read(*arguments, **keywords)
        found.append(device.syncs.copy())
        device.forget()
        if len(found) == 3 * inner:
            raise Enough

    monkeypatch.setattr(loop.StepCheck, "__call__", check)
    monkeypatch.setattr(loop, "report_evaluation", lambda run: None)
    with StandIn() as device, pytest.raises(Enough):
        run_training(run_config(folder, training__max_steps=4, **settings))
    return sum(found[-inner:], Counter())


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"loss__objective": "next_token"}, CHECK),
        ({}, CHECK),
        ({"thoughts__positions": "random", "thoughts__position_fraction": 0.3}, CHECK),
        ({"thoughts__positions": "pattern", "thoughts__pattern": "s"}, CHECK),
        ({"thoughts__stop": LETTERS, "thoughts__length": 4}, CHECK | LAYOUT),
        ({"thoughts__positions": "one_random", "thoughts__length": LENGTH}, CHECK),
        ({"thoughts__positions": "pattern", "thoughts__pattern": "s", "thoughts__stop": LETTERS,
          "thoughts__length": LENGTH}, CHECK | LAYOUT | LOOKS),
        # a second update, which must lay out thoughts that it was given; and a reference
        ({"loss__objective": "rlp", "training__inner_epochs": 2},
         {"training/loop.py __call__": 2} | LAYOUT),
    ],
    ids=["plain", "everywhere", "random", "pattern", "stop", "long", "long-stop", "rlp-inner"],
)  # fmt: skip
def test_a_step_waits_for_the_device_only_where_it_must(settings, allowed, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_forced, "PACKED_FROM", 24)
    syncs = syncs_of_a_step(tmp_path, monkeypatch, **settings)
    assert not syncs - Counter(allowed), syncs
    assert syncs["training/loop.py __call__"], "the steps ran"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "thoughts",
    [
        {},
        {"positions": "random", "position_fraction": 0.4},
        {"positions": "random", "position_fraction": 0.2, "length": LENGTH, "stop": LETTERS},
    ],
    ids=["everywhere", "random", "long-stop"],
)
def test_losses_and_gradients_are_those_of_the_cpu(thoughts, dtype, monkeypatch):
    monkeypatch.setattr(teacher_forced, "PACKED_FROM", 24)
    base = plain_model(SMALL, dtype=dtype)
    model = thinking_model(
        base, thoughts={"num_thoughts": 2, **thoughts}, loss={"policy_weight": 1.0}
    )
    model.learn_chunk_tokens = 64
    texts, ids = random_texts(2, 12), torch.arange(2)
    want = model(texts, sample_ids=ids)
    given = want.drawn  # in bfloat16 the kernels round differently, and thoughts with them
    want = model(texts, sample_ids=ids, thoughts=given)
    want.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with StandIn():
        model = model.cuda()
        drawn = model(texts.cuda(), sample_ids=ids.cuda())
        moved = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in vars(given).items()}
        got = model(texts.cuda(), sample_ids=ids.cuda(), thoughts=ThoughtBatch(**moved))
        got.loss.backward()
    half = dtype == torch.bfloat16
    assert half or torch.equal(to_host(drawn.thoughts), given.tokens)
    torch.testing.assert_close(to_host(got.loss), want.loss, rtol=3e-2 if half else 1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name in grads and not half:  # of bfloat16, sums of few numbers of 8 bits
            torch.testing.assert_close(to_host(parameter.grad), grads[name], rtol=1e-3, atol=1e-5)


def test_tensors_of_two_devices_do_not_mix():
    with StandIn(), pytest.raises(RuntimeError, match=r"on cuda:0 and on cpu"):
        torch.ones(2).cuda() + torch.ones(2)


def test_thoughts_that_are_given_everywhere_run_as_those_that_were_drawn(monkeypatch):
    model = thinking_model(plain_model(SMALL))
    monkeypatch.setattr(teacher_forced, "SelectedBlocks", None)
    with StandIn():
        model, texts = model.cuda(), random_texts(2, 9).cuda()
        drawn = model(texts).drawn
        model(texts, thoughts=drawn)
        model(texts, thoughts=replace(drawn, everywhere=None))  # as one of a user's own making


@pytest.mark.parametrize("wrong", [float("nan"), 0.5])
def test_wrong_log_probabilities_void_the_loss_and_are_named(wrong):
    model = thinking_model(plain_model(SMALL))
    with StandIn() as device:
        model, texts = model.cuda(), random_texts(2, 9).cuda()
        drawn = model(texts).drawn
        logprobs = torch.full_like(drawn.sampling_logprobs, wrong)
        device.forget()
        loss = model(texts, thoughts=replace(drawn, sampling_logprobs=logprobs)).loss
        assert "checks.py expect" not in device.syncs
        with pytest.raises(UserError, match="sampling_logprobs are above 0 or not finite"):
            raise_failed()
        raise_failed()  # said once
    assert to_host(loss).isnan()


def test_a_reward_that_is_not_finite_ends_the_run_before_the_step_and_is_named(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "report_evaluation", lambda run: None)
    config = run_config(
        tmp_path, model__config=SMALL, loss__reward="on_standin:no_reward",
        training__global_batch_size=4, training__micro_batch_size=4,
    )  # fmt: skip
    with StandIn(), pytest.raises(UserError, match=r"loss.reward .* numbers that are not finite"):
        run_training(config)


def no_reward(thoughts, scores):
    """A reward that is not a number."""
    return torch.full_like(thoughts.lengths, torch.nan, dtype=torch.float32)


def test_a_gpu_without_memory_is_not_one_without_a_kernel(monkeypatch):
    problems = [torch.OutOfMemoryError("out of memory"), RuntimeError("head dim is not supported")]

    def fail(*_):
        raise problems[0]

    monkeypatch.setattr(kernels.CudaEfficient, "forward", fail)
    with StandIn():
        q = torch.zeros(1, 2, 8, 16).cuda()
        with pytest.raises(torch.OutOfMemoryError):
            kernels.find_kernel(q, q, q)
        problems.pop(0)
        assert kernels.find_kernel(q, q, q) is None  # asked again, and answered
        problems[0] = torch.OutOfMemoryError("out of memory")
        assert kernels.find_kernel(q, q, q) is None


def test_generation_looks_at_the_device_once_a_token():
    model = thinking_model(plain_model(SMALL))
    with StandIn() as device:
        model, texts = model.cuda(), random_texts(2, 6).cuda()
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        model.generate(texts, max_new_tokens=2, **options)
        before = device.syncs.copy()
        device.forget()
        model.generate(texts, max_new_tokens=5, **options)
    assert device.syncs - before == Counter({"generation/generate.py decode": 3})


def test_continuations_end_with_the_last_of_them(monkeypatch):
    model = thinking_model(plain_model(SMALL), thoughts={"positions": "answer_start"})
    ends = list(range(1, 258))
    monkeypatch.setattr("quietstar.generation.continuations._end_tokens", lambda model: ends)
    with StandIn() as device:
        model, ids = model.cuda(), random_texts(2, 8).cuda()
        positions = torch.tensor([[3], [5]]).cuda()
        batch = model.draw(ids, num_thoughts=2, temperature=1.0, positions=positions)
        launches = []
        for most in (8, 40):
            device.forget()
            continue_thoughts(model, batch, most)
            launches.append(device.launches.total())
    assert launches[1] < 1.2 * launches[0]
