"""Sampling with keyed noise: one uniform number a token, and the inverse of the distribution.

The noise depends on the seed, the sample's index in the run, the thought, the token and the
position only. How a batch is cut, on which rank a sample lies and whether a run was resumed
therefore change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014): the increment and the two multipliers, as signed integers.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_NUMBERS_AT_ONCE = {"cpu": 2**16}  # 512 KiB of keys, which stay in its cache
_BLOCK = 64  # vocabulary entries summed together; the inverse looks into one block only


def keyed_uniform(
    seed: int,
    sample_ids: Int[Tensor, " batch"],
    num_thoughts: int,
    token: int,
    positions: Int[Tensor, "batch positions"],
) -> Float[Tensor, "thoughts batch positions"]:
    """Uniform numbers in (0, 1) for token ``token`` of every thought at these positions."""
    return _uniform(seed, sample_ids, num_thoughts, range(token, token + 1), positions)[0]


def thought_noise(
    seed: int,
    sample_ids: Int[Tensor, " batch"],
    num_thoughts: int,
    tokens: range,
    positions: Int[Tensor, "batch positions"],
) -> Iterator[Float[Tensor, "thoughts batch positions"]]:
    """Yield `keyed_uniform` of one token after the other, which are made many at a time.

    A GPU takes as long for one token's numbers as for thousands.
    """
    most = _NUMBERS_AT_ONCE.get(positions.device.type, 2**20)
    size = max(1, most // max(1, num_thoughts * positions.numel()))
    for n in range(0, len(tokens), size):
        yield from _uniform(seed, sample_ids, num_thoughts, tokens[n : n + size], positions)


def _uniform(
    seed: int, sample_ids: Tensor, num_thoughts: int, tokens: range, positions: Tensor
) -> Float[Tensor, "tokens thoughts batch positions"]:
    device = sample_ids.device
    # Seed and tokens are mixed on the host: a number of it, and a copy, keep nobody waiting.
    of_tokens = _mix(torch.arange(tokens.start, tokens.stop) + 1).to(device, non_blocking=True)
    key = _mix(sample_ids.long() + _mix(torch.tensor(seed)))
    key = _mix(key + of_tokens[:, None, None])  # (tokens, 1, B)
    key = _mix(key + torch.arange(num_thoughts, device=device)[:, None])  # (tokens, K, B)
    key = _mix(key[..., None] + positions)  # (tokens, K, B, P)
    # At the largest 24-bit numbers the half rounds away in float32: keep 1.0 out.
    return ((_shift(key, 40).float() + 0.5) * 2.0**-24).clamp(max=1 - 2.0**-24)


def _mix(x: Tensor) -> Tensor:
    x = x + _GAMMA
    x = (x ^ _shift(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sample_inverse_cdf(
    logits: Float[Tensor, "rows vocab"], uniform: Float[Tensor, "rows draws"]
) -> Int[Tensor, "rows draws"]:
    """Sample softmax(logits) by the inverse of its cumulative distribution.

    The vocabulary is summed in blocks; only the block that holds the answer is searched entry by
    entry. Overwrites ``logits`` if they are float32.
    """
    logits = logits.float()
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    whole = weights.shape[-1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    if whole < weights.shape[-1]:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
    block_ends = sums.cumsum_(-1)
    threshold = uniform * block_ends[:, -1:]
    last_block = block_ends.shape[-1] - 1
    block = torch.searchsorted(block_ends, threshold).clamp_(max=last_block)  # (rows, draws)
    before = block_ends.gather(1, (block - 1).clamp(min=0)).where(block > 0, 0.0)
    entry = block.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    inside = entry < logits.shape[-1]  # (rows, draws, block)
    last = logits.shape[-1] - 1
    ends = weights.gather(1, entry.clamp(max=last).flatten(1)).view(entry.shape)
    ends = ends.where(inside, 0.0).cumsum_(-1)
    # Rounding can put the rest a hair outside the block; strictly inside, the entry found has
    # a weight above zero.
    rest = (threshold - before).unsqueeze(-1)
    tiny = torch.finfo(rest.dtype).tiny
    rest = torch.minimum(rest.clamp(min=tiny), ends[..., -1:] * (1 - 2.0**-20))
    place = torch.searchsorted(ends, rest)
    return entry.gather(-1, place.clamp_(max=_BLOCK - 1)).squeeze(-1)
