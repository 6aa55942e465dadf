"""The judge's model at work: batches after a shared beginning, logits at a few places only."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quietstar.data.tokenizer import pad_left
from quietstar.errors import UserError
from quietstar.evaluation.scoring import not_finite, refuse_not_finite

LEAST_SHARED = 4
"""Fewer shared tokens are not worth a pass of their own."""
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")
"""Names that configs have for how far a layer attends."""


@contextmanager
def plainly(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model generates as a causal LM that was given no settings, and does not train.

    In train mode activation checkpointing drops the cache in some versions of transformers. The
    settings of generation that come with a model, as a repetition penalty, would fill what a call
    leaves out.
    """
    settings, modules = model.generation_config, [(m, m.training) for m in model.modules()]
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = settings
        for module, was_training in modules:
            module.training = was_training


@dataclass(frozen=True)
class Prefix:
    """The beginning that several rows have in common, which the model has run once.

    Attributes:
        ids: Tokens of the shared beginning.
        cache: Keys and values of one row; None where there is no such beginning.
    """

    ids: list[int]
    cache: DynamicCache | None = None

    def begins(self, rows: Sequence[list[int]], left: int = 1) -> bool:
        """Say whether all rows begin so, and have ``left`` tokens or more after it."""
        size = len(self.ids)
        return self.cache is not None and all(
            len(row) >= size + left and row[:size] == self.ids for row in rows
        )

    def repeated(self, count: int) -> DynamicCache:
        """Copy keys and values for a batch of ``count`` rows."""
        made = copy.deepcopy(self.cache)
        assert made is not None, "a prefix that begins rows has been run"
        made.batch_repeat_interleave(count)
        return made


class _Group(NamedTuple):
    """Rows next to each other that begin with the same tokens.

    Attributes:
        size: Tokens that they share after the beginning of all rows; 0 for a single row.
        members: Number of the rows.
    """

    size: int
    members: int


class JudgeModel:
    """Runs rows of tokens through a causal LM, as it is, without gradient.

    Its logits are computed by its own output layer, which sees the states of the needed places
    alone; so scale, cap, adapters and quantization of any architecture are what they are.

    Args:
        model: A causal LM, or one that PEFT has wrapped; adapters stay as they are switched.
        pad: Token to pad with.
        stops: Tokens that end a rationale.

    Raises:
        UserError: The model has no output layer, or prompt learning of PEFT, whose virtual tokens
            would have to precede the shared beginning.
    """

    def __init__(self, model: Any, pad: int, stops: Sequence[int]) -> None:
        if hasattr(model, "get_base_model"):
            if model.active_peft_config.is_prompt_learning:
                raise UserError(
                    f"judge ({model.active_peft_config.peft_type.value}): virtual tokens of PEFT "
                    "cannot judge. Give another adapter, or the model without it."
                )
            model = model.get_base_model()
        self.model: PreTrainedModel = model
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(
                f"judge ({type(model).__name__}): has no output layer (get_output_embeddings). "
                "Give a causal language model."
            )
        self.head: torch.nn.Module = head
        self.pad, self.stops, self.tokens_run = pad, list(stops), 0
        names = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in names
        # Its name changed in transformers 5.24.
        caches = ("cache", "past_key_values")
        self._cache_name = next((name for name in caches if name in names), None)

    @property
    def context(self) -> int | None:
        """Most tokens of a row; None if the model has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def window(self) -> float:
        """Tokens that the layer with the shortest window attends to; infinity without windows."""
        config = self.model.config.get_text_config()
        sizes = (getattr(config, name, None) for name in WINDOWS)
        return float(min((size for size in sizes if isinstance(size, int)), default=math.inf))

    @torch.no_grad()
    def run_prefix(self, rows: Sequence[list[int]]) -> Prefix:
        """Run what all rows begin with; nothing for a single row, or a cache that is no list.

        Recurrent layers keep states, not keys and values, and are run as a whole each time.
        """
        low, high, size = min(rows), max(rows), 0  # what these share, all share
        while size < len(low) - 1 and low[size] == high[size]:
            size += 1
        ids = low[:size]
        if len(rows) < 2 or not ids or self._cache_name is None:
            return Prefix([])
        cache = DynamicCache(config=self.model.config)
        if any(type(x) not in (DynamicLayer, DynamicSlidingWindowLayer) for x in cache.layers):
            return Prefix([])
        with plainly(self.model):
            self._logits([ids], 1, cache)
        return Prefix(ids, cache)

    @torch.no_grad()
    def last_logprobs(
        self, rows: Sequence[list[int]], count: int, prefix: Prefix
    ) -> Float[Tensor, "rows count vocab"]:
        """Compute the log-probabilities after the last ``count`` tokens of each row, float32.

        Raises:
            UserError: The model's logits are not finite.
        """
        shares = prefix.begins(rows, count)
        rests = [row[len(prefix.ids) if shares else 0 :] for row in rows]
        with plainly(self.model):
            if shares and (groups := self._groups(rests, count, len(prefix.ids))):
                logits = self._grouped_logits(rests, groups, count, prefix)
            else:
                logits = self._logits(rests, count, prefix.repeated(len(rows)) if shares else None)
        if not (finite := logits.amax(-1).isfinite()).all():
            worst = logits.amax(-1)[~finite][0].item()
            raise not_finite("judge", "its largest logit", worst)
        return logits.float().log_softmax(-1)

    def _groups(self, rests: Sequence[list[int]], count: int, begin: int) -> list[_Group]:
        """Group neighbors by what they begin with, as the prompt of both orders of a pair.

        Empty where the groups' beginnings would not save a quarter of the tokens, and for models
        that cannot read after a gap.
        """
        if not self._takes_positions or self.window < begin + 2 * max(map(len, rests)):
            return []
        groups: list[_Group] = []
        for rest in rests:
            if groups:
                size, members = groups[-1]
                before = rests[sum(group.members for group in groups) - 1]
                # What decides a verdict is after it, in each row.
                most = min(len(before), len(rest)) - count
                shared = min(_shared(before, rest), most)
                shared = min(shared, size) if members > 1 else shared
                # A shorter beginning for one more row, if that saves more than a new group.
                if shared >= LEAST_SHARED and shared * members > size * (members - 1):
                    groups[-1] = _Group(shared, members + 1)
                    continue
            groups.append(_Group(0, 1))
        sizes = [group.size for group in groups for _ in range(group.members)]
        tails = [len(rest) - size for rest, size in zip(rests, sizes, strict=True)]
        grouped = len(groups) * max(sizes) + len(rests) * max(tails)
        return groups if grouped <= 0.75 * len(rests) * max(map(len, rests)) else []

    def _grouped_logits(
        self, rests: Sequence[list[int]], groups: Sequence[_Group], count: int, prefix: Prefix
    ) -> Float[Tensor, "rows count vocab"]:
        """Run what each group begins with once, and its rows after that."""
        cache = prefix.repeated(len(groups))
        index = [n for n, group in enumerate(groups) for _ in range(group.members)]
        first = [index.index(n) for n in range(len(groups))]
        heads = [rests[row][: group.size] for row, group in zip(first, groups, strict=True)]
        self._logits(heads, 1, cache)
        cache.batch_select_indices(torch.tensor(index, device=self.model.device))
        sizes = torch.tensor([groups[n].size for n in index])[:, None]
        tails = [rest[groups[n].size :] for rest, n in zip(rests, index, strict=True)]
        width, begin = max(map(len, tails)), len(prefix.ids)
        is_head = torch.arange(int(sizes.max())) < sizes  # heads are padded on the right
        ones = torch.ones(len(rests), begin + width, dtype=torch.long)
        mask = torch.cat([ones[:, :begin], is_head.long(), ones[:, begin:]], dim=1)
        return self._logits(tails, count, cache, mask, begin + sizes + torch.arange(width))

    def _logits(
        self,
        rows: Sequence[list[int]],
        count: int,
        cache: DynamicCache | None,
        mask: Int[Tensor, "rows columns"] | None = None,
        positions: Int[Tensor, "rows seq"] | None = None,
    ) -> Float[Tensor, "rows count vocab"]:
        """Run rows that are padded on the right, where causal attention does not see it."""
        ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, self.pad)
        self.tokens_run += ids.numel()
        lengths = torch.tensor([[len(row)] for row in rows])
        places = (lengths - count + torch.arange(count)).clamp(min=0)  # (rows, count)
        given: dict[str, Any] = {} if cache is None else {str(self._cache_name): cache}
        device = self.model.device
        if mask is not None and positions is not None:
            given |= {"attention_mask": mask.to(device), "position_ids": positions.to(device)}
        with _states_at(self.head, places):
            output: Any = self.model(input_ids=ids.to(device), use_cache=cache is not None, **given)
        assert output.logits.shape[1] == count, f"{output.logits.shape} are logits of other places"
        return output.logits

    @torch.no_grad()
    def continuations(
        self, rows: Sequence[list[int]], num_tokens: int, prefix: Prefix
    ) -> list[list[int]]:
        """Generate the most likely tokens after each row, up to a stop token or ``num_tokens``.

        Rows are padded on the left, with the shared beginning before the padding: to layers with a
        short window the padding would then be part of the text, so these run the rows as a whole.

        Raises:
            UserError: The model's logits are not finite.
        """
        total = max(map(len, rows)) + num_tokens
        shares = prefix.begins(rows) and self._takes_positions and self.window >= total
        begin = len(prefix.ids) if shares else 0
        ids, mask = pad_left([row[begin:] for row in rows], self.pad)
        given: dict[str, Any] = {}
        if shares:
            beginning = torch.tensor(prefix.ids).expand(len(rows), -1)
            ids = torch.cat([beginning, ids], 1)
            mask = torch.cat([torch.ones_like(beginning), mask], 1)
            given[str(self._cache_name)] = prefix.repeated(len(rows))
        device = self.model.device
        with plainly(self.model):
            made: Any = self.model.generate(  # pyright: ignore[reportCallIssue]
                ids.to(device), attention_mask=mask.to(device),
                generation_config=GenerationConfig(
                    max_new_tokens=num_tokens, do_sample=False, use_cache=True,
                    pad_token_id=self.pad, eos_token_id=self.stops or None,
                ),
                logits_processor=refuse_not_finite(), **given,
            )  # fmt: skip
        new: Int[Tensor, "rows new"] = made[:, ids.shape[1] :]
        self.tokens_run += made.numel() - begin * len(rows)
        return [_until(row, self.stops) for row in new.tolist()]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _until(tokens: list[int], stops: Sequence[int]) -> list[int]:
    end = next((n for n, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


@contextmanager
def _states_at(head: torch.nn.Module, places: Int[Tensor, "rows count"]) -> Iterator[None]:
    """Have the output layer see the states of these places of each row alone, while entered."""

    def pick(_: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = given  # (rows, seq, width)
        rows = torch.arange(len(states), device=states.device).unsqueeze(1)
        return (states[rows, places.to(states.device)], *others)

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
