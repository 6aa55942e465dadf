"""The learning phase of a step, some blocks at a time.

Blocks at different positions meet nowhere but in the text that they look back at. So the text runs
once, with its graph; then every group of blocks runs forward *and backward* before the next one,
against the text's keys, values and states as if they were constants, and what flows back to these
is summed. One backward pass through the text ends the step. The gradient is that of all blocks at
once, no forward pass is repeated, and never more than one group's activations are alive.

The groups' backward passes run inside the model's forward (`torch.autograd.grad`) and are handed
out in its backward, as the gradients of one function of all that trains: whoever watches
parameters get their gradients (DDP, ZeRO-1 and -2) sees them come once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from quietstar.attention.layout import (
    IGNORE_INDEX,
    TextAhead,
    lookahead_targets,
    shifted,
)
from quietstar.attention.precision import at_least_float32
from quietstar.backbone.learn import BlockInputs, block_pass, embed_blocks, make_blocks
from quietstar.backbone.run import num_virtual
from quietstar.errors import UserError
from quietstar.losses.mixture import groups
from quietstar.losses.quiet_star import (
    ThoughtLoss,
    count_thought_items,
    next_token_loss,
    thought_loss,
)
from quietstar.losses.scores import ScoredThoughts, ThoughtResults, score
from quietstar.model.gradient_sums import Source, Weights
from quietstar.model.parts import ThinkingParts
from quietstar.sampling.positions import on_host
from quietstar.sampling.rollout import TextRun

AUTO_BLOCK_TOKENS = {"cpu": 5120, "cuda": 16384}
"""Tokens of thoughts that learn at once, by kind of device (docs/performance.md)."""
CHECKPOINTED_BLOCK_TOKENS = {"cpu": 4096, "cuda": 16384}
"""The same where activation checkpointing says that memory counts."""


def resolve_block_tokens(
    setting: int | str | None, device: str, in_pieces: bool, checkpointing: bool = False
) -> int | None:
    """``training.learn_chunk_tokens`` as a number, or None for all at once.

    Args:
        setting: Of the config.
        device: Kind of device.
        in_pieces: Whether an engine holds the weights in pieces: it gathers them for one backward
            pass, and cannot for one that runs inside the forward pass.
        checkpointing: Whether activations are recomputed.

    Raises:
        UserError: A number, where weights lie in pieces.
    """
    if setting == "auto":
        by_device = CHECKPOINTED_BLOCK_TOKENS if checkpointing else AUTO_BLOCK_TOKENS
        return None if in_pieces else by_device.get(device, by_device["cuda"])
    if setting is not None and in_pieces:
        raise UserError(
            f"training.learn_chunk_tokens: {setting} cannot be used where "
            "weights lie in pieces (ZeRO-3, "
            "FSDP2). Set training.learn_chunk_tokens: null, or launch with "
            "configs/accelerate/zero2.yaml."
        )
    assert not isinstance(setting, str), "the config was validated"
    return setting


@dataclass(frozen=True)
class Step:
    """What a learning phase is about.

    Attributes:
        input_ids: Texts, padded on the right if at all.
        labels: Token ids, IGNORE_INDEX where a token is no target.
        thoughts: Sampled tokens.
        positions: Where the thoughts are, None for all.
        num_items: N; by default the valid targets of this batch.
        num_thought_items: M; by default those behind a thought.
        policy_temperature: Inside the log-probability of the policy term.
        fixed_mixing_weight: Stands in for the head's output.
    """

    input_ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    thoughts: Int[Tensor, "length thoughts batch positions"]
    positions: Int[Tensor, "batch positions"] | None
    num_items: Tensor | int | None
    num_thought_items: Tensor | int | None
    policy_temperature: float
    fixed_mixing_weight: float | None


def learn_in_groups(
    model: ThinkingParts, text: TextRun, step: Step, block_tokens: int
) -> tuple[Tensor, ScoredThoughts]:
    """Loss of one (micro-)batch and its thoughts scored, as `quiet_star_loss` of all blocks.

    Args:
        model: That learns.
        text: Its run of the texts, with graph.
        step: Texts, thoughts, counts.
        block_tokens: Most tokens of blocks at once; at least those of one position.
    """
    work = _Groups(model, text, step, block_tokens)
    text_loss, base, _ = next_token_loss(
        text.states, step.labels, work.head, step.num_items,
        weight=model.loss.base_weight, sink=work.weights.sink,
    )  # fmt: skip
    loss = _InGroups.apply(work, *work.inputs)
    scored = score(
        work.results.whole(), base, step.thoughts, step.labels, work.targets, step.positions
    )
    return text_loss + loss, scored


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

    def __init__(self, model: ThinkingParts, text: TextRun, step: Step, block_tokens: int) -> None:
        self.model, self.step, self.head = model, step, model.output_head
        self.wanted = torch.is_grad_enabled()
        lookahead, positions = model.thoughts.lookahead, step.positions
        self.targets = lookahead_targets(step.labels, lookahead, positions)
        count = count_thought_items(self.targets, step.num_items, step.num_thought_items, positions)
        self.settings = ThoughtLoss(model.loss, step.policy_temperature, count)
        inputs = embed_blocks(
            model.causal_lm, model.start_embedding, model.end_embedding,
            step.input_ids, step.thoughts, lookahead, positions,
        )  # fmt: skip
        self.block_inputs = [Source(x, self.wanted) for x in inputs.tensors]
        self.states = Source(text.states, self.wanted)
        self.layers = list(text.keys)
        self.keys = [Source(x, self.wanted) for pair in text.keys.values() for x in pair]
        self.weights = Weights(model, self.head, self.wanted)
        self.results = _Results()
        length, num_thoughts, batch_size, num_positions = step.thoughts.shape
        each = 1 + num_thoughts * (length + lookahead)  # the start token is shared
        self.parts = list(groups(batch_size, num_positions, max(1, block_tokens // each)))

    @property
    def _sources(self) -> list[Source]:
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
        with torch.set_grad_enabled(self.wanted):
            reads, loss, found = self._forward(texts, places)
        self.results.put(found, self.step.thoughts, texts, places)
        if self.wanted:
            self._backward(loss, reads)
        return loss.detach()

    def _forward(
        self, texts: slice, places: slice
    ) -> tuple[list[tuple[Source, Any, Tensor]], Tensor, ThoughtResults]:
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
            ahead = TextAhead.at_neighbours(states, lookahead, 0, places.stop - places.start)
        else:
            state_index = (texts,)
            states = self.states.part(state_index)
            ahead = TextAhead.at_chosen(states, lookahead, where)
        reads.append((self.states, state_index, states))
        blocks = make_blocks(
            inputs, places, end, virtual, None if where is None else shifted(where, virtual)
        )
        found = block_pass(model.causal_lm, inputs, by_layer, blocks, self.num_positions(virtual))
        weight = model.mixing_weight(ahead, found.ahead, step.fixed_mixing_weight)
        loss, results = thought_loss(
            found.policy, found.ahead, ahead, weight, step.thoughts[..., texts, places],
            self.targets[:, texts, places], self.head, self.settings, self.weights.sink,
        )  # fmt: skip
        return reads, loss, results

    def num_positions(self, virtual: int) -> int:
        """Highest position of any block token of the step, plus one."""
        length = self.step.thoughts.shape[0] + self.model.thoughts.lookahead + 1
        return virtual + self.step.input_ids.shape[1] + length

    def _end(self, where: Tensor | None, places: slice) -> int:
        """Text tokens that the group can see."""
        if where is None:
            return places.stop
        # Where no text has a position, all of them are below zero.
        return max(1, int(where.max()) + 1) if on_host(where) else self.step.input_ids.shape[1]

    def _backward(self, loss: Tensor, reads: list[tuple[Source, Any, Tensor]]) -> None:
        reads = [read for read in reads if read[2].requires_grad]
        inputs = [*(part for _, _, part in reads), *self.weights.in_graph]
        with torch.autocast(loss.device.type, enabled=False):  # backward never runs under it
            grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        for (source, index, _), grad in zip(reads, grads, strict=False):
            source.add(index, grad)
        self.weights.add(grads[len(reads) :])


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
