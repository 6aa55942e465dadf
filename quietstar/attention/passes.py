"""What each pass of the engine does at an attention layer: who attends to whom.

`TextPass` runs a text alone and may keep its keys and values; `BlockPass` runs blocks against them,
with gradient. The steps of the rollout are in `quietstar.attention.rollout_steps`.
"""

from __future__ import annotations

import logging
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quietstar.attention.block_attention import block_attention, dense_block_attention
from quietstar.attention.blocks import Blocks
from quietstar.attention.dense import ScoreRules, recomputed
from quietstar.attention.kernels import Kernel, find_kernel

VIRTUAL_TOKENS = "virtual_tokens"
"""Child of a model, and of attention layers, with what stands for learned tokens before a text."""

logger = logging.getLogger(__name__)


@runtime_checkable
class Pass(Protocol):
    """What a parallel-thought pass does at each attention layer."""

    def attend(
        self, layer: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules
    ) -> Tensor:
        """Output (N, H, S, dv) of queries (N, H, S, d) and keys and values (N, Hkv, S, .)."""
        ...


def with_virtual(layer: torch.nn.Module, k: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Put a layer's learned keys and values in the place of those of the virtual tokens.

    They are the first of a text, along axis ``dim`` of texts (B, Hkv, S, .).
    """
    virtual = getattr(layer, VIRTUAL_TOKENS, None)
    if virtual is None:
        return k, v
    count = virtual.keys.shape[1]
    pairs = ((k, virtual.keys), (v, virtual.values))
    k, v = (
        torch.cat(
            [
                new.to(x.dtype).expand(x.shape[0], -1, -1, -1),
                x.narrow(dim, count, x.shape[dim] - count),
            ],
            dim,
        )
        for x, new in pairs
    )
    return k, v


# --- A text alone ---------------------------------------------------------------------------------


TextKeys = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of texts (B, Hkv, S, .), virtual tokens included, by `id` of the layer."""


class TextPass:
    """A text alone: what the model's own attention does, virtual tokens heeded.

    Args:
        keys: Where its keys and values are kept, with their graph.
    """

    def __init__(self, keys: TextKeys | None = None) -> None:
        self.keys = keys

    def attend(self, layer, q, k, v, rules):  # noqa: D102
        k, v = with_virtual(layer, k, v, 2)
        if self.keys is not None:
            self.keys[id(layer)] = (k, v)
        kernel = choose_kernel(q, k, v, rules, q.shape[2])
        if kernel is None:
            return recomputed(q, (k, v), None, rules)
        return CausalAttention.apply(q, k, v, rules.scale, kernel)


class CausalAttention(torch.autograd.Function):
    """Plain causal attention on a kernel."""

    @staticmethod
    def forward(ctx, q, k, v, scale, kernel):  # noqa: D102
        out, lse = kernel.forward(q, k, v, True, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.kernel = scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        wide = ctx.kernel.backward_dtype(grad.dtype)
        dtype, (grad, q, k, v, out) = grad.dtype, (x.to(wide) for x in (grad, q, k, v, out))
        grads = ctx.kernel.backward(grad, (q, k, v), out, lse, True, ctx.scale)
        return *(x.to(dtype) for x in grads), None, None


# --- Blocks of some positions, against a text that ran before -------------------------------------


class BlockPass:
    """Attention of blocks to the text and to themselves, with gradient.

    Args:
        keys: Keys and values of the texts.
        blocks: Layout of the block tokens.
        num_positions: Highest position of any block token, plus one.
    """

    def __init__(self, keys: TextKeys, blocks: Blocks, num_positions: int) -> None:
        self.keys, self.blocks, self.num_positions = keys, blocks, num_positions

    def attend(self, layer, q, k, v, rules):  # noqa: D102
        text = self.keys[id(layer)]
        kernel = choose_kernel(q, k, v, rules, self.num_positions, masked=self.blocks.masked)
        if kernel is None:
            return dense_block_attention(q, k, v, text, self.blocks, rules)
        return block_attention(q, k, v, text, self.blocks, rules.scale, kernel)


_told: set[str] = set()


def choose_kernel(
    q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules, num_positions: int, masked: bool = False
) -> Kernel | None:
    """The flash kernel, or None for the dense path; says once why the dense path is taken."""
    if not rules.fits_flash(num_positions):
        _tell_once("soft-capping, attention sinks or a sliding window shorter than the text")
        return None
    kernel = find_kernel(q, k, v, masked)
    if kernel is None:
        _tell_once(f"no flash kernel for {q.dtype} on {q.device.type} with head size {q.shape[-1]}")
    return kernel


def _tell_once(reason: str) -> None:
    if reason not in _told:
        _told.add(reason)
        logger.warning("attention takes the slow exact path (dense mask): %s", reason)
