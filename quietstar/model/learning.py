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

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from quietstar.attention.kernels import at_least_float32
from quietstar.attention.layout import (
    IGNORE_INDEX,
    OnHost,
    early_ends,
    lookahead_states,
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
from quietstar.losses.cross_entropy import HeadGradients, SoftTargets, WithGradients
from quietstar.losses.distillation import TeacherTargets
from quietstar.losses.mixture import groups, packed_groups
from quietstar.losses.thought_loss import (
    ScoredThoughts,
    ThoughtResults,
    count_thought_items,
    loss_from_states,
    next_token_loss,
    score,
    thought_loss,
)
from quietstar.losses.weights import LossTerms
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
        may_end_early: Whether thoughts can be shorter than others.
        running: As in `ThoughtScores`.
        seed: Seed of the step's noise.
        teacher: What a teacher predicts after these positions; None without one.
        places: The positions in the host's memory; None where it does not know them.
    """

    thoughts: ThoughtBatch
    positions: Tensor | None
    terms: LossTerms
    num_items: Tensor | int | None = None
    num_thought_items: Tensor | int | None = None
    fixed_mixing_weight: float | None = None
    may_end_early: bool = True
    running: Tensor | None = None
    seed: int = 0
    teacher: TeacherTargets | None = None
    places: np.ndarray | None = None

    @property
    def soft(self) -> SoftTargets | None:
        """Distributions of the teacher, (A, B, P, ...)."""
        if self.teacher is None:
            return None
        t = self.teacher
        return SoftTargets(*(x.movedim(2, 0) for x in (t.tokens, t.logprobs, t.rest)))

    @property
    def drawn(self) -> Tensor | None:
        """Log-probabilities of the thought tokens by the policy that drew them, (T, K, B, P)."""
        return self._token_major(self.thoughts.sampling_logprobs)

    @property
    def reference(self) -> Tensor | None:
        """The same by the reference."""
        return self._token_major(self.thoughts.reference_logprobs)

    def _token_major(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else rearrange(x, "b p k t -> t k b p")


def learn(model: Any, text: TextRun, step: Step) -> tuple[Tensor, ScoredThoughts]:
    """Compute the loss of one (micro-)batch, and score its thoughts.

    Blocks learn in groups of ``model.learn_chunk_tokens`` tokens at most (at least those of one
    position); in one group with an ordinary graph if that is None.

    Args:
        model: Model that learns.
        text: Run of the texts, with graph.
        step: Thoughts, terms, counts.
    """
    batch = step.thoughts
    tokens, labels = batch.token_major(), batch.labels
    lengths = early_ends(tokens) if step.may_end_early else None
    known = None
    if step.positions is not None or lengths is not None:
        is_read = lengths is not None or is_packed(step.positions, model.block_length)
        if is_read or on_host(tokens):  # else nothing is laid out by what the host knows
            known = OnHost.read(step.positions, lengths, step.places)
    targets = lookahead_targets(labels, model.thoughts.lookahead, step.positions)
    if model.learn_chunk_tokens is None or not torch.is_grad_enabled():
        states, weight = model.states_with(
            batch.input_ids, tokens, step.positions, step.fixed_mixing_weight, text=text,
            ends=(lengths, known),
        )  # fmt: skip
        return loss_from_states(
            states, weight, tokens, labels, model.output_head, step.terms, step.num_items,
            step.positions, step.num_thought_items, _token_rows(known, tokens, targets),
            drawn=step.drawn, reference=step.reference, soft=step.soft,
        )  # fmt: skip
    work = _Groups(model, text, step, tokens, targets, lengths, known)
    inputs = [*(source.x for source in work.sources), *work.weights.parameters]
    loss = WithGradients.apply(work.run, *inputs)
    results = ThoughtResults(**work.results)  # pyright: ignore[reportArgumentType]
    scored = score(results, work.base, tokens, labels, work.targets, step.positions)
    return work.text_loss + loss, scored


class _Groups:
    """The groups of a step, and what they give."""

    def __init__(
        self, model: Any, text: TextRun, step: Step, tokens: Tensor, targets: Tensor,
        lengths: Tensor | None, known: OnHost | None,
    ) -> None:  # fmt: skip
        self.targets, self.lengths, self.known = targets, lengths, known
        self.model, self.step, self.tokens, self.head = model, step, tokens, model.output_head
        batch, positions, lookahead = step.thoughts, step.positions, model.thoughts.lookahead
        self.weights = _Weights(model, self.head)
        self.num_items = count_thought_items(self.targets, step.num_thought_items)
        self.text_loss, self.base, _ = next_token_loss(
            text.states, batch.labels, self.head, step.num_items, step.terms.scoring,
            step.terms.base_weight, self.weights.accumulator,
        )  # fmt: skip
        text_nll = self.base.nll.view(batch.labels.shape)
        self.base_nll = lookahead_states(text_nll, lookahead, positions)
        inputs = embed_blocks(
            model.causal_lm, model.start_vectors, model.end_vectors,
            batch.input_ids, tokens, lookahead, positions, self.lengths,
        )  # fmt: skip
        self.num_start, self.layers = len(inputs.start), list(text.keys)
        self.block_length = self.num_start + len(tokens) + len(inputs.end) + len(inputs.true)
        keys = [x for pair in text.keys.values() for x in pair]
        blocks = (inputs.start, inputs.end, inputs.thought, inputs.true)
        self.sources = [_Source(x) for x in (*blocks, text.states, *keys)]
        self.results: dict[str, Tensor | None] = {}  # of all positions; zeros where no group was

    def run(self, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """Forward and backward of all groups: their loss and its gradients."""
        parts = []
        for texts, places in self._cut():
            stop = places.stop
            if on_host(self.targets):  # what lies after the last target need not run
                some = (self.targets[0, texts, places] != IGNORE_INDEX).any(0).nonzero()
                stop = places.start + int(some.max()) + 1 if len(some) else places.start
            if stop > places.start:
                parts.append((texts, slice(places.start, stop)))
        total = self.text_loss.new_zeros(())
        # Without any target, one position gives the results their shapes.
        for texts, places in worth_running(parts or [(slice(0, 1), slice(0, 1))], self.targets):
            total = total + self._group(texts, places)
        sums = (None if s.grad is None else s.grad.to(s.x.dtype) for s in self.sources)
        return total, [*sums, *self.weights.totals(self.head)]

    def _cut(self) -> Iterator[tuple[slice, slice]]:
        """Cut texts and positions into groups of about as many tokens as may learn at once."""
        most, (length, num_thoughts) = self.model.learn_chunk_tokens, self.tokens.shape[:2]
        shape = (self.tokens.shape[2], self.tokens.shape[3])
        behind = self.block_length - self.num_start - length
        # What opens thoughts is shared.
        each = self.num_start + num_thoughts * (length + behind)
        self.num_tokens = np.full(shape, each)
        if not is_packed(self.step.positions, self.block_length):
            return groups(*shape, max(1, most // each))
        if self.known is not None and self.known.lengths is not None:
            self.num_tokens = self.num_start + (self.known.lengths + behind).sum(0)
        elif self.lengths is not None:
            # Only planned: thoughts that end early fill their groups.
            most = round(most / each) * each
        return packed_groups(self.num_tokens.tolist(), most)

    def _group(self, texts: slice, places: slice) -> Tensor:
        """Forward and backward of one group; its loss."""
        # The thoughts of one position learn together: where these are too many tokens, layers keep
        # what they are given only.
        is_large = self.num_tokens[texts, places].max() > self.model.learn_chunk_tokens
        memory = recomputing(self.model.causal_lm) if is_large else nullcontext()
        with torch.enable_grad(), memory:  # forward of an autograd function runs without
            reads, loss, results = self._forward(texts, places)
        for name, part in vars(results).items():
            if part is None:
                self.results[name] = None
                continue
            whole = self.results.get(name)
            if whole is None:
                whole = part.new_zeros(*part.shape[:-2], *self.tokens.shape[-2:])
                self.results[name] = whole
            whole[..., texts, places] = part
        reads = [read for read in reads if read[2].requires_grad]
        inputs = [*(part for _, _, part in reads), *self.weights.in_graph]
        with torch.autocast(loss.device.type, enabled=False):  # backward never runs under it
            grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        for (source, index, _), grad in zip(reads, grads, strict=False):
            if grad is not None and source.grad is not None:
                source.grad[index] += grad
        self.weights.add(grads[len(reads) :])
        return loss.detach()

    def _forward(
        self, texts: slice, places: slice
    ) -> tuple[list[tuple[_Source, Any, Tensor]], Tensor, ThoughtResults]:
        """What the group reads (source, index, leaf), its loss, and its results."""
        model, step, lookahead = self.model, self.step, len(self.targets)
        text_length = step.thoughts.input_ids.shape[1]
        positions = None if step.positions is None else step.positions[texts, places]
        known = None if self.known is None else self.known.part(texts, places)
        end, state_index = text_length, (texts,)  # of the text tokens that the group can see
        if positions is None:
            end = places.stop
            state_index = (texts, slice(places.start, places.stop + lookahead - 1))
        elif known is not None and known.positions is not None:
            end = max(1, int(known.positions.max()) + 1)  # below zero where no text has one
        block_index = (..., texts, places, slice(None))
        key_index = (texts, slice(None), slice(0, num_virtual(model.causal_lm) + end))
        indices = [..., ..., block_index, block_index, state_index]
        indices += [key_index] * (2 * len(self.layers))
        reads = [(s, i, s.part(i)) for s, i in zip(self.sources, indices, strict=True)]
        start, end_token, thought, true, text_states, *keys = (part for _, _, part in reads)
        lengths = None if self.lengths is None else self.lengths[:, texts, places]
        inputs = BlockInputs(start, end_token, thought, true, positions, lengths, known)
        pairs = zip(keys[::2], keys[1::2], strict=True)
        policy, ahead = block_pass(
            model.causal_lm, inputs, dict(zip(self.layers, pairs, strict=True)), text_length,
            places.start,
        )  # fmt: skip
        count = places.stop - places.start
        text = text_lookahead(text_states, lookahead, positions, count)
        weight = model.mixing_head(text, ahead, step.fixed_mixing_weight)
        weigh = model.weigher(step.thoughts.part(texts, places), step.running, step.seed)
        drawn, reference = (
            None if x is None else x[..., texts, places] for x in (step.drawn, step.reference)
        )
        tokens, targets = self.tokens[..., texts, places], self.targets[:, texts, places]
        loss, results = thought_loss(
            policy, ahead, text, weight, tokens, targets, self.base_nll[:, texts, places],
            self.head, replace(step.terms, weigh=weigh), self.num_items, self.weights.accumulator,
            _token_rows(known, tokens, targets), drawn=drawn, reference=reference,
            soft=None if step.soft is None else step.soft.part((slice(None), texts, places)),
        )  # fmt: skip
        return reads, loss, results


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

    def __init__(self, x: Tensor) -> None:
        self.x = x
        wide = at_least_float32(x.new_zeros(())).dtype
        self.grad = torch.zeros_like(x, dtype=wide) if x.requires_grad else None

    def part(self, index: Any) -> Tensor:
        """Make a leaf with the content of a part."""
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
