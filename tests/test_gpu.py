"""What only a CUDA device can show: its kernels, and the same losses as on the CPU."""

import json

import pytest
import torch
from tiny import plain_model, random_texts, run_config, thinking_model, write_texts

from quietstar.attention.kernels import find_kernel
from quietstar.training.run import run_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_kernel_serves_and_agrees_with_plain_attention(dtype, groups):
    q = torch.zeros(1, 2 * groups, 8, 64, dtype=dtype, device="cuda")
    k = torch.zeros(1, 2, 8, 64, dtype=dtype, device="cuda")
    # find_kernel compares the kernel with plain attention, forward and backward
    assert find_kernel(q, k, k) is not None


LETTERS = [chr(c) for c in range(97, 123)]
LONG = {"length": 40, "positions": "random", "start_init": "abc", "stop": LETTERS}


@pytest.mark.parametrize("thoughts", [{}, LONG, LONG | {"train_markers": False}], ids=str)
def test_loss_and_gradients_are_those_of_the_cpu(thoughts):
    base = plain_model(max_position_embeddings=128)
    model = thinking_model(base, thoughts=thoughts, loss={"policy_weight": 1.0})
    texts, ids = random_texts(2, 9), torch.arange(2)
    want = model(texts, sample_ids=ids)
    want.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model = model.cuda()
    got = model(texts.cuda(), sample_ids=ids.cuda())
    assert torch.equal(got.thoughts.cpu(), want.thoughts)
    torch.testing.assert_close(got.loss.cpu(), want.loss, rtol=1e-5, atol=1e-5)
    got.loss.backward()
    for name, parameter in model.named_parameters():
        if name in grads:
            # float32 sums in another order, on kernels that round differently
            torch.testing.assert_close(parameter.grad.cpu(), grads[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_paged_moments_train_and_resume(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    texts = write_texts(tmp_path / "texts.jsonl")
    settings = {"data__train": str(texts), "optim__name": name, "training__save_steps": 2}
    losses = {}
    for folder, steps in (("whole", [4]), ("parts", [2, 4])):
        for step in steps:
            config = run_config(tmp_path, **settings, training__max_steps=step)
            output = {"output_dir": str(tmp_path / folder)}
            training = config.training.model_copy(update=output)
            run_training(config.model_copy(update={"training": training}), resume="auto")
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
        losses[folder] = [record["loss"] for record in records]
    # Atomic sums of the GPU come in another order each time: float32 rounding (6e-8) of gradients,
    # which Adam, whose steps do not depend on their size, can widen.
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["whole"][-1] < losses["whole"][0]
