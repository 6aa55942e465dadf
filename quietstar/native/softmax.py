"""Cross entropies and draws over rows of logits by compiled loops (``native/softmax.cpp``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quietstar.native.library import load_library

_DTYPES = (torch.float32, torch.bfloat16)
_I64 = ctypes.c_int64


class _Rows(ctypes.Structure):
    _fields_ = [("logits", ctypes.c_void_p)]
    _fields_ += [(name, _I64) for name in ("rows", "vocab", "stride", "threads")]


class SoftmaxNative:
    """The compiled functions.

    Args:
        library: Of `quietstar.native.library`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def cross_entropy_(
        self,
        logits: Tensor,
        targets: Tensor,
        coefficients: Tensor | None,
        wants_predicted: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Negative log-likelihoods (float32) and, if wanted, the most likely tokens.

        Args:
            logits: (rows, V); with coefficients they become the gradient of
                sum(coefficient * nll).
            targets: (rows,), token ids; below zero there is none.
            coefficients: (rows,), or None.
            wants_predicted: Find the most likely tokens.
        """
        rows = logits.shape[0]
        nll = torch.empty(rows)
        predicted = torch.empty(rows, dtype=torch.long) if wants_predicted else None
        targets = targets.contiguous()
        coefficients = None if coefficients is None else coefficients.float().contiguous()
        self._library.softmax_cross_entropy(
            ctypes.byref(_rows(logits)), _I64(logits.dtype == torch.bfloat16), _pointer(targets),
            _pointer(coefficients), _pointer(nll), _pointer(predicted),
        )  # fmt: skip
        return nll, predicted

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Tokens (rows, draws) of rows of float32 logits, from numbers in (0, 1) of that shape."""
        uniform = uniform.contiguous()
        tokens = torch.empty(uniform.shape, dtype=torch.long)
        self._library.softmax_draw(
            ctypes.byref(_rows(logits)), _pointer(uniform), _I64(uniform.shape[1]),
            _pointer(tokens),
        )  # fmt: skip
        return tokens


def find_softmax_native(logits: Tensor) -> SoftmaxNative | None:
    """The compiled functions, where they can read such logits: on CPUs."""
    plain = type(logits) is Tensor and logits.ndim == 2 and logits.stride(1) == 1
    if not plain or logits.device.type != "cpu" or logits.dtype not in _DTYPES:
        return None
    library = load_library()
    return None if library is None else SoftmaxNative(library)


def _rows(logits: Tensor) -> _Rows:
    rows, vocab = logits.shape
    return _Rows(logits.data_ptr(), rows, vocab, logits.stride(0), torch.get_num_threads())


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())
