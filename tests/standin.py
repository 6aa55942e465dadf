"""A stand-in for a CUDA device, on which tests of a CPU find what a GPU would refuse or wait for.

Its tensors hold numbers of the CPU, say ``cuda:0``, and follow CUDA's rules: tensors of two devices
do not mix, and the attention kernels refuse what the real ones do. Every operation is counted as a
launch, and every time that the host waits for the device as a sync, each with its place in the
package. Inside, ``torch`` has a backend of its own (`PrivateUse1`), so that autograd and operations
that are made of others allocate on it too. Autocast does nothing.

    with StandIn() as device:
        model.cuda()(ids.cuda()).loss.backward()
    device.syncs  # Counter({"training/loop.py __call__": 1})
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import quietstar

_setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
if _setup is None:
    pytest.exit("this torch has no backends in Python", returncode=0)
_setup("standin")

PACKAGE = str(Path(quietstar.__file__).parent) + "/"
CUDA, BACKEND = torch.device("cuda", 0), torch.device("standin", 0)
READS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "bincount",
         "_unique2", "unique_dim", "unique_consecutive"}  # fmt: skip
"""Operations that end on the host, or whose result has a shape that only the device knows."""
FREE = {"view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand",
        "unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes", "unbind", "detach",
        "alias", "as_strided", "unfold", "diagonal", "lift_fresh", "empty", "empty_like",
        "empty_strided", "new_empty", "new_empty_strided"}  # fmt: skip
"""Operations that run nothing."""


class StandIn:
    """The device, inside ``with``.

    Attributes:
        syncs: How often the host waited, by file and function of the package.
        launches: How often an operation was launched, likewise.
    """

    def __init__(self) -> None:
        self.syncs, self.launches = Counter(), Counter()

    def __enter__(self) -> StandIn:
        convert = torch.__future__.get_overwrite_module_params_on_conversion()
        self._undo = (convert, torch._C._only_lift_cpu_tensors())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device=...) copies, as it does
        self._contexts = [
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            mock.patch.object(torch.cuda, "_lazy_init"),
            mock.patch.object(torch.accelerator, "empty_cache"),
            mock.patch.object(torch.Tensor, "pin_memory", lambda x: x), _Devices(), _Runs(self),
        ]  # fmt: skip
        for context in self._contexts:
            context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(self._undo[0])
        torch._C._set_only_lift_cpu_tensors(self._undo[1])

    def forget(self) -> None:
        """Count from 0 again."""
        self.syncs.clear(), self.launches.clear()


def to_host(x):
    """Tensors, and those of lists and dicts, as on the CPU, without a sync."""
    return tree_map_only(OnDevice, lambda t: t.host.detach().clone(), x)


class OnDevice(torch.Tensor):
    """A tensor of the device, whose numbers are in ``host``."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = CUDA, True, False

    @staticmethod
    def __new__(cls, host):
        host = host.to_dense() if host.is_sparse else host
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(),
            dtype=host.dtype, device=BACKEND,
        )  # fmt: skip
        made.host = host
        return made

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of StandIn")


class _Devices(TorchFunctionMode):
    """Let ``cuda`` mean the backend wherever an argument names a device.

    Off inside functions of torch that are written in Python: there `_Runs` sees the argument.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], CUDA)
        return func(*map(_backend, args), **{k: _backend(x) for k, x in (kwargs or {}).items()})


def _backend(x):
    if isinstance(x, str) and x.startswith("cuda"):
        return BACKEND
    return BACKEND if isinstance(x, torch.device) and x.type == "cuda" else x


class _Runs(TorchDispatchMode):
    """Run every operation on the numbers, and write down what it would do."""

    def __init__(self, device: StandIn) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        inside = [x for x in leaves if isinstance(x, OnDevice)]
        target = kwargs.get("device")
        if not inside and (target is None or target.type == "cpu"):
            return func(*args, **kwargs)
        name, place = func._schema.name.split("::")[1], _place()
        if inside and _waits(name, func, args, kwargs):
            self.device.syncs[place] += 1
        if name == "_to_copy":
            is_copy = bool(inside) == (target is not None and target.type == "cpu")
            comes_back = bool(inside) and is_copy
            if is_copy and (comes_back or not kwargs.get("non_blocking")):
                self.device.syncs[place] += 1
        elif name == "copy_":
            if len(inside) == 1 and (inside[0] is args[1] or not _non_blocking(args, kwargs)):
                self.device.syncs[place] += 1
        elif inside:
            _check_devices(name, args, leaves)
        is_here = bool(inside) if target is None else target.type != "cpu"
        if is_here and name not in FREE:
            self.device.launches[place] += 1
        known = {id(x.host): x for x in inside}  # what is written in place is given back
        given, more = tree_map_only(OnDevice, lambda x: x.host, (args, dict(kwargs)))
        if target is not None:
            more["device"] = torch.device("cpu")
        for option in ("pin_memory", "non_blocking"):
            if option in more:
                more[option] = False
        result = KERNELS.get(name, func)(*given, **more)
        if not is_here:
            return result
        return tree_map_only(
            torch.Tensor, lambda x: known[id(x)] if id(x) in known else OnDevice(x), result
        )


def _place() -> str:
    """File and function of the package that called, or "elsewhere"."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{frame.f_code.co_filename[len(PACKAGE) :]} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _waits(name, func, args, kwargs) -> bool:
    if name == "repeat_interleave":
        return "Tensor" in func._overloadname and kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        index = [x for x in args[1] if x is not None]
        is_fill = name != "index" and len(index) == 1 and args[2].numel() == 1
        masks = any(x.dtype in (torch.bool, torch.uint8) for x in index) and not is_fill
        return masks or any(not isinstance(x, OnDevice) for x in index)
    return name in READS


def _non_blocking(args, kwargs) -> bool:
    return kwargs.get("non_blocking", args[2] if len(args) > 2 else False)


def _check_devices(name, args, leaves) -> None:
    """Refuse tensors of the CPU, but scalars and indices, as CUDA does."""
    others = [x for x in leaves if not isinstance(x, OnDevice) and x.dim() > 0]
    if name.strip("_").startswith("index") and isinstance(args[0], OnDevice):
        others = [x for x in others if all(x is not i for i in args[1])]
    if others:
        raise RuntimeError(f"{name}: tensors on cuda:0 and on cpu {[x.shape for x in others]}")


# --- Kernels of CUDA that a CPU does not have -----------------------------------------------------
def _attention(q, k, v, causal, scale, bias):
    """Output, log-sum-exp and scores of grouped heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).float() for x in (k, v))
    scores = q.float() @ k.mT * scale
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        assert q.shape[2] == k.shape[2], "causal with other queries than keys"
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v).to(q.dtype), lse, scores


def _attention_backward(grad, q, k, v, out, lse, causal, scale, bias):
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(groups, 1).float() for x in (k, v))
    scores = _attention(q, k, v, causal, scale, bias)[2]
    weights, grad = (scores - lse.unsqueeze(-1)).exp(), grad.float()
    delta = (grad * out.float()).sum(-1, keepdim=True)
    d_scores = weights * (grad @ wide_v.mT - delta) * scale
    dk, dv = d_scores.mT @ q.float(), weights.mT @ grad
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return (d_scores @ wide_k).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _check(tensors, *dtypes, bias=None) -> None:
    assert len({x.dtype for x in tensors}) == 1, "one type for all"
    assert tensors[0].dtype in dtypes, f"no kernel for {tensors[0].dtype}"
    assert all(x.stride(-1) == 1 for x in tensors), "the head size must be contiguous"
    if bias is not None:
        shape = (*tensors[0].shape[:3], tensors[1].shape[2])
        assert (bias.dtype, bias.shape) == (tensors[0].dtype, shape), "a bias for every head"
        assert (bias.stride(-1), bias.stride(-2) % 8) == (1, 0), "rows of the bias are aligned"


HALF = (torch.bfloat16, torch.float16)


def _flash(q, k, v, dropout=0.0, causal=False, *, return_debug_mask=False, scale=None):
    _check((q, k, v), *HALF)
    out, lse, _ = _attention(q, k, v, causal, scale, None)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, lse, None, None, q.shape[2], k.shape[2], torch.zeros(2), torch.zeros(()), out[:0]


def _flash_backward(grad, q, k, v, out, lse, *rest, scale=None):
    _check((q, k, v, grad, out), *HALF)
    assert lse.shape == q.shape[:3], "a log-sum-exp for every query"
    assert lse.is_contiguous(), "the kernel reads it as a whole"
    return _attention_backward(grad, q, k, v, out, lse, rest[5], scale, None)


def _efficient(q, k, v, bias, wants_lse, dropout=0.0, causal=False, *, scale=None):
    _check((q, k, v), *HALF, torch.float32, bias=bias)
    assert q.shape[1] == k.shape[1], "this kernel knows no grouped heads"
    out, lse, _ = _attention(q, k, v, causal, scale, bias)
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
    return out, lse, torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)


def _efficient_backward(
    grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal=False, *, scale=None
):
    _check((q, k, v, grad, out), *HALF, torch.float32, bias=bias)
    assert lse.shape[-1] % 32 == 0, "rows are padded to 32"
    assert lse.is_contiguous(), "the kernel reads it as a whole"
    lse = lse[..., : q.shape[2]]
    return *_attention_backward(grad, q, k, v, out, lse, causal, scale, bias), None


KERNELS = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}
