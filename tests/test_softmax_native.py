"""Cross entropies and draws by compiled loops: as by torch's operators."""

import pytest
import torch
from needs import needs_compiler

from quietstar.attention.layout import IGNORE_INDEX
from quietstar.losses.softmax import softmax_rows
from quietstar.native.softmax import find_softmax_native
from quietstar.sampling.noise import sample_inverse_cdf

pytestmark = needs_compiler


def random_rows(vocab, dtype=torch.float32, rows=9):
    """Logits in rows that do not touch, targets of which two are none, coefficients."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(rows, vocab + 5, generator=generator)).to(dtype)[:, :vocab]
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[[1, rows - 1]] = IGNORE_INDEX
    return logits, targets, torch.randn(rows, generator=generator)


def copied(logits):
    """The same rows, as far apart."""
    return torch.nn.functional.pad(logits, (0, 5))[:, : logits.shape[1]]


@pytest.mark.parametrize("vocab", [1, 7, 16, 64, 130, 1024, 2048 + 3, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_torchs_operators_in_float64(vocab, dtype, without_native):
    logits, targets, coefficients = random_rows(vocab, dtype)
    assert find_softmax_native(logits) is not None
    found, gradient = softmax_rows(copied(logits), targets, coefficients, wants_predicted=True)
    alone, none = softmax_rows(copied(logits), targets)
    without_native()
    expected, wanted = softmax_rows(
        logits.double(), targets, coefficients.double(), wants_predicted=True
    )
    assert found.nll.dtype == torch.float32
    torch.testing.assert_close(found.nll.double(), expected.nll, rtol=1e-6, atol=2e-6)
    assert torch.equal(alone.nll, found.nll)
    assert none is None
    assert torch.equal(found.predicted, expected.predicted)
    rounding = {} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, wanted.to(dtype), **rounding)
    assert not gradient[targets == IGNORE_INDEX].any()


def test_large_and_impossible_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-torch.inf, 2.0, 2.0], [torch.nan, 0.0, 0.0]])
    targets = torch.tensor([1, 2, 1])
    found, gradient = softmax_rows(logits, targets, torch.ones(3))
    assert found.nll[:2].tolist() == pytest.approx([1e4, 0.6931472])
    expected = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.5, -0.5]])
    torch.testing.assert_close(gradient[:2], expected)
    assert found.nll[2].isnan()
    assert gradient[2].isnan().all()


def test_a_row_is_the_same_wherever_it_lies_and_on_any_thread():
    logits, targets, coefficients = random_rows(3000, rows=41)  # work enough for several
    one_by_one = [
        softmax_rows(logits[n : n + 1].clone(), targets[n : n + 1], coefficients[n : n + 1])
        for n in range(41)
    ]
    uniform = torch.rand(41, 2, generator=torch.Generator().manual_seed(0))
    draws = torch.cat([sample_inverse_cdf(logits[n : n + 1], uniform[n : n + 1])
                       for n in range(41)])  # fmt: skip
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sample_inverse_cdf(logits, uniform), draws)
        found, gradient = softmax_rows(logits.clone(), targets, coefficients)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.nll, torch.cat([result.nll for result, _ in one_by_one]))
    assert torch.equal(gradient, torch.cat([part for _, part in one_by_one]))


def test_several_draws_of_a_row_are_those_of_single_ones():
    logits, _, _ = random_rows(130)
    uniform = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))
    together = sample_inverse_cdf(logits, uniform)
    assert together.shape == (9, 4)
    alone = [sample_inverse_cdf(logits, uniform[:, n : n + 1]) for n in range(4)]
    assert torch.equal(together, torch.cat(alone, 1))
    assert len(together.unique()) > 4


def test_other_kinds_of_logits_are_left_to_torch():
    x = torch.randn(3, 16)
    assert find_softmax_native(x.double()) is None
    assert find_softmax_native(x.half()) is None
    assert find_softmax_native(x.T) is None
    assert find_softmax_native(torch.empty_like(x, device="meta")) is None
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        assert find_softmax_native(mode.from_tensor(x)) is None
