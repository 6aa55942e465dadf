"""The learning phase of a step: blocks of thoughts against the run of their texts.

Thoughts at different positions interact only through the shared text. So the text runs once, with
its graph, and blocks run against its keys, values and states: in one group with an ordinary graph,
or in many, where every group runs forward *and backward* before the next one, as if text keys,
values and states were constants, and what flows back to these is summed. One backward pass through
the text ends the step. The gradient is that of one group, no forward pass is repeated, and never
more than one group's activations are alive.

The groups' backward passes run inside the model's forward (`torch.autograd.grad`) and are handed
out in its backward, as the gradients of one function of all that trains: gradient hooks (DDP,
ZeRO-1/2) fire once per parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from quietstar.attention.kernels import at_least_float32
from quietstar.attention.layout import (
    IGNORE_INDEX,
    TextLookahead,
    lookahead_states,
    lookahead_targets,
    on_host,
    shifted,
)
from quietstar.backbone.output_head import OutputHead
from quietstar.backbone.run import TextRun, num_virtual
from quietstar.backbone.teacher_forced import (
    BlockInputs,
    block_pass,
    embed_blocks,
    make_blocks,
)
from quietstar.errors import UserError
from quietstar.losses.cross_entropy import HeadGradients
from quietstar.losses.mixture import groups
from quietstar.losses.scores import ScoredThoughts, ThoughtResults, score
from quietstar.losses.thought_loss import (
    LossTerms,
    count_thought_items,
    loss_from_states,
    next_token_loss,
    thought_loss,
)
from quietstar.losses.weights import ThoughtScores, ThoughtWeights, Weigh
from quietstar.sampling.thoughts import ThoughtBatch

AUTO_CHUNK_TOKENS = {"cpu": 5120, "cuda": 16384}
"""Tokens of thoughts that learn at once, by kind of device (docs/performance.md)."""
CHECKPOINTED_CHUNK_TOKENS = {"cpu": 4096, "cuda": 16384}
"""The same where activation checkpointing says that memory counts."""


def resolve_chunk_tokens(
    setting: int | str | None, device: str, sharded: bool, checkpointing: bool = False
) -> int | None:
    """Resolve ``training.learn_chunk_tokens`` to a number, or None for all at once.

    Args:
        setting: Setting of the config.
        device: Kind of device.
        sharded: Whether the strategy shards the weights: it gathers them for one backward
            pass, and cannot for one that runs inside the forward pass.
        checkpointing: Whether activations are recomputed.

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


@dataclass(frozen=True)
class Step:
    """What a learning phase is about.

    Attributes:
        thoughts: Texts and their thoughts.
        positions: Positions of the thoughts, None for all.
        terms: Terms of the loss.
        num_items: N; by default the valid targets of this batch.
        num_thought_items: M; by default the positions of this batch with a target.
        fixed_mixing_weight: Replacement for the head's output.
    """

    thoughts: ThoughtBatch
    positions: Tensor | None
    terms: LossTerms
    num_items: Tensor | int | None = None
    num_thought_items: Tensor | int | None = None
    fixed_mixing_weight: float | None = None


def learn(
    model: Any, text: TextRun, step: Step, chunk_tokens: int | None
) -> tuple[Tensor, ScoredThoughts]:
    """Compute the loss of one (micro-)batch, and score its thoughts.

    Args:
        model: Model that learns.
        text: Run of the texts, with graph.
        step: Thoughts, terms, counts.
        chunk_tokens: Most tokens of blocks at once (at least those of one position are); None for
            one group with an ordinary graph.
    """
    batch = step.thoughts
    tokens, labels = batch.token_major(), batch.labels
    if chunk_tokens is None or not torch.is_grad_enabled():
        states, weight = model.states_with(
            batch.input_ids, tokens, step.positions, step.fixed_mixing_weight, text=text
        )
        return loss_from_states(
            states, weight, tokens, labels, model.output_head, step.terms, step.num_items,
            step.positions, step.num_thought_items,
        )  # fmt: skip
    work = _Groups(model, text, step, tokens, chunk_tokens)
    loss = _InGroups.apply(work, *work.inputs)
    scored = score(work.results.whole(), work.base, tokens, labels, work.targets, step.positions)
    return work.text_loss + loss, scored


class _InGroups(torch.autograd.Function):
    """All groups forward and backward in the forward pass."""

    @staticmethod
    def forward(ctx, work, *inputs):
        value = work.run()
        ctx.grads = work.gradients()
        return value

    @staticmethod
    def backward(ctx, grad_value):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.grads is None:
            raise RuntimeError(
                "backward through the loss a second time: its gradients were used up by the "
                "first. Call the model again."
            )
        grads, ctx.grads = ctx.grads, None
        if on_host(grad_value) and grad_value == 1:  # known without waiting
            return None, *grads
        return None, *[None if g is None else g.mul_(grad_value.to(g.dtype)) for g in grads]


class _Groups:
    """The groups of a step, and what they give."""

    def __init__(
        self,
        model: Any,
        text: TextRun,
        step: Step,
        tokens: Tensor,
        chunk_tokens: int,
    ) -> None:
        self.model, self.step, self.tokens, self.head = model, step, tokens, model.output_head
        batch, positions = step.thoughts, step.positions
        lookahead = model.thoughts.lookahead
        self.weights = _Weights(model, self.head)
        self.targets = lookahead_targets(batch.labels, lookahead, positions)
        self.num_items = count_thought_items(self.targets, step.num_thought_items)
        self.text_loss, self.base, _ = next_token_loss(
            text.states, batch.labels, self.head, step.num_items, step.terms.scoring,
            step.terms.base_weight, self.weights.accumulator,
        )  # fmt: skip
        text_nll = self.base.nll.view(batch.labels.shape)
        self.base_nll = lookahead_states(text_nll, lookahead, positions)
        inputs = embed_blocks(
            model.causal_lm, model.start_embedding, model.end_embedding,
            batch.input_ids, tokens, lookahead, positions,
        )  # fmt: skip
        self.block_inputs = [_Source(x) for x in inputs.tensors]
        self.states = _Source(text.states)
        self.layers = list(text.keys)
        self.keys = [_Source(x) for pair in text.keys.values() for x in pair]
        self.results = _Results()
        length, num_thoughts, batch_size, num_positions = tokens.shape
        each = 1 + num_thoughts * (length + lookahead)  # the start token is shared
        self.parts = list(groups(batch_size, num_positions, max(1, chunk_tokens // each)))

    @property
    def _sources(self) -> list[_Source]:
        return [*self.block_inputs, self.states, *self.keys]

    @property
    def inputs(self) -> list[Tensor]:
        """Everything that gets a gradient, or might."""
        return [*(source.x for source in self._sources), *self.weights.parameters]

    def gradients(self) -> list[Tensor | None]:
        """Of ``inputs``."""
        return [*(source.total() for source in self._sources), *self.weights.totals(self.head)]

    def run(self) -> Tensor:
        """The loss of all groups."""
        total = at_least_float32(self.states.x.new_zeros(()))
        wanted = [(texts, self._with_targets(texts, places)) for texts, places in self.parts]
        wanted = [(texts, places) for texts, places in wanted if places.start < places.stop]
        if not wanted:  # no target at all: one position gives the results their shapes
            texts, places = self.parts[0]
            wanted = [(texts, slice(places.start, places.start + 1))]
        for texts, places in wanted:
            total = total + self._group(texts, places)
        return total

    def _with_targets(self, texts: slice, places: slice) -> slice:
        """Without the places at the end behind which no text has a target, where that is known."""
        if not on_host(self.targets):
            return places
        some = (self.targets[0, texts, places] != IGNORE_INDEX).any(0).nonzero()
        return slice(
            places.start, places.start + int(some.max()) + 1 if len(some) else places.start
        )

    def _group(self, texts: slice, places: slice) -> Tensor:
        """Forward and backward of one group; its loss."""
        with torch.enable_grad():  # forward of an autograd function runs without
            reads, loss, results = self._forward(texts, places)
        self.results.put(results, self.tokens, texts, places)
        self._backward(loss, reads)
        return loss.detach()

    def _forward(
        self, texts: slice, places: slice
    ) -> tuple[list[tuple[_Source, Any, Tensor]], Tensor, ThoughtResults]:
        model, step = self.model, self.step
        lookahead, virtual = model.thoughts.lookahead, num_virtual(model.causal_lm)
        where = None if step.positions is None else step.positions[texts, places]
        end = virtual + self._end(where, places)
        reads = [
            (source, index := BlockInputs.index(n, texts, places), source.part(index))
            for n, source in enumerate(self.block_inputs)
        ]
        inputs = BlockInputs(*[part for _, _, part in reads])
        key_index = (texts, slice(None), slice(0, end))
        keys = [source.part(key_index) for source in self.keys]
        reads += [(source, key_index, k) for source, k in zip(self.keys, keys, strict=True)]
        by_layer = dict(zip(self.layers, zip(keys[::2], keys[1::2], strict=True), strict=True))
        if where is None:
            state_index = (texts, slice(places.start, places.stop + lookahead - 1))
            states = self.states.part(state_index)
            ahead = TextLookahead.contiguous_positions(
                states, lookahead, 0, places.stop - places.start
            )
        else:
            state_index = (texts,)
            states = self.states.part(state_index)
            ahead = TextLookahead.selected_positions(states, lookahead, where)
        reads.append((self.states, state_index, states))
        blocks = make_blocks(
            inputs, places, end, virtual, None if where is None else shifted(where, virtual)
        )
        length = step.thoughts.input_ids.shape[1] + len(self.tokens) + lookahead + 1
        states = block_pass(model.causal_lm, inputs, by_layer, blocks, virtual + length)
        weight = model.mixing_weight(ahead, states.ahead, step.fixed_mixing_weight)
        weigh = step.terms.weigh
        assert weigh is not None, "a step that learns weighs its thoughts"
        loss, results = thought_loss(
            states.policy, states.ahead, ahead, weight, self.tokens[..., texts, places],
            self.targets[:, texts, places], self.base_nll[:, texts, places], self.head,
            replace(step.terms, weigh=_of_part(weigh, texts, places)), self.num_items,
            self.weights.accumulator,
        )  # fmt: skip
        return reads, loss, results

    def _end(self, where: Tensor | None, places: slice) -> int:
        """Text tokens that the group can see."""
        if where is None:
            return places.stop
        # Where no text has a position, all of them are below zero.
        return (
            max(1, int(where.max()) + 1)
            if on_host(where)
            else self.step.thoughts.input_ids.shape[1]
        )

    def _backward(self, loss: Tensor, reads: list[tuple[_Source, Any, Tensor]]) -> None:
        reads = [read for read in reads if read[2].requires_grad]
        inputs = [*(part for _, _, part in reads), *self.weights.in_graph]
        with torch.autocast(loss.device.type, enabled=False):  # backward never runs under it
            grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        for (source, index, _), grad in zip(reads, grads, strict=False):
            source.add(index, grad)
        self.weights.add(grads[len(reads) :])


def _of_part(weigh: Weigh, texts: slice, places: slice) -> Weigh:
    """Weigh texts and places that are counted within a part of the batch."""

    def inner(scores: ThoughtScores, some: slice, where: slice) -> ThoughtWeights:
        first_text, first_place = texts.start, places.start
        return weigh(
            scores,
            slice(first_text + some.start, first_text + some.stop),
            slice(first_place + where.start, first_place + where.stop),
        )

    return inner


class _Results:
    """The groups' results, put together."""

    def __init__(self) -> None:
        self._whole: dict[str, Tensor | None] = {}

    def put(self, found: ThoughtResults, like: Tensor, texts: slice, places: slice) -> None:
        """Those of one group; ``like`` has the batch and all positions last."""
        for field in fields(found):
            part = getattr(found, field.name)
            if part is None:
                self._whole[field.name] = None
                continue
            whole = self._whole.get(field.name)
            if whole is None:
                whole = part.new_zeros(*part.shape[:-2], *like.shape[-2:])
                self._whole[field.name] = whole
            whole[..., texts, places] = part

    def whole(self) -> ThoughtResults:
        """Of all positions; zeros where no group was."""
        return ThoughtResults(**self._whole)  # pyright: ignore[reportArgumentType]


# --- Sums over groups -----------------------------------------------------------------------------


class _Source:
    """A tensor that groups read parts of, and the sum of what flows back to them.

    The sum is in float32 or wider, so that many groups lose nothing in half precisions.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        wide = at_least_float32(x.new_zeros(())).dtype
        self.grad = torch.zeros_like(x, dtype=wide) if x.requires_grad else None

    def part(self, where: Any = ...) -> Tensor:
        """Make a leaf with the content of a part."""
        return self.x.detach()[where].requires_grad_(self.grad is not None)

    def add(self, where: Any, grad: Tensor | None) -> None:
        """Add what flows back to a part."""
        if self.grad is not None and grad is not None:
            self.grad[where] += grad

    def total(self) -> Tensor | None:
        """Return the sum in the tensor's own type."""
        return None if self.grad is None else self.grad.to(self.x.dtype)


class _Weights:
    """The weights that train, but for the learned vectors, which are read outside of the groups."""

    def __init__(self, model: Any, head: OutputHead) -> None:
        vectors = (model.start_embedding, model.end_embedding)
        outside = {id(vector) for vector in vectors}
        self.parameters = [
            p for p in model.parameters() if p.requires_grad and id(p) not in outside
        ]
        self.accumulator = None
        if head.is_linear:
            bias = head.bias is not None and head.bias.requires_grad
            self.accumulator = HeadGradients(head, head.weight.requires_grad, bias)
        in_accumulator = {id(head.weight), id(head.bias)} if self.accumulator is not None else set()
        # The gradients of a linear head are collected by the losses, not by autograd.
        self.in_graph = [p for p in self.parameters if id(p) not in in_accumulator]
        self._grads: dict[int, Tensor] = {}

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one group's gradients of ``in_graph``."""
        for parameter, grad in zip(self.in_graph, grads, strict=True):
            if grad is None:
                continue
            total = self._grads.get(id(parameter))
            if total is None:
                # Its own: autograd may hand out one tensor twice.
                self._grads[id(parameter)] = at_least_float32(grad).clone()
            else:
                total.add_(grad)

    def totals(self, head: OutputHead) -> list[Tensor | None]:
        """Return the gradients of ``parameters`` in their own types."""
        totals = dict(self._grads)
        if self.accumulator is not None:
            pairs = zip((head.weight, head.bias), self.accumulator.totals(), strict=True)
            totals |= {id(p): grad for p, grad in pairs if p is not None and grad is not None}
        grads = [totals.get(id(p)) for p in self.parameters]
        return [
            None if g is None else g.to(p.dtype)
            for p, g in zip(self.parameters, grads, strict=True)
        ]
