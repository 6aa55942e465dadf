"""Cross entropies of the mixed prediction and of the thought's own, from logits made once.

Mixed logits are ``(1 - w) * base + w * thought``: with both at hand, the mixed prediction needs no
product with the output weight of its own, forward or backward. As in
`quietstar.losses.cross_entropy`, logits live a chunk at a time and gradients are computed with
them. A chunk holds *all* thoughts of its positions, so that what a target counts may depend on what
every thought of its position achieved: the log-probabilities are known before the gradient is made.
Letters: A lookahead, K thoughts, B texts, P positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from quietstar.attention.kernels import at_least_float32
from quietstar.attention.layout import IGNORE_INDEX, TextLookahead
from quietstar.backbone.output_head import OutputHead
from quietstar.losses.cross_entropy import (
    HeadGradients,
    Products,
    Segment,
    SoftmaxChunk,
    SoftTargets,
    chunk_rows,
    fused,
    recomputed_rows,
)
from quietstar.losses.weights import ThoughtScores, Weigh


@dataclass(frozen=True)
class Mixture:
    """Rows of the two predictions after thoughts, and what weighs them.

    Attributes:
        text: The text's own states that predict the same tokens.
        thought: States from the end token on.
        mixing_weight: Fraction of the thought in the mixed logits.
        targets: Token ids or IGNORE_INDEX, the same for all thoughts.
        base_nll: NLL of the targets without a thought; read by ``weigh``.
        num_items: M, the number that sums over positions are divided by.
        weigh: From scores to weights; without it only results are computed.
        log_ratio: As in `ThoughtScores`, (K, B, P); handed on to ``weigh``.
        sums_targets: Whether the weights of a thought's true tokens are summed, in place of their
            mean over the lookahead.
        needs_thought: Whether the thought's own prediction is computed.
        needs_predicted: Whether the most likely mixed token is found.
        soft: A teacher's distributions of the targets, (A, B, P, top) and (A, B, P): the weights of
            the mixed prediction are then of its divergence from them, in place of its NLL.
    """

    text: TextLookahead
    thought: Float[Tensor, "lookahead thoughts batch positions width"]
    mixing_weight: Float[Tensor, "lookahead thoughts batch positions"]
    targets: Int[Tensor, "lookahead batch positions"]
    base_nll: Float[Tensor, "lookahead batch positions"] | None = None
    num_items: Tensor | None = None
    weigh: Weigh | None = None
    log_ratio: Float[Tensor, "thoughts batch positions"] | None = None
    sums_targets: bool = False
    needs_thought: bool = True
    needs_predicted: bool = False
    soft: SoftTargets | None = None

    def soft_rows(self, texts: slice, places: slice) -> SoftTargets | None:
        """Take the distributions of some positions, for all of their thoughts in rows (a k b p)."""
        if self.soft is None:
            return None
        some, num_thoughts = self.soft.part((slice(None), texts, places)), self.thought.shape[1]
        return SoftTargets(*(repeat(x, "a b p ... -> (a k b p) ...", k=num_thoughts) for x in some))

    def coefficients(
        self,
        mixed: Tensor,
        thought: Tensor | None,
        texts: slice,
        places: slice,
        divergence: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Weigh some positions of some texts by the NLLs of both predictions, (A, K, B', P').

        ``divergence`` is that of the mixed one from a teacher. Returns advantage and reward
        (K, B', P'), and the coefficients of both NLLs.
        """
        if self.weigh is None:
            return None, None, None, None
        assert self.num_items is not None, "weights are divided by a count"
        scores = self.scores(mixed, thought, texts, places, divergence)
        weights = self.weigh(scores, texts, places)
        each = (1 if self.sums_targets else mixed.shape[0]) * mixed.shape[1] * self.num_items
        valid = self.targets[:, texts, places] != IGNORE_INDEX
        for_mixed, for_thought = (
            None if x is None else rearrange(x, "b p k a -> a k b p") / each * valid.unsqueeze(1)
            for x in (weights.mixed, weights.thought)
        )
        advantage, reward = (
            None if x is None else rearrange(x, "b p k -> k b p")
            for x in (weights.advantage, weights.reward)
        )  # fmt: skip
        return advantage, reward, for_mixed, for_thought

    def scores(
        self,
        mixed: Tensor,
        thought: Tensor | None,
        texts: slice,
        places: slice,
        divergence: Tensor | None = None,
    ) -> ThoughtScores:
        """Make scores of some positions of some texts, from NLLs (A, K, B', P')."""
        order = "a k b p -> b p k a"
        assert self.base_nll is not None, "scores have the base prediction"
        valid = self.targets[:, texts, places] != IGNORE_INDEX
        base = self.base_nll[:, texts, places].where(valid, 0.0)
        ratio = None if self.log_ratio is None else self.log_ratio[:, texts, places]
        return ThoughtScores(
            base=-rearrange(base, "a b p -> b p a"),
            thought=None if thought is None else -rearrange(thought, order),
            mixed=-rearrange(mixed, order),
            reference=None,
            valid=rearrange(valid, "a b p -> b p a"),
            log_ratio=None if ratio is None else rearrange(ratio, "k b p -> b p k"),
            divergence=None if divergence is None else rearrange(divergence, order),
        )


@dataclass(frozen=True)
class MixtureResult:
    """Negative log-likelihoods without gradient, 0 where there is no target.

    Attributes:
        mixed: NLL of the mixed prediction.
        thought: NLL of the thought's own prediction; None if it was not needed.
        predicted: Most likely mixed token; None if it was not needed.
        advantage: Advantage of every thought; None if nothing was weighed.
        reward: Reward of every thought; None if nothing was weighed.
        divergence: KL(teacher || mixed) of every target; None without a teacher.
    """

    mixed: Float[Tensor, "lookahead thoughts batch positions"]
    thought: Float[Tensor, "lookahead thoughts batch positions"] | None
    predicted: Int[Tensor, "lookahead thoughts batch positions"] | None
    advantage: Float[Tensor, "thoughts batch positions"] | None
    reward: Float[Tensor, "thoughts batch positions"] | None = None
    divergence: Float[Tensor, "lookahead thoughts batch positions"] | None = None


def groups(batch_size: int, num_positions: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Cut (texts, positions) into rectangles of about equal size, at most ``most`` places each.

    Whole texts together where one fits, else pieces of one text.
    """
    texts = max(1, min(batch_size, most // num_positions))
    pieces = -(-num_positions // max(1, min(most, num_positions)))
    size = -(-num_positions // pieces)
    for text in range(0, batch_size, texts):
        some = slice(text, min(text + texts, batch_size))
        for place in range(0, num_positions, size):
            yield some, slice(place, min(place + size, num_positions))


def packed_groups(tokens: Sequence[Sequence[int]], most: int) -> Iterator[tuple[slice, slice]]:
    """Cut (texts, positions) into rectangles of at most ``most`` tokens, or of one position.

    Whole texts together as far as they fit, else pieces of one text. ``tokens`` are those at every
    position of every text.
    """
    texts, size = slice(0, 0), 0
    whole = slice(0, len(tokens[0]))
    for n, of_text in enumerate(tokens):
        if size + sum(of_text) > most and texts.stop > texts.start:
            yield texts, whole
            texts, size = slice(n, n), 0
        if sum(of_text) <= most:
            texts, size = slice(texts.start, n + 1), size + sum(of_text)
            continue
        first, size = 0, 0
        for place, count in enumerate(of_text):
            if size + count > most and place > first:
                yield slice(n, n + 1), slice(first, place)
                first, size = place, 0
            size += count
        yield slice(n, n + 1), slice(first, len(of_text))
        texts, size = slice(n + 1, n + 1), 0
    if texts.stop > texts.start:
        yield texts, whole


def mixture_objective(
    mixture: Mixture, head: OutputHead, accumulator: HeadGradients | None = None
) -> tuple[Tensor, MixtureResult]:
    """Sum coefficient * NLL over all targets and thoughts, mixed and the thought's own.

    Returns the scalar objective (differentiable in states, mixing weight and head) and the results;
    ``accumulator`` is as in `quietstar.losses.cross_entropy.objective`.
    """
    if not head.is_linear:
        return _by_rows(mixture, head)
    results: list[MixtureResult] = []

    def compute(sums, needs):
        wanted = mixture.weigh is not None and sums is not None and (any(needs) or sums.wanted)
        work = _Work(mixture, head, sums if wanted else None)
        lookahead, num_thoughts, batch_size, num_positions = mixture.mixing_weight.shape
        # Mixed logits lie beside those of the thoughts, and a fraction of the text's.
        most = 2 * chunk_rows(head.num_logits) // (lookahead * (2 * num_thoughts + 1))
        for texts, places in groups(batch_size, num_positions, most):
            work.chunk(texts, places)
        results.append(
            MixtureResult(
                work.mixed, work.thought, work.predicted, work.advantage, work.reward,
                work.divergence,
            )
        )  # fmt: skip
        return work.value, work.grads

    inputs = (mixture.text.rows, mixture.thought, mixture.mixing_weight)
    return fused(compute, head, accumulator, inputs), results[0]


def _by_rows(mixture: Mixture, head: OutputHead) -> tuple[Tensor, MixtureResult]:
    """Do the same with a head whose logits are not linear in the states."""
    shape, weight = mixture.mixing_weight.shape, mixture.mixing_weight.flatten()
    states = mixture.thought.flatten(0, 3)
    targets = mixture.targets.unsqueeze(1).expand(shape).flatten()
    text = mixture.text.gather(mixture.text.rows).unsqueeze(1).expand_as(mixture.thought)
    everything = (slice(0, shape[2]), slice(0, shape[3]))
    soft = mixture.soft_rows(*everything)
    mixed = Segment(
        text.flatten(0, 3), targets, soft=soft, other_states=states, other_weight=weight
    )
    rows = recomputed_rows(mixed, head)
    mixed_nll, learned = rows.nll.view(shape), rows.nll.view(shape)
    thought_nll = detached = divergence = None
    if rows.divergence is not None:
        learned = rows.divergence.view(shape)
        divergence = learned.detach()
    if mixture.needs_thought:
        thought_nll = recomputed_rows(Segment(states, targets), head)[0].view(shape)
        detached = thought_nll.detach()
    advantage, reward, *coefficients = mixture.coefficients(
        mixed_nll.detach(), detached, *everything, divergence
    )
    value = mixed_nll.new_zeros(())
    for nll, coefficient in zip((learned, thought_nll), coefficients, strict=True):
        if nll is not None and coefficient is not None:
            value = value + (coefficient * nll).sum()
    predicted = None
    if mixture.needs_predicted and rows.predicted is not None:
        predicted = rows.predicted.view(shape)
    return value, MixtureResult(
        mixed_nll.detach(), detached, predicted, advantage, reward, divergence
    )


class _Work:
    """What the chunks of a mixture fill; gradients only with ``sums``."""

    def __init__(self, mixture: Mixture, head: OutputHead, sums: HeadGradients | None) -> None:
        self.mixture, self.products = mixture, Products(head, mixture.thought, sums)
        # Made beforehand: small tensors that stay, between chunks that go, would keep the memory
        # of these from being used again.
        like, contiguous = at_least_float32(mixture.mixing_weight), torch.contiguous_format
        self.mixed = torch.empty_like(like, memory_format=contiguous)
        self.thought = torch.empty_like(self.mixed) if mixture.needs_thought else None
        self.divergence = None if mixture.soft is None else torch.empty_like(self.mixed)
        wants_predicted = mixture.needs_predicted
        self.predicted = torch.empty_like(self.mixed, dtype=torch.long) if wants_predicted else None
        self.advantage = None if mixture.weigh is None else torch.zeros_like(self.mixed[0])
        self.reward = None if mixture.weigh is None else torch.zeros_like(self.mixed[0])
        self.value = self.mixed.new_zeros(())
        self.grads: list[Tensor | None] = [None, None, None]
        if sums is not None:
            self.grad_rows = torch.zeros_like(mixture.text.rows)  # contiguous parts overlap
            self.grad_thought = torch.zeros_like(mixture.thought, memory_format=contiguous)
            self.grad_weight = torch.zeros_like(self.mixed)
            self.grads = [self.grad_rows, self.grad_thought, self.grad_weight]

    def chunk(self, texts: slice, places: slice) -> None:
        """Compute results and gradients of some positions of some texts."""
        mixture, products, where = self.mixture, self.products, (..., texts, places)
        text = mixture.text.part(texts, places)
        text_states, base = products.logits(text.rows.flatten(0, 1))
        thought_states, own = products.logits(mixture.thought[..., texts, places, :].flatten(0, 3))
        fraction = at_least_float32(mixture.mixing_weight[where]).unsqueeze(-1)
        shape = fraction.shape[:-1]  # (A, K, B', P')
        grid = own.view(*shape, -1)
        base = text.gather(base.view(*text.rows.shape[:2], -1)).unsqueeze(1)  # a view
        targets = repeat(mixture.targets[where], "a b p -> (a k b p)", k=shape[1])

        mixed_logits = torch.lerp(base, grid, fraction).flatten(0, 3)
        soft = mixture.soft_rows(texts, places)
        mixed = SoftmaxChunk(
            mixed_logits, targets, wants_predicted=mixture.needs_predicted, soft=soft
        )
        self.mixed[where] = mixed.nll.view(shape)
        divergence = None
        if self.divergence is not None and mixed.divergence is not None:
            self.divergence[where] = mixed.divergence.view(shape)
            divergence = self.divergence[where]
        if self.predicted is not None and mixed.predicted is not None:
            self.predicted[where] = mixed.predicted.view(shape)
        slope = None
        if products.sums is not None:
            # d nll / d w = E_mixed[thought - base] - (thought - base) at the target. Taken here,
            # before the thought's logits turn into its probabilities in place.
            # With a teacher, its expectation stands in for the target.
            weights, index = mixed.weights.view(grid.shape), targets.clamp(min=0).view(*shape, 1)
            slope = torch.linalg.vecdot(weights, grid).sub_(torch.linalg.vecdot(weights, base))
            slope.div_(mixed.total.view(shape))
            if soft is not None:
                index = soft.tokens.view(*shape, -1)
            at_target = grid.gather(-1, index) - base.expand_as(grid).gather(-1, index)
            if soft is None:
                slope.sub_(at_target.squeeze(-1))
            else:
                few = soft.logprobs.exp().to(slope.dtype).view(*shape, -1)
                slope.sub_((few * at_target).sum(-1))
                others = weights.scatter(-1, index, 0.0)
                rest = torch.linalg.vecdot(others, grid).sub_(torch.linalg.vecdot(others, base))
                share = soft.rest.exp().to(slope.dtype).view(shape)
                slope.sub_(share * rest / mixed.others.view(shape))
        alone = alone_nll = None
        if self.thought is not None:
            alone = SoftmaxChunk(own, targets)
            self.thought[where] = alone.nll.view(shape)
            alone_nll = self.thought[where]

        advantage, reward, for_mixed, for_thought = mixture.coefficients(
            self.mixed[where], alone_nll, texts, places, divergence
        )
        if reward is None:
            self.reward = None
        elif self.reward is not None:
            self.reward[:, texts, places] = reward
        if advantage is None:
            self.advantage = None
        elif self.advantage is not None:
            self.advantage[:, texts, places] = advantage
        if for_mixed is not None:
            learned = self.mixed[where] if divergence is None else divergence
            self.value = self.value + (for_mixed * learned).sum()
        if for_thought is not None:
            assert alone_nll is not None, "a weighed prediction is computed"
            self.value = self.value + (for_thought * alone_nll).sum()
        if products.sums is None:
            return
        grad = None
        if for_mixed is not None and slope is not None:
            grad = mixed.gradient_(for_mixed.flatten()).view(grid.shape)
            self.grad_weight[where] = slope * for_mixed
            self._to_text(text, text_states, grad, fraction, texts, places)
            grad = grad.mul_(fraction).flatten(0, 3)
        if for_thought is not None and alone is not None:
            own_grad = alone.gradient_(for_thought.flatten())
            grad = own_grad if grad is None else grad.add_(own_grad)
        if grad is not None:
            grad_states = products.backward(grad, thought_states)
            self.grad_thought[..., texts, places, :] = grad_states.view(*shape, -1)

    def _to_text(self, text, states, grad, fraction, texts, places) -> None:
        """Add the part that flows to the text's own states; its logits are gone afterwards."""
        total = grad[:, 0] * (1 - fraction[:, 0])  # (A, B', P', V)
        for n in range(1, grad.shape[1]):
            total.addcmul_(grad[:, n], 1 - fraction[:, n])
        rows = self.products.backward(text.scatter_add(total).flatten(0, 1), states)
        rows, lookahead = rows.view(text.rows.shape), text.lookahead
        if text.contiguous:
            self.grad_rows[texts, places.start : places.stop + lookahead - 1] += rows
        else:
            by_step = self.grad_rows.unflatten(1, (lookahead, -1))
            by_step[texts, :, places] = rows.unflatten(1, (lookahead, -1))
