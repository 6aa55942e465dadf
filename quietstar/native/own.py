"""Own attention of blocks by compiled loops (``native/own_block.cpp``), where they serve.

They do in place what `quietstar.attention.own_block` does with batched products, and the merge with
what the text gave.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from quietstar.native.library import load_library

_DTYPES = (torch.float32, torch.bfloat16)

OwnViews = tuple[Tensor, Tensor]
"""Start tokens (X, 1, Y, H, 1, ...) and the others (X, K, Y, H, W - 1, ...), views."""

_I64 = ctypes.c_int64


class _Grid(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("start", "rest")]
    _fields_ += [(name, _I64) for name in ("start_x", "start_y", "start_h", *"xkyhw")]


class _Sizes(ctypes.Structure):
    _fields_ = [(name, _I64) for name in ("x", "k", "y", "heads", "key_heads", "w", "d", "threads")]
    _fields_ += [("scale", ctypes.c_float)]


class _Line(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *[(name, _I64) for name in "nhs"]]


class _Past(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *[(name, _I64) for name in "tnsh"]]


class _StepSizes(ctypes.Structure):
    _fields_ = [(name, _I64) for name in ("n", "s", "heads", "key_heads", "tokens", "d", "threads")]
    _fields_ += [("scale", ctypes.c_float)]


class OwnNative:
    """The compiled functions.

    Args:
        library: Of `quietstar.native`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def forward_(
        self, views: Sequence[OwnViews], out: OwnViews, lse: OwnViews, scale: float
    ) -> None:
        """Complete what blocks saw of the text with what they see of themselves.

        Args:
            views: Queries, keys and values.
            out: Output towards the text; becomes that of the whole row.
            lse: Its log-sum-exp, float32; becomes that of the whole row.
            scale: Of the scores.
        """
        sizes = _sizes(views[0], views[1], scale)
        grids = _array(_Grid, map(_grid, (*views, out, lse)))
        half = int(views[0][0].dtype == torch.bfloat16)
        self._library.own_forward(ctypes.byref(sizes), grids, _I64(half))

    def backward_(
        self,
        grad: OwnViews,
        views: Sequence[OwnViews],
        result: Sequence[OwnViews],
        grads: Sequence[OwnViews],
        scale: float,
    ) -> None:
        """Gradients of the own part.

        Args:
            grad: Of the output, of the queries' dtype, as ``views`` are.
            views: Queries, keys and values.
            result: Output (float32) and log-sum-exp of the whole row.
            grads: Of the queries (float32), to which it is added, and of the keys and values, which
                are overwritten.
            scale: Of the scores.
        """
        sizes = _sizes(views[0], views[1], scale)
        grids = _array(_Grid, map(_grid, (grad, *views, *result, *grads)))
        half = int(views[0][0].dtype == torch.bfloat16)
        self._library.own_backward(ctypes.byref(sizes), grids, _I64(half))

    def step_(
        self, q: Tensor, past: tuple[Tensor, Tensor], out: Tensor, lse: Tensor, scale: float
    ) -> None:
        """Complete what the newest token of every block saw of the text.

        Args:
            q: Queries, (N, H, S, d).
            past: Keys and values of the blocks so far, (tokens, N, S, Hkv, d), float32.
            out: Output towards the text, (N, H, S, d); becomes that of the whole row.
            lse: Its log-sum-exp, (N, H, S), float32.
            scale: Of the scores.
        """
        rows, heads, places, size = q.shape
        tokens, key_heads = past[0].shape[0], past[0].shape[3]
        sizes = _StepSizes(rows, places, heads, key_heads, tokens, size, *_rest(scale))
        lines = _array(_Line, (_Line(x.data_ptr(), *x.stride()[:3]) for x in (q, out, lse)))
        keys = _array(_Past, (_Past(x.data_ptr(), *x.stride()[:4]) for x in past))
        half = int(q.dtype == torch.bfloat16)
        self._library.own_step(ctypes.byref(sizes), lines, keys, _I64(half))


def find_own_native(*tensors: Tensor) -> OwnNative | None:
    """The compiled functions, where they can read such tensors: on CPUs, of one common dtype."""
    first = tensors[0]
    plain = all(type(x) is Tensor and x.stride(-1) == 1 and x.dtype == first.dtype for x in tensors)
    if not plain or first.device.type != "cpu" or first.dtype not in _DTYPES:
        return None
    library = load_library()
    return None if library is None else OwnNative(library)


def split_start(places: Tensor) -> OwnViews:
    """Whole blocks (X, Y, H, W, ...), a start token in each, as their own views."""
    blocks = places.unsqueeze(1)
    return blocks[:, :, :, :, :1], blocks[:, :, :, :, 1:]


def _sizes(q: OwnViews, k: OwnViews, scale: float) -> _Sizes:
    x, thoughts, y, heads, rest, size = q[1].shape
    return _Sizes(x, thoughts, y, heads, k[1].shape[3], rest + 1, size, *_rest(scale))


def _rest(scale: float) -> tuple[int, float]:
    return torch.get_num_threads(), scale


def _grid(views: OwnViews) -> _Grid:
    start, rest = views
    x, _, y, h = start.stride()[:4]
    return _Grid(start.data_ptr(), rest.data_ptr(), x, y, h, *rest.stride()[:5])


def _array(kind: type[ctypes.Structure], items) -> ctypes.Array:
    items = list(items)
    return (kind * len(items))(*items)
