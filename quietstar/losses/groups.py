"""Reading thoughts in groups, each of which learns before the next one is read.

Thoughts at different positions interact only through the shared text. So the text runs once, with
its graph, and blocks of thoughts run against its keys, values and states: in one group with an
ordinary graph, or in many, where every group runs forward *and backward* before the next one, as if
text keys, values and states were constants, and what flows back to these is summed. One backward
pass through the text ends the step. The gradient is that of one group, no forward pass is repeated,
and never more than one group's activations are alive.

The groups' backward passes run inside the model's forward (`torch.autograd.grad`) and are handed
out in its backward, as the gradients of one function of all that trains: gradient hooks (DDP,
ZeRO-1/2) fire once per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from quietstar.attention.kernels import at_least_float32
from quietstar.attention.layout import (
    IGNORE_INDEX,
    OnHost,
    early_ends,
    lookahead_targets,
    on_host,
    text_lookahead,
    to_device,
    worth_running,
)
from quietstar.backbone.output_head import OutputHead
from quietstar.backbone.run import TextRun, num_virtual, recomputing
from quietstar.backbone.teacher_forced import BlockInputs, block_pass, embed_blocks, is_packed
from quietstar.errors import UserError
from quietstar.losses.cross_entropy import HeadGradients, WithGradients
from quietstar.losses.predictions import groups, packed_groups
from quietstar.sampling.thoughts import ThoughtBatch

AUTO_CHUNK_TOKENS = {"cpu": 5120, "cuda": 16384}
"""Tokens of thoughts that learn at once, by kind of device (docs/performance.md)."""
CHECKPOINTED_CHUNK_TOKENS = {"cpu": 4096, "cuda": 16384}
"""The same where activation checkpointing says that memory counts."""


def resolve_chunk_tokens(
    setting: int | str | None, device: str, sharded: bool, checkpointing: bool = False
) -> int | None:
    """Resolve ``training.learn_chunk_tokens`` to a number, or None for all at once.

    A strategy that shards the weights gathers them for one backward pass, and cannot for one that
    runs inside the forward pass.

    Raises:
        UserError: A number, where weights are sharded.
    """
    if setting == "auto":
        by_device = CHECKPOINTED_CHUNK_TOKENS if checkpointing else AUTO_CHUNK_TOKENS
        return None if sharded else by_device.get(device, by_device["cuda"])
    if setting is not None and sharded:
        raise UserError(
            f"training.learn_chunk_tokens: {setting} cannot be used where weights are sharded "
            "(ZeRO-3, FSDP2). Set training.learn_chunk_tokens: null, or launch with "
            "configs/accelerate/zero2.yaml."
        )
    assert not isinstance(setting, str), "the config was validated"
    return setting


class Group:
    """Thoughts at some positions of some texts, and the states after them.

    Attributes:
        texts, places: Which texts, and which of their positions.
        tokens: Tokens of the thoughts, (T, K, B', P').
        targets: Ground-truth tokens after them, (A, B', P'), IGNORE_INDEX where there is none.
        policy: States that predict the thought tokens, (T, K, B', P', D).
        ahead: States after thoughts, from the last end token on, (A, K, B', P', D).
        text: The text's own states that predict the targets.
        mixing_weight: Share of the thought in each prediction, (A, K, B', P').
        rows: Those of the flat thoughts that have a token and a target; None for all.
    """

    def __init__(self, of: Groups, texts: slice, places: slice) -> None:
        self.texts, self.places = texts, places
        self.tokens, self.targets = of.tokens[..., texts, places], of.targets[:, texts, places]
        lookahead, count = len(of.targets), places.stop - places.start
        positions = None if of.positions is None else of.positions[texts, places]
        known = None if of.known is None else of.known.part(texts, places)
        end, state_index = of.text_length, (texts,)  # of the text tokens that the group can see
        if positions is None:
            end = places.stop
            state_index = (texts, slice(places.start, places.stop + lookahead - 1))
        elif known is not None and known.positions is not None:
            end = max(1, int(known.positions.max()) + 1)  # below zero where no text has one
        block_index = (..., texts, places, slice(None))
        key_index = (texts, slice(None), slice(0, num_virtual(of.model.causal_lm) + end))
        indices = [..., ..., block_index, block_index, state_index]
        indices += [key_index] * (2 * len(of.layers))
        self.reads = [(s, i, s.part(i)) for s, i in zip(of.sources, indices, strict=True)]
        start, end_token, thought, true, text_states, *keys = (part for _, _, part in self.reads)
        lengths = None if of.lengths is None else of.lengths[:, texts, places]
        inputs = BlockInputs(start, end_token, thought, true, positions, lengths, known)
        pairs = zip(keys[::2], keys[1::2], strict=True)
        # The thoughts of one position learn together: where these are too many tokens, layers keep
        # what they are given only.
        is_large = of.most is not None and of.num_tokens[texts, places].max() > of.most
        with recomputing(of.model.causal_lm) if is_large else nullcontext():
            self.policy, self.ahead = block_pass(
                of.model.causal_lm, inputs, dict(zip(of.layers, pairs, strict=True)),
                of.text_length, places.start,
            )  # fmt: skip
        self.text = text_lookahead(text_states, lookahead, positions, count)
        self.mixing_weight = of.model.mixing_head(self.text, self.ahead, of.fixed_mixing_weight)
        self.rows = _token_rows(known, self.tokens, self.targets)


class Groups:
    """The thoughts of a batch, read in groups of at most ``model.learn_chunk_tokens`` tokens.

    Iterate over the groups and call `learn` with the loss of each; then `loss` is that of all.
    Where the number is None, or without gradient, there is one group with an ordinary graph.

    Args:
        model: Model that learns.
        text: Run of the texts, with graph.
        batch: Texts and their thoughts.
        positions: Positions of the thoughts, None for all.
        lookahead: Ground-truth tokens after each thought.
        fixed_mixing_weight: Replacement for the head's output.
        may_end_early: Whether thoughts can be shorter than others.
        places: The positions in the host's memory; None where it does not know them.
    """

    def __init__(
        self,
        model: Any,
        text: TextRun,
        batch: ThoughtBatch,
        positions: Int[Tensor, "batch positions"] | None,
        lookahead: int,
        fixed_mixing_weight: float | None = None,
        may_end_early: bool = True,
        places: Int[np.ndarray, "batch positions"] | None = None,
    ) -> None:
        self.model, self.positions, self.fixed_mixing_weight = model, positions, fixed_mixing_weight
        self.tokens = tokens = batch.token_major()
        self.targets = lookahead_targets(batch.labels, lookahead, positions)
        self.lengths = early_ends(tokens) if may_end_early else None
        self.known = None
        if positions is not None or self.lengths is not None:
            is_read = self.lengths is not None or is_packed(positions, model.block_length)
            if is_read or on_host(tokens):  # else nothing is laid out by what the host knows
                self.known = OnHost.read(positions, self.lengths, places)
        self.most = model.learn_chunk_tokens if torch.is_grad_enabled() else None
        self.weights = None if self.most is None else _Weights(model, model.output_head)
        inputs = embed_blocks(
            model.causal_lm, model.start_vectors, model.end_vectors,
            batch.input_ids, tokens, lookahead, positions, self.lengths,
        )  # fmt: skip
        self.num_start, self.layers = len(inputs.start), list(text.keys)
        self.block_length = self.num_start + len(tokens) + len(inputs.end) + len(inputs.true)
        self.text_length = text.states.shape[1]
        keys = [x for pair in text.keys.values() for x in pair]
        blocks = (inputs.start, inputs.end, inputs.thought, inputs.true)
        sources = (*blocks, text.states, *keys)
        self.sources = [_Source(x, in_graph=self.most is None) for x in sources]
        self.total: Tensor = at_least_float32(text.states.new_zeros(()))

    @property
    def accumulator(self) -> HeadGradients | None:
        """What collects the gradients of a linear output head; None where autograd does."""
        return None if self.weights is None else self.weights.accumulator

    def __iter__(self) -> Iterator[Group]:
        """Read the groups one by one; a group must have learned before the next one is read."""
        parts = []
        for texts, places in self._cut():
            stop = places.stop
            if self.most is not None and on_host(self.targets):  # what is after the last target
                some = (self.targets[0, texts, places] != IGNORE_INDEX).any(0).nonzero()
                stop = places.start + int(some.max()) + 1 if len(some) else places.start
            if stop > places.start:
                parts.append((texts, slice(places.start, stop)))
        # Without any target, one position gives the results their shapes.
        for texts, places in worth_running(parts or [(slice(0, 1), slice(0, 1))], self.targets):
            group = Group(self, texts, places)
            yield group
            vars(group).clear()  # its activations go before those of the next come

    def _cut(self) -> Iterator[tuple[slice, slice]]:
        """Cut texts and positions into groups of about as many tokens as may learn at once."""
        length, num_thoughts, *shape = self.tokens.shape
        if self.most is None:
            return iter([(slice(0, shape[0]), slice(0, shape[1]))])
        most, after = self.most, self.block_length - self.num_start - length
        # What opens thoughts is shared.
        each = self.num_start + num_thoughts * (length + after)
        self.num_tokens = np.full(shape, each)
        if not is_packed(self.positions, self.block_length):
            return groups(shape[0], shape[1], max(1, most // each))
        if self.known is not None and self.known.lengths is not None:
            self.num_tokens = self.num_start + (self.known.lengths + after).sum(0)
        elif self.lengths is not None:
            # Only planned: thoughts that end early fill their groups.
            most = round(most / each) * each
        return packed_groups(self.num_tokens.tolist(), most)

    def learn(self, group: Group, loss: Float[Tensor, ""]) -> None:
        """Add the loss of a group; where there are many, run its backward pass now."""
        if self.weights is None:
            self.total = self.total + loss
            return
        reads = [read for read in group.reads if read[2].requires_grad]
        inputs = [*(part for _, _, part in reads), *self.weights.in_graph]
        with torch.autocast(loss.device.type, enabled=False):  # backward never runs under it
            grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        for (source, index, _), grad in zip(reads, grads, strict=False):
            if grad is not None and source.grad is not None:
                source.grad[index] += grad
        self.weights.add(grads[len(reads) :])
        self.total = self.total + loss.detach()

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The loss of all groups; its backward pass hands out what theirs have summed."""
        if self.weights is None:
            return self.total
        sums = (None if s.grad is None else s.grad.to(s.x.dtype) for s in self.sources)
        given = self.total, [*sums, *self.weights.totals(self.model.output_head)]
        inputs = [*(s.x for s in self.sources), *self.weights.parameters]
        return WithGradients.apply(lambda _: given, *inputs)  # pyright: ignore[reportReturnType]


def _token_rows(known: OnHost | None, tokens: Tensor, targets: Tensor) -> Tensor | None:
    """Rows of flat thoughts that have a token, and a target where the host sees it; None for all.

    Thoughts that end early have so many others that to leave these out pays.
    """
    if known is None or known.lengths is None:
        return None
    is_token = np.arange(len(tokens))[:, None, None, None] < known.lengths
    if on_host(targets):
        is_token &= (targets != IGNORE_INDEX).any(0).numpy()
    return to_device(np.flatnonzero(is_token), tokens.device)


# --- Sums over groups -----------------------------------------------------------------------------
class _Source:
    """A tensor that groups read parts of, and the sum of what flows back to them.

    The sum is in float32 or wider, so that many groups lose nothing in half precisions.
    """

    def __init__(self, x: Tensor, in_graph: bool) -> None:
        self.x, self.in_graph = x, in_graph
        wide, needs_sum = at_least_float32(x.new_zeros(())).dtype, x.requires_grad and not in_graph
        self.grad = torch.zeros_like(x, dtype=wide) if needs_sum else None

    def part(self, index: Any) -> Tensor:
        """Return a part: in the graph of the whole, or a leaf with its content."""
        if self.in_graph:
            return self.x[index]
        return self.x.detach()[index].requires_grad_(self.grad is not None)


class _Weights:
    """The weights that train, but for the learned vectors, which are read outside of the groups."""

    def __init__(self, model: Any, head: OutputHead) -> None:
        outside = {id(model.start_embedding), id(model.end_embedding)}
        parameters = (p for p in model.parameters() if p.requires_grad)
        self.parameters = [p for p in parameters if id(p) not in outside]
        self.accumulator, in_accumulator = None, set()
        if head.is_linear:  # its gradients are collected by the losses, not by autograd
            bias = head.bias is not None and head.bias.requires_grad
            self.accumulator = HeadGradients(head, head.weight.requires_grad, bias)
            in_accumulator = {id(head.weight), id(head.bias)}
        self.in_graph = [p for p in self.parameters if id(p) not in in_accumulator]
        self._grads: dict[int, Tensor] = {}

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one group's gradients of ``in_graph``."""
        for parameter, grad in zip(self.in_graph, grads, strict=True):
            total = self._grads.get(id(parameter))
            if total is not None and grad is not None:
                total.add_(grad)
            elif grad is not None:
                # Its own: autograd may hand out one tensor twice.
                self._grads[id(parameter)] = at_least_float32(grad).clone()

    def totals(self, head: OutputHead) -> list[Tensor | None]:
        """Return the gradients of ``parameters`` in their own types."""
        totals: dict[int, Tensor | None] = dict(self._grads)
        if self.accumulator is not None:
            totals[id(head.weight)], totals[id(head.bias)] = self.accumulator.totals()
        grads = [(p, totals.get(id(p))) for p in self.parameters]
        return [None if grad is None else grad.to(p.dtype) for p, grad in grads]
