"""Blocks of tokens after some positions of texts that ran before: where they lie, whom they see.

The texts' keys and values are given; a pass runs block tokens alone. Each sees the text up to its
own position and its own block up to itself. The M tokens that open a block are the same for all
thoughts of a position, and run once: R = M + K (W - M) tokens a position. `ContiguousBlocks`
(positions that lie side by side) need no mask: all of their text but its end is seen by all of
them, and the end is plain causal attention. `SelectedBlocks` (any positions) take a mask towards
the text. `PackedBlocks` (long blocks at a few positions) lie end to end without padding.

Letters as in `quietstar.attention.layout`; N rows of L tokens are what the model is run on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from quietstar.attention.kernels import Kernel
from quietstar.attention.layout import on_host, to_device

Pair = tuple[Tensor, Tensor]
"""Keys and values, or output and log-sum-exp."""

_MASK_ELEMENTS = 2**22
"""Entries of a piece's mask: 16 MiB in float32."""
_PIECE_POSITIONS, _PIECE_QUERIES = 64, 512
"""Most positions of a piece; and, where fewer keys are read for fewer, about its most queries."""
_LEAST_FILLED = 0.8
"""Of the longest block that runs in one call, the shortest one has at least this share."""


class PrefixAttention:
    """Attention of queries at chosen positions to the text up to there.

    Shapes: queries (B, H, P * R, d), R of them at every position; keys and values of the text
    (B, Hkv, S, d); log-sum-exp (B, H, P * R).

    Args:
        positions: Ascending in every text; those below zero count as 0.
        repeats: Queries at each position, R.
        text_length: Tokens of a text, S.
    """

    def __init__(
        self, positions: Int[Tensor, "batch positions"], repeats: int, text_length: int
    ) -> None:
        self.positions, self.repeats = positions.clamp(min=0), repeats
        batch_size, count = positions.shape
        # Where the positions are on the host anyway, no key after the last one is read.
        cuts_keys = on_host(positions)
        sizes = [_MASK_ELEMENTS // (batch_size * repeats * text_length), _PIECE_POSITIONS]
        size = max(1, min(*sizes, _PIECE_QUERIES // repeats if cuts_keys else _PIECE_POSITIONS))
        self.pieces = [slice(n, min(n + size, count)) for n in range(0, count, size)]
        self._keeps = batch_size * repeats * count * text_length <= _MASK_ELEMENTS
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self.ends = [
            int(self.positions[:, p].max()) + 1 if cuts_keys else text_length for p in self.pieces
        ]

    def _masked(self, dtype: torch.dtype) -> Iterator[tuple[slice, int, Tensor]]:
        """Every piece: its queries, the end of its keys, and its mask (B, 1, queries, keys).

        Masks are 0 where a query sees a key, else -inf; where all are small, other layers reuse
        them.
        """
        for piece, end in zip(self.pieces, self.ends, strict=True):
            mask = self._masks.get((piece.start, dtype))
            if mask is None:
                key = torch.arange(end, device=self.positions.device)
                mask = key > self.positions[:, piece, None]  # True where hidden, (B, P', end)
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
                mask = mask.repeat_interleave(self.repeats, 1).unsqueeze(1)
                if self._keeps:
                    self._masks[piece.start, dtype] = mask
            yield slice(piece.start * self.repeats, piece.stop * self.repeats), end, mask

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Pair:
        """Output (B, H, P * R, d) and log-sum-exp."""
        parts = [
            kernel.forward(q[:, :, rows], k[:, :, :end], v[:, :, :end], False, scale, mask)
            for rows, end, mask in self._masked(q.dtype)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    def backward(
        self,
        kernel: Kernel,
        grad: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values; output and log-sum-exp may be merged ones."""
        q, k, v = qkv
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, end, mask in self._masked(q.dtype):
            piece = (q[:, :, rows], k[:, :, :end], v[:, :, :end])
            out_piece, lse_piece = out[:, :, rows], lse[:, :, rows]
            grads = kernel.backward(
                grad[:, :, rows], piece, out_piece, lse_piece, False, scale, mask
            )  # of the types of q, k and v, which are `Kernel.backward_dtype`
            dq[:, :, rows] = grads[0]
            dk[:, :, :end] += grads[1]
            dv[:, :, :end] += grads[2]
        return dq, dk, dv


@runtime_checkable
class Blocks(Protocol):
    """Where the tokens of some blocks lie in the rows of a pass, and how they see the text."""

    masked: bool

    @property
    def num_start(self) -> int:
        """Tokens that open a block, M."""
        ...

    def position_ids(self, device: torch.device) -> Int[Tensor, "rows tokens"]:
        """Position of every token."""
        ...

    def to_rows(
        self, start: Shaped[Tensor, "M B P width"], rest: Shaped[Tensor, "W-M K B P width"]
    ) -> Shaped[Tensor, "rows tokens width"]:
        """Block tokens as rows."""
        ...

    def from_rows(self, x: Shaped[Tensor, "rows tokens width"]) -> Pair:
        """Rows as start tokens (M, B, P, width) and the others (W - M, K, B, P, width)."""
        ...

    def block_views(self, x: Tensor) -> Pair:
        """(N, H, L, ...) with every block together, views.

        Start tokens are (X, 1, Y, H, M, ...) and the others (X, K, Y, H, W - M, ...), X and Y
        some split of (B, P).
        """
        ...

    def attend(self, kernel: Kernel, q: Tensor, text: Pair, scale: float) -> Pair:
        """Towards the text: output (N, H, L, d) and log-sum-exp."""
        ...

    def attend_backward(
        self, kernel: Kernel, grad: Tensor, qkv: Sequence[Tensor], out: Tensor, lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of the queries, and of the text's keys and values."""
        ...

    def query_positions(self, device: torch.device) -> Tensor:
        """Position of every thought, for one token of each at a time: (rows, queries).

        Rows times queries is the order of `block_views`, X * K * Y; all queries of a row belong to
        the same text.
        """
        ...


@dataclass(frozen=True)
class ContiguousBlocks:
    """Blocks at positions first .. first + count - 1 of every text; rows (b r), columns p.

    The R rows of a text are the start tokens, then (w k).

    Attributes:
        batch_size: Number of texts, B.
        num_thoughts: Thoughts at each position, K.
        block_length: Tokens of a block, W.
        first: The first position; virtual tokens before the text count.
        count: Number of positions, P.
        num_start: Tokens that open a block, M.
    """

    batch_size: int
    num_thoughts: int
    block_length: int
    first: int
    count: int
    num_start: int = 1
    masked = False

    def position_ids(self, device):  # noqa: D102  (see Blocks)
        place = self.first + 1 + torch.arange(self.count, device=device)
        index = torch.arange(self.block_length, device=device)
        start, rest = index[: self.num_start], index[self.num_start :]
        rows = torch.cat([start, rest.repeat_interleave(self.num_thoughts)])
        rows = place + rows[:, None]  # (R, P)
        return rows.expand(self.batch_size, -1, -1).flatten(0, 1)

    def to_rows(self, start, rest):  # noqa: D102
        rest = rest.movedim(2, 0).flatten(1, 2)  # (B, (w k), P, width)
        return torch.cat([start.transpose(0, 1), rest], 1).flatten(0, 1)

    def from_rows(self, x):  # noqa: D102
        rows = x.unflatten(0, (self.batch_size, -1))  # (B, R, P, width)
        start, rest = rows[:, : self.num_start], rows[:, self.num_start :]
        return start.transpose(0, 1), rest.unflatten(1, (-1, self.num_thoughts)).movedim(0, 2)

    def block_views(self, x):  # noqa: D102
        rows = x.unflatten(0, (self.batch_size, -1))  # (B, R, H, P, ...)
        start = rows[:, : self.num_start].unsqueeze(2)  # (B, M, 1, H, P, ...)
        rest = rows[:, self.num_start :].unflatten(1, (-1, self.num_thoughts))
        order = ((0, 2, 4, 3, 1), (0, 1, 2, 3, 4))
        return start.movedim(*order), rest.movedim(*order)

    def attend(self, kernel, q, text, scale):  # noqa: D102
        out, lse = kernel.forward(q, *(self._near(x) for x in text), True, scale)
        if self.first:
            far = [x[:, :, : self.first] for x in text]
            far_out, far_lse = kernel.forward(self._by_text(q), *far, False, scale)
            far_out, far_lse = self._by_row(far_out), self._by_row(far_lse)
            merged = torch.logaddexp(lse, far_lse)
            out.mul_((lse - merged).exp_().unsqueeze(-1).to(out.dtype))
            out.addcmul_(far_out, (far_lse - merged).exp_().unsqueeze(-1).to(out.dtype))
            lse = merged
        return out, lse

    def attend_backward(self, kernel, grad, qkv, out, lse, scale):  # noqa: D102
        q, k, v = qkv
        near = (q, self._near(k), self._near(v))
        dq, dk, dv = kernel.backward(grad, near, out, lse, True, scale)
        dk, dv = (x.unflatten(0, (self.batch_size, -1)).sum(1) for x in (dk, dv))
        if not self.first:
            return dq, dk, dv
        far = (self._by_text(q), k[:, :, : self.first], v[:, :, : self.first])
        rows = (self._by_text(out), self._by_text(lse).contiguous())
        far_dq, far_dk, far_dv = kernel.backward(self._by_text(grad), far, *rows, False, scale)
        dq = dq.add_(self._by_row(far_dq))
        return dq, torch.cat([far_dk, dk], 2), torch.cat([far_dv, dv], 2)

    def _near(self, x: Tensor) -> Tensor:
        """The end of the text, from the first position on, for every row."""
        rows = self.num_start + (self.block_length - self.num_start) * self.num_thoughts
        near = x[:, :, self.first : self.first + self.count].unsqueeze(1)
        return near.expand(-1, rows, -1, -1, -1).reshape(-1, *near.shape[2:])

    def _by_text(self, x: Tensor) -> Tensor:
        """(N, H, P, ...) as (B, H, R * P, ...): all queries of a text in one line."""
        lines = x.transpose(1, 2).unflatten(0, (self.batch_size, -1)).flatten(1, 2)
        return lines.transpose(1, 2)

    def _by_row(self, x: Tensor) -> Tensor:
        """The inverse of `_by_text`."""
        rows = x.transpose(1, 2).unflatten(1, (-1, self.count)).flatten(0, 1)
        return rows.transpose(1, 2)

    def query_positions(self, device):  # noqa: D102
        places = self.first + torch.arange(self.count, device=device)
        return places.expand(self.batch_size * self.num_thoughts, -1)


class SelectedBlocks:
    """Blocks at chosen positions; one row in the order (b p r): start, then (k w).

    Args:
        positions: (B, P), ascending; virtual tokens before the text count. Values below zero pad
            texts with fewer.
        num_thoughts: Thoughts at each position, K.
        block_length: Tokens of a block, W.
        text_length: S, virtual tokens included.
        num_start: Tokens that open a block, M.
    """

    masked = True

    def __init__(
        self,
        positions: Int[Tensor, "batch positions"],
        num_thoughts: int,
        block_length: int,
        text_length: int,
        num_start: int = 1,
    ) -> None:
        self.num_thoughts, self.block_length = num_thoughts, block_length
        self.num_start = num_start
        self._tokens = num_start + num_thoughts * (block_length - num_start)  # R
        self._prefix = PrefixAttention(positions, self._tokens, text_length)
        self.positions = self._prefix.positions

    def position_ids(self, device):  # noqa: D102  (see Blocks)
        index = torch.arange(1, self.block_length + 1, device=device)
        rest = index[self.num_start :].repeat(self.num_thoughts)
        offset = torch.cat([index[: self.num_start], rest])  # (R,)
        return (self.positions.unsqueeze(-1) + offset).reshape(1, -1)

    def to_rows(self, start, rest):  # noqa: D102
        rest = rest.permute(2, 3, 1, 0, 4).flatten(2, 3)  # (B, P, (k w), width)
        return torch.cat([start.movedim(0, 2), rest], 2).flatten(0, 2).unsqueeze(0)

    def from_rows(self, x):  # noqa: D102
        tokens = x[0].unflatten(0, (*self.positions.shape, -1))  # (B, P, R, width)
        rest = tokens[:, :, self.num_start :].unflatten(2, (self.num_thoughts, -1))
        return tokens[:, :, : self.num_start].movedim(2, 0), rest.permute(3, 2, 0, 1, 4)

    def block_views(self, x):  # noqa: D102
        tokens = x[0].unflatten(1, (-1, self._tokens))  # (H, B * P, R, ...)
        start = tokens[:, :, : self.num_start].transpose(0, 1)[:, None, None]
        rest = tokens[:, :, self.num_start :].unflatten(2, (self.num_thoughts, -1))
        return start, rest.movedim((1, 2, 0), (0, 1, 2)).unsqueeze(2)

    def attend(self, kernel, q, text, scale):  # noqa: D102
        out, lse = self._prefix.forward(kernel, self._by_text(q), text[0], text[1], scale)
        return self._as_row(out), self._as_row(lse)

    def attend_backward(self, kernel, grad, qkv, out, lse, scale):  # noqa: D102
        q, k, v = qkv
        q, grad, out, lse = (self._by_text(x) for x in (q, grad, out, lse))
        dq, dk, dv = self._prefix.backward(kernel, grad, (q, k, v), out, lse.contiguous(), scale)
        return self._as_row(dq), dk, dv

    def _by_text(self, x: Tensor) -> Tensor:
        """(1, H, L, ...) as (B, H, P * R, ...)."""
        return x[0].unflatten(1, (self.positions.shape[0], -1)).transpose(0, 1)

    def _as_row(self, x: Tensor) -> Tensor:
        """The inverse of `_by_text`."""
        return x.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)

    def query_positions(self, device):  # noqa: D102
        return self.positions.repeat_interleave(self.num_thoughts, 1)


class PackedBlocks:
    """Long blocks at a few positions, end to end in one row: nothing that only pads is run.

    The order is that of `SelectedBlocks`. Towards the text each position is a call of the kernel
    with its own keys, inside blocks each `Bucket` is one; with blocks of many tokens these calls
    are long, and no mask or score is ever held.

    Args:
        positions: (B, P), ascending; virtual tokens before the text count. Values below zero pad
            texts with fewer.
        lengths: Tokens of each block after those that open it, (K, B, P); None where all have
            ``block_length`` in all.
        num_thoughts: Thoughts at each position, K.
        block_length: Tokens of a block, W.
        device: Where the rows are; positions and lengths are on the host.
        num_start: Tokens that open a block, M.
    """

    masked = False

    def __init__(
        self,
        positions: Int[np.ndarray, "batch positions"],
        lengths: Int[np.ndarray, "thoughts batch positions"] | None,
        num_thoughts: int,
        block_length: int,
        device: torch.device,
        num_start: int = 1,
    ) -> None:
        self.num_thoughts, self.num_start = num_thoughts, num_start
        places, rest = positions.copy(), block_length - num_start
        own = np.full((*places.shape, num_thoughts), rest)
        if lengths is not None:
            own = lengths.transpose(1, 2, 0)
        if (places < 0).all():  # a pass has one token at least
            places[0, 0] = 0
        own = np.where(places[..., None] < 0, 0, own)
        opens = np.repeat(places[..., None] >= 0, num_start, -1)
        is_real = (np.arange(rest) < own[..., None]).reshape(*places.shape, -1)
        is_real = np.concatenate([opens, is_real], -1)
        real = np.flatnonzero(is_real)
        row_of = np.zeros(is_real.size, dtype=np.int64)
        row_of[real] = np.arange(len(real))
        offset = np.arange(1, block_length + 1)
        offset = np.concatenate([offset[:num_start], np.tile(offset[num_start:], num_thoughts)])
        ids = (places.clip(min=0)[..., None] + offset).ravel()[real]
        self.spans: list[tuple[int, slice, int]] = []
        """Of every position: its text, its tokens in the row, and the end of the keys it sees."""
        self.sequences: list[tuple[int, np.ndarray, int]] = []
        """Of every block: its span, its tokens in the row, and the first that is its own to give:
        those that open it are given by the first block of a position."""
        first = 0
        for text, place in np.argwhere(places >= 0).tolist():
            stop = first + num_start + int(own[text, place].sum())
            begin, start = first + num_start, np.arange(first, first + num_start)
            for thought, length in enumerate(own[text, place].tolist()):
                tokens = np.concatenate([start, np.arange(begin, begin + length)])
                self.sequences.append((len(self.spans), tokens, num_start if thought else 0))
                begin += length
            self.spans.append((text, slice(first, stop), int(places[text, place]) + 1))
            first = stop
        buckets = [_lay_out(part) for part in _by_length(self.sequences)]
        # Copied at once, for a device takes as long for a few numbers.
        parts = [real, row_of, ids, *(index for _, *indices in buckets for index in indices)]
        sizes = [len(part) for part in parts]
        self._grid = is_real.shape
        self._real, self._row_of, self._ids, *indices = to_device(
            np.concatenate(parts), device
        ).split(sizes)
        self.buckets = [
            Bucket(shape, *indices[3 * n : 3 * n + 3]) for n, (shape, *_) in enumerate(buckets)
        ]

    def position_ids(self, device):  # noqa: D102  (see Blocks)
        return self._ids.unsqueeze(0)

    def to_rows(self, start, rest):  # noqa: D102
        rest = rest.permute(2, 3, 1, 0, 4).flatten(2, 3)  # (B, P, (k w), width)
        rows = torch.cat([start.movedim(0, 2), rest], 2).flatten(0, 2)
        return rows[self._real].unsqueeze(0)

    def from_rows(self, x):  # noqa: D102  (anything in place of what was not run)
        tokens = x[0][self._row_of].view(*self._grid, -1)
        rest = tokens[:, :, self.num_start :].unflatten(2, (self.num_thoughts, -1))
        return tokens[:, :, : self.num_start].movedim(2, 0), rest.permute(3, 2, 0, 1, 4)

    def attend(self, kernel: Kernel, q: Tensor, text: Pair, scale: float) -> Pair:
        """Towards the text: output (1, H, L, d) and log-sum-exp."""
        out, lse = torch.empty_like(q), None
        for n, rows, end in self.spans:
            keys, values = (x[n : n + 1, :, :end] for x in text)
            part, part_lse = kernel.forward(q[:, :, rows], keys, values, False, scale)
            lse = part_lse.new_empty(q.shape[:3]) if lse is None else lse
            out[:, :, rows], lse[:, :, rows] = part, part_lse
        assert lse is not None, "there is a position"
        return out, lse

    def attend_backward(
        self, kernel: Kernel, grad: Tensor, qkv: Sequence[Tensor], out: Tensor, lse: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of the queries, and of the text's keys and values."""
        q, k, v = qkv
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for n, rows, end in self.spans:
            piece = (q[:, :, rows], k[n : n + 1, :, :end], v[n : n + 1, :, :end])
            merged = (out[:, :, rows], lse[:, :, rows].contiguous())
            grads = kernel.backward(grad[:, :, rows], piece, *merged, False, scale)
            dq[:, :, rows] = grads[0]
            dk[n : n + 1, :, :end] += grads[1]
            dv[n : n + 1, :, :end] += grads[2]
        return dq, dk, dv


@dataclass(frozen=True)
class Bucket:
    """Blocks of about equal length, padded to the longest, for one call of a causal kernel.

    Attributes:
        shape: Blocks, and tokens of the longest.
        index: Token in the row of every place.
        given: Places of the tokens that are a block's own to give.
        rows: Tokens in the row at these places.
    """

    shape: tuple[int, int]
    index: Int[Tensor, " places"]
    given: Int[Tensor, " given"]
    rows: Int[Tensor, " given"]

    def gather(self, x: Shaped[Tensor, "1 H L *rest"]) -> Shaped[Tensor, "n H W *rest"]:
        """Block by block; tokens repeat where a block ends early."""
        return x[0].index_select(1, self.index).unflatten(1, self.shape).transpose(0, 1)

    def gather_once(self, x: Shaped[Tensor, "1 H L *rest"]) -> Shaped[Tensor, "n H W *rest"]:
        """The same of gradients: every token once, zeros elsewhere."""
        parts = x.new_zeros(x.shape[1], self.index.shape[0], *x.shape[3:])
        parts[:, self.given] = x[0].index_select(1, self.rows)
        return parts.unflatten(1, self.shape).transpose(0, 1)

    def write(self, whole: Shaped[Tensor, "1 H L *rest"], x: Shaped[Tensor, "n H W *rest"]) -> None:
        """Put every token back to its place."""
        parts = x.transpose(0, 1).flatten(1, 2)
        whole[0, :, self.rows] = parts[:, self.given].to(whole.dtype)

    def add(self, whole: Shaped[Tensor, "1 H L *rest"], x: Shaped[Tensor, "n H W *rest"]) -> None:
        """Add up what all blocks say of a token."""
        whole[0].index_add_(1, self.index, x.transpose(0, 1).flatten(1, 2))


def _lay_out(
    sequences: Sequence[tuple[int, np.ndarray, int]],
) -> tuple[tuple[int, int], np.ndarray, np.ndarray, np.ndarray]:
    """What a `Bucket` of some of `PackedBlocks.sequences` needs, on the host."""
    longest = max(len(tokens) for _, tokens, _ in sequences)
    index = np.stack([np.pad(t, (0, longest - len(t)), "edge") for _, t, _ in sequences])
    place = np.arange(longest)
    gives = np.stack([(place >= first) & (place < len(t)) for _, t, first in sequences])
    given = np.flatnonzero(gives)
    return (len(sequences), longest), index.ravel(), given, index.ravel()[given]


def _by_length(
    sequences: Sequence[tuple[int, np.ndarray, int]],
) -> list[list[tuple[int, np.ndarray, int]]]:
    """Sort blocks into groups of about equal length."""
    groups: list[list[tuple[int, np.ndarray, int]]] = []
    for sequence in sorted(sequences, key=lambda s: -len(s[1])):
        if not groups or len(sequence[1]) < _LEAST_FILLED * len(groups[-1][0][1]):
            groups.append([])
        groups[-1].append(sequence)
    return groups
