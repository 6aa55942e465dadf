"""Own attention of blocks by compiled loops: as by torch's operators."""

import pytest
import torch
from needs import needs_compiler
from tiny import plain_model, random_texts, thinking_model

from quietstar.attention.block_attention import block_attention
from quietstar.attention.blocks import ChosenBlocks, NeighbourBlocks
from quietstar.attention.kernels import CpuFlash
from quietstar.attention.own_block import own_step
from quietstar.native.library import load_library
from quietstar.native.own import find_own_native

SHAPES = [  # K, W, heads, key heads, head size
    (2, 3, 2, 1, 16),
    (1, 2, 3, 3, 8),
    (3, 14, 4, 2, 64),
    (2, 17, 4, 1, 80),
    (2, 40, 2, 2, 24),
]


def normal(*shape, dtype=torch.float32, seed=0):
    """Stored token by token, as layers leave it: (N, L, H, d) read as (N, H, L, d)."""
    n, heads, tokens, size = shape
    x = torch.randn(n, tokens, heads, size, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).transpose(1, 2)


def tensors(blocks, rows, tokens, heads, key_heads, size, dtype):
    text = 7 if isinstance(blocks, NeighbourBlocks) else 11
    q = normal(rows, heads, tokens, size, dtype=dtype)
    k, v = (normal(rows, key_heads, tokens, size, dtype=dtype, seed=n) for n in (1, 2))
    text = [normal(2, key_heads, text, size, dtype=dtype, seed=n) for n in (3, 4)]
    return [x.detach().requires_grad_() for x in (q, k, v, *text)]


def make_blocks(kind, thoughts, length):
    if kind == "neighbours":
        rows = 2 * (1 + thoughts * (length - 1))
        return NeighbourBlocks(2, thoughts, length, 2, 5), rows, 5
    positions = torch.tensor([[0, 3, 9], [2, 4, 10]])
    return ChosenBlocks(positions, thoughts, length, 11), 1, 6 * (1 + thoughts * (length - 1))


def run(blocks, inputs, grad):
    q, k, v, *text = inputs
    out = block_attention(q, k, v, tuple(text), blocks, q.shape[-1] ** -0.5, CpuFlash())
    return [out, *torch.autograd.grad(out, inputs, grad)]


def errors(found, expected):
    """Largest differences, in units of the expected tensor's root mean square."""
    pairs = zip(found, expected, strict=True)
    return [((a.double() - b.double()).abs().max() / b.double().square().mean().sqrt()).item()
            for a, b in pairs]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("kind", ["neighbours", "chosen"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_attention_is_that_of_torchs_operators_in_float64(kind, shape, dtype, without_native):
    thoughts, length, heads, key_heads, size = shape
    blocks, rows, tokens = make_blocks(kind, thoughts, length)
    inputs = tensors(blocks, rows, tokens, heads, key_heads, size, dtype)
    grad = normal(rows, heads, tokens, size, dtype=dtype, seed=5)
    assert find_own_native(*inputs[:3]) is not None
    found = run(blocks, inputs, grad)
    strided = run(blocks, inputs, grad.mT.contiguous().mT)  # a gradient of other strides
    assert all(map(torch.equal, strided, found))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = run(blocks, wide, grad.double())
    without_native()
    torchs = errors(run(blocks, inputs, grad), expected)
    for error, of_torch in zip(errors(found, expected), torchs, strict=True):
        assert error < max(1.5 * of_torch, 1e-5)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    blocks, rows, tokens = make_blocks("neighbours", 2, 14)  # work enough for several
    inputs = tensors(blocks, rows, tokens, 4, 2, 64, torch.float32)
    grad = normal(rows, 4, tokens, 64, seed=5)
    before = torch.get_num_threads()
    expected = run(blocks, inputs, grad)
    try:
        torch.set_num_threads(threads)
        found = run(blocks, inputs, grad)
    finally:
        torch.set_num_threads(before)
    # The text's keys sum over all queries, on torch's threads.
    assert all(map(torch.equal, found[:4], expected[:4]))


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_rollout_is_that_of_torchs_operators(shape, dtype, without_native):
    _, tokens, heads, key_heads, size = shape
    q, out = (normal(3, heads, 5, size, dtype=dtype, seed=n) for n in (0, 1))
    past = tuple(
        normal(tokens * 3, key_heads, 5, size, seed=n).transpose(1, 2).unflatten(0, (tokens, 3))
        for n in (2, 3)
    )
    lse = normal(3, heads, 5, 1, seed=4).squeeze(-1)
    found = own_step(q, past, out.clone(), lse, size**-0.5)
    without_native()
    wide = (q.double(), tuple(x.double() for x in past), out.double(), lse.double(), size**-0.5)
    expected = own_step(*wide)
    assert max(errors([found], [expected])) < (1e-5 if dtype == torch.float32 else 0.02)


@needs_compiler
def test_scores_far_apart_neither_overflow_nor_lose_a_nan():
    q = torch.zeros(1, 1, 3, 16)
    q[..., 0, :], q[..., 1, :], q[..., 2, 0] = 1e4, -1e4, torch.nan
    past = (torch.ones(2, 1, 3, 1, 16), torch.full((2, 1, 3, 1, 16), 7.0))
    lse = torch.full((1, 1, 3), 5.0)
    out = own_step(q, past, torch.ones(1, 1, 3, 16), lse, 1.0)
    assert torch.equal(out[0, 0, 0], torch.full((16,), 7.0))  # all of the weight is its own
    assert torch.equal(out[0, 0, 1], torch.ones(16))  # none is
    assert out[0, 0, 2].isnan().all()


@needs_compiler
def test_bfloat16_is_rounded_as_torch_does():
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1.001, 3e38, torch.inf, 1e-40])
    values = values.repeat(3)[:16]
    past = (torch.full((1, 1, 1, 1, 16), 1e4), values.view(1, 1, 1, 1, 16))
    q = torch.ones(1, 1, 1, 16, dtype=torch.bfloat16)
    out = own_step(q, past, torch.zeros_like(q), torch.zeros(1, 1, 1), 1.0)
    assert torch.equal(out.flatten(), values.bfloat16())


@needs_compiler
@pytest.mark.parametrize(
    ("thoughts", "block_tokens"),
    [({}, 30), ({}, None), ({"positions": "random", "position_fraction": 0.5}, 30),
     ({"positions": "random", "position_fraction": 0.5}, None)],
    ids=["groups", "at once", "chosen in groups", "chosen at once"],
)  # fmt: skip
def test_a_whole_step_is_the_same_with_and_without(thoughts, block_tokens, without_native):
    settings = {"length": 3, "lookahead": 2, "num_thoughts": 2} | thoughts
    model = thinking_model(plain_model(), thoughts=settings)
    model.block_tokens = block_tokens

    def step():
        model.zero_grad()
        output = model(random_texts(2, 12), sample_ids=torch.tensor([4, 0]))
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return output, grads

    found, gradients = step()
    without_native()
    expected, expected_gradients = step()
    assert torch.equal(found.thoughts, expected.thoughts)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        wanted = expected_gradients[name]
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_other_kinds_of_tensors_are_left_to_torch():
    x = torch.randn(1, 2, 3, 16)
    assert find_own_native(x.double()) is None
    assert find_own_native(x.half()) is None
    assert find_own_native(x, x.bfloat16()) is None
    assert find_own_native(x.mT) is None
    assert find_own_native(torch.empty_like(x, device="meta")) is None
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        assert find_own_native(mode.from_tensor(x)) is None


@needs_compiler
@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_lesser_processors_give_the_same(capability, fresh, monkeypatch):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
        pytest.skip("this processor cannot do more than the least")
    blocks, rows, tokens = make_blocks("chosen", 2, 6)
    inputs = tensors(blocks, rows, tokens, 4, 2, 64, torch.float32)
    grad = normal(rows, 4, tokens, 64, seed=5)
    expected = run(blocks, inputs, grad)
    load_library.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert max(errors(run(blocks, inputs, grad), expected)) < 1e-5
    assert len(list(fresh.iterdir())) == 2
