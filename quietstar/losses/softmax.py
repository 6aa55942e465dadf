"""Cross entropies of some rows of logits, and their gradient in the logits' place."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quietstar.attention.layout import IGNORE_INDEX
from quietstar.attention.precision import at_least_float32
from quietstar.native.softmax import find_softmax_native


@dataclass(frozen=True)
class RowResult:
    """What the rows of one segment gave, without gradient.

    Attributes:
        nll: (rows,), negative log-likelihood of the target, 0 where there is none.
        entropy: (rows,) of the distribution, or None where it was not asked for.
        predicted: (rows,), the most likely token, or None where it was not asked for.
    """

    nll: Tensor
    entropy: Tensor | None = None
    predicted: Tensor | None = None

    @staticmethod
    def empty(
        targets: Tensor, dtype: torch.dtype, wants_entropy: bool, wants_predicted: bool
    ) -> RowResult:
        """Room for the results of as many rows as there are targets."""
        return RowResult(
            torch.empty_like(targets, dtype=dtype),
            torch.empty_like(targets, dtype=dtype) if wants_entropy else None,
            torch.empty_like(targets) if wants_predicted else None,
        )

    def put(self, rows: slice, found: RowResult) -> None:
        """Fill in some rows."""
        for field in fields(self):
            whole, part = getattr(self, field.name), getattr(found, field.name)
            if whole is not None:
                whole[rows] = part.detach()


def softmax_rows(
    logits: Tensor,
    targets: Tensor,
    coefficients: Tensor | None = None,
    entropy_coefficients: Tensor | None = None,
    wants_entropy: bool = False,
    wants_predicted: bool = False,
) -> tuple[RowResult, Tensor | None]:
    """Results of all rows, and the gradient of sum(coefficient * nll); uses up the logits.

    Args:
        logits: (rows, V).
        targets: (rows,), token ids or IGNORE_INDEX.
        coefficients: (rows,); without them there is no gradient.
        entropy_coefficients: (rows,): adds sum(coefficient * entropy).
        wants_entropy: Compute the entropy of each row.
        wants_predicted: Find the most likely token of each row.
    """
    native = None if wants_entropy else find_softmax_native(logits)
    if native is not None:
        nll, predicted = native.cross_entropy_(logits, targets, coefficients, wants_predicted)
        return RowResult(nll, None, predicted), None if coefficients is None else logits
    chunk = _SoftmaxChunk(logits, targets, wants_entropy, wants_predicted)
    result = RowResult(chunk.nll, chunk.entropy, chunk.predicted)
    if coefficients is None:
        return result, None
    return result, chunk.gradient_(coefficients, entropy_coefficients)


class _SoftmaxChunk:
    """One chunk of logits turned into probabilities in place; (rows, V) is held once.

    (Twice where the entropy is wanted: its gradient needs the log-probabilities too.)
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        wants_entropy: bool = False,
        wants_predicted: bool = False,
    ) -> None:
        logits = at_least_float32(logits)
        self.valid = targets != IGNORE_INDEX
        self.targets = targets.clamp(min=0).unsqueeze(1)
        target_logits = logits.gather(1, self.targets)
        self.predicted = logits.argmax(-1) if wants_predicted else None
        peak = logits.amax(-1, keepdim=True)
        shifted = logits.sub_(peak)
        self.log_weights = shifted if wants_entropy else None
        self.weights = shifted.exp() if wants_entropy else shifted.exp_()
        self.total = self.weights.sum(-1, keepdim=True)
        log_total = self.total.log()
        self.nll = (log_total + peak - target_logits).squeeze(1).where(self.valid, 0.0)
        self.entropy = None
        if self.log_weights is not None:
            self.log_total = log_total
            expected = torch.linalg.vecdot(self.weights, self.log_weights).unsqueeze(1)
            self.entropy = (log_total - expected / self.total).squeeze(1)

    def gradient_(self, coefficients: Tensor, entropy_coefficients: Tensor | None = None) -> Tensor:
        """Gradient of the value with respect to the logits; uses up the chunk."""
        coefficients = coefficients.where(self.valid, 0.0).to(self.total.dtype).unsqueeze(1)
        probs = self.weights
        if entropy_coefficients is None or self.log_weights is None or self.entropy is None:
            probs = probs.mul_(coefficients / self.total)
        else:  # dH/dz = -p (log p + H)
            surprise = self.log_weights.sub_(self.log_total - self.entropy.unsqueeze(1))
            surprise.mul_(-entropy_coefficients.to(surprise.dtype).unsqueeze(1)).add_(coefficients)
            probs = probs.div_(self.total).mul_(surprise)
        return probs.scatter_add_(1, self.targets, -coefficients)
