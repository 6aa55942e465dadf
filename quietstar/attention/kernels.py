"""Attention kernels that return the log-sum-exp and whose backward takes it.

Both are what lets two partial attentions be merged exactly, forward and backward. Shapes: queries
(N, H, Sq, d), keys and values (N, Hkv, Sk, d) with H a multiple of Hkv, log-sum-exp (N, H, Sq).
"""

from __future__ import annotations

import functools
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precisions to float32; leave float32 and float64 (gradient checks) as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@runtime_checkable
class Kernel(Protocol):
    """One attention kernel; ``scale`` multiplies the scores."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output (N, H, Sq, d) and log-sum-exp (N, H, Sq); the mask (N, 1, Sq, Sk) is added."""
        ...

    def backward(
        self,
        grad: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, given an output and log-sum-exp that may be merged ones.

        All tensors are of type `backward_dtype`.
        """
        ...

    def backward_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which the backward pass of a forward pass in ``dtype`` runs."""
        ...


class CpuFlash:
    """The flash kernel of the CPU: float64, float32, bfloat16, float16; grouped-query heads."""

    def forward(self, q, k, v, causal, scale, mask=None):  # noqa: D102  (see Kernel)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )

    def backward(self, grad, qkv, out, lse, causal, scale, mask=None):  # noqa: D102
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *qkv, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )

    def backward_dtype(self, dtype):  # noqa: D102
        # In half precisions the kernel's backward is up to twice slower than in float32 (measured
        # at 64 to 256 positions).
        return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class CudaFlash:
    """FlashAttention-2 on CUDA: bfloat16 and float16, grouped-query heads, no mask."""

    def forward(self, q, k, v, causal, scale, mask=None):  # noqa: D102
        assert mask is None, "find_kernel(masked=True) gives a kernel that takes one"
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, return_debug_mask=False, scale=scale
        )
        return out, lse

    def backward_dtype(self, dtype):  # noqa: D102
        return dtype

    def backward(self, grad, qkv, out, lse, causal, scale, mask=None):  # noqa: D102
        # Without dropout the kernel never reads the random state, but wants tensors there.
        seed = torch.zeros(2, dtype=torch.uint64, device=grad.device)
        offset = torch.zeros((), dtype=torch.uint64, device=grad.device)
        lengths = (None, None, grad.shape[2], qkv[1].shape[2])
        return aten._scaled_dot_product_flash_attention_backward(
            grad, *qkv, out, lse.contiguous(), *lengths, 0.0, causal, seed, offset, scale=scale
        )


class CudaEfficient:
    """The memory-efficient kernel on CUDA, for float32 and for masks; expands grouped heads."""

    def forward(self, q, k, v, causal, scale, mask=None):  # noqa: D102
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, _as_bias(mask, q), True, 0.0, causal, scale=scale
        )
        return out, lse[..., : q.shape[2]]  # the kernel pads the rows to a multiple of 32

    def backward_dtype(self, dtype):  # noqa: D102
        return dtype

    def backward(self, grad, qkv, out, lse, causal, scale, mask=None):  # noqa: D102
        q, k, v = qkv
        groups = q.shape[1] // k.shape[1]
        wide_k, wide_v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        rows = -(-lse.shape[-1] // 32) * 32
        lse = F.pad(lse, (0, rows - lse.shape[-1]), value=torch.inf)
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        wide = (q, wide_k, wide_v, _as_bias(mask, q))
        wanted = [True, True, True, False]
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, *wide, out, lse.contiguous(), seed, seed, 0.0, wanted, causal, scale=scale
        )
        dk, dv = (x.unflatten(1, (k.shape[1], groups)).sum(2) for x in (dk, dv))
        return dq, dk, dv


def _as_bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask for every head, its rows aligned as the memory-efficient kernel wants them."""
    if mask is None:
        return None
    keys = mask.shape[-1]
    mask = F.pad(mask, (0, -keys % 8))
    return mask.expand(-1, q.shape[1], -1, -1)[..., :keys]


def find_kernel(q: Tensor, k: Tensor, v: Tensor, masked: bool = False) -> Kernel | None:
    """The kernel for these tensors, or None where only the dense path is exact.

    With ``masked`` it must take a mask too.
    """
    if not (q.shape[-1] == k.shape[-1] == v.shape[-1] and q.dtype == k.dtype == v.dtype):
        return None
    return _find_kernel(q.device.type, q.dtype, q.shape[-1], q.shape[1] // k.shape[1], masked)


@functools.cache
def _find_kernel(
    device: str, dtype: torch.dtype, head_size: int, groups: int, masked: bool
) -> Kernel | None:
    if device == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return CpuFlash()
    half = dtype in (torch.bfloat16, torch.float16)
    if device != "cuda" or head_size % 8 or head_size > 256 or not (half or dtype == torch.float32):
        return None
    kernel: Kernel = CudaFlash() if half and not masked else CudaEfficient()
    return kernel if _agrees_with_plain(kernel, dtype, head_size, groups, masked) else None


@torch.no_grad()
def _agrees_with_plain(
    kernel: Kernel, dtype: torch.dtype, head_size: int, groups: int, masked: bool
) -> bool:
    """Whether the kernel is there on this GPU and right, tried once on a small problem."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        x = torch.randn(2, 40, heads, head_size, generator=generator)
        return x.to("cuda", dtype).transpose(1, 2)

    q, k, v, grad = normal(2 * groups), normal(2), normal(2), normal(2 * groups)
    settings = (True, head_size**-0.5, None)
    if masked:  # causal as well, but as a mask
        later = torch.ones(40, 40, dtype=torch.bool, device="cuda").triu(1)
        mask = torch.zeros(2, 1, 40, 40, dtype=dtype, device="cuda").masked_fill(later, -torch.inf)
        settings = (False, head_size**-0.5, mask)
    try:
        out, lse = kernel.forward(q, k, v, *settings)
        grads = kernel.backward(grad, (q, k, v), out, lse, *settings)
    except (RuntimeError, TypeError) as problem:
        if not _is_refusal(problem):
            raise
        return False
    with torch.enable_grad():
        leaves = [x.float().detach().requires_grad_() for x in (q, k, v)]
        wide = [leaves[0], *(x.repeat_interleave(groups, dim=1) for x in leaves[1:])]
        plain = F.scaled_dot_product_attention(wide[0], wide[1], wide[2], is_causal=True)
        plain_grads = torch.autograd.grad(plain, leaves, grad.float())
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2  # bfloat16 keeps 8 bits
    pairs = zip((out, *grads), (plain, *plain_grads), strict=True)
    return all(torch.allclose(a.float(), b, rtol=tolerance, atol=tolerance) for a, b in pairs)


def _is_refusal(problem: Exception) -> bool:
    """Return True if a kernel said that it is not there for such tensors.

    That is a plain error of a check. A GPU out of memory, or one whose context is broken, says
    nothing about the kernel: it has types of its own, or the name of the library that failed.
    """
    is_plain = type(problem) in (RuntimeError, NotImplementedError, TypeError)
    return is_plain and not any(name in str(problem) for name in ("CUDA error", "CUBLAS_STATUS"))
