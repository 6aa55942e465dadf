"""Cross entropies of the mixed prediction and of the thought's own, from logits made once.

Mixed logits are ``(1 - w) * base + w * thought``: with both at hand, the mixed prediction needs no
product with the output weight of its own, forward or backward. As in
`quietstar.losses.cross_entropy`, logits live a chunk at a time and gradients are computed with
them. A chunk holds *all* thoughts of its positions, so that the weight of a target may depend on
what every thought of its position achieved: the log-probabilities are known before the gradient is
made. Letters: A lookahead, K thoughts, B texts, P positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    WithGradients,
    chunk_rows,
    recomputed_rows,
)
from quietstar.losses.weights import ThoughtScores, ThoughtWeights


class Predictions:
    """The two predictions of every target after thoughts, a chunk of positions at a time.

    Iterate over the chunks: each has the `Chunk.scores` of its thoughts, and takes the weights that
    an objective makes of them (`Chunk.learn`). Then `loss` is their weighted sum, differentiable in
    the states, the mixing weight and the head. Tables of results are negative log-likelihoods
    without gradient, 0 where there is no target.

    Args:
        head: From states to logits.
        text: The text's own states that predict the same tokens.
        ahead: States after thoughts, from the end token on.
        mixing_weight: Share of the thought in the mixed logits.
        targets: Token ids or IGNORE_INDEX, the same for all thoughts.
        base_nll: NLL of the targets without a thought, for `Chunk.scores`.
        soft: A teacher's distributions of the targets, (A, B, P, top) and (A, B, P): weights of the
            mixed prediction are then of its divergence from them, in place of its NLL.
        accumulator: Collects the gradients of a linear head; by default they are those of its
            parameters.
        needs_thought: Whether the thought's own prediction is computed.
        needs_predicted: Whether the most likely mixed token is found.

    Attributes:
        mixed: NLL of the mixed prediction, (A, K, B, P).
        thought: Of the thought's own; None if it is not needed.
        predicted: Most likely mixed token; None if it is not needed.
        divergence: KL(teacher || mixed); None without a teacher.
        advantage: Advantage of every thought, (K, B, P); None if no objective gave one.
        reward: Reward of every thought; None likewise.
    """

    def __init__(
        self,
        head: OutputHead,
        text: TextLookahead,
        ahead: Float[Tensor, "lookahead thoughts batch positions width"],
        mixing_weight: Float[Tensor, "lookahead thoughts batch positions"],
        targets: Int[Tensor, "lookahead batch positions"],
        base_nll: Float[Tensor, "lookahead batch positions"] | None = None,
        soft: SoftTargets | None = None,
        accumulator: HeadGradients | None = None,
        *,
        needs_thought: bool = True,
        needs_predicted: bool = False,
    ) -> None:
        self.head, self.text, self.ahead, self.mixing_weight = head, text, ahead, mixing_weight
        self.targets, self.base_nll, self.soft = targets, base_nll, soft
        self.accumulator = accumulator
        self.needs_thought, self.needs_predicted = needs_thought, needs_predicted
        # Made beforehand: small tensors that stay, between chunks that go, would keep the memory
        # of these from being used again.
        like, contiguous = at_least_float32(mixing_weight), torch.contiguous_format
        self.mixed = torch.empty_like(like, memory_format=contiguous)
        self.thought = torch.empty_like(self.mixed) if needs_thought else None
        self.divergence = None if soft is None else torch.empty_like(self.mixed)
        self.predicted = torch.empty_like(self.mixed, dtype=torch.long) if needs_predicted else None
        self.advantage: Tensor | None = None
        self.reward: Tensor | None = None
        self.value = self.mixed.new_zeros(())
        self.inputs = (text.rows, ahead, mixing_weight)
        self.sums = self._sums() if head.is_linear and torch.is_grad_enabled() else None
        if self.sums is not None:
            self.grad_rows = torch.zeros_like(text.rows)  # contiguous parts overlap
            self.grad_ahead = torch.zeros_like(ahead, memory_format=contiguous)
            self.grad_weight = torch.zeros_like(self.mixed)

    def _sums(self) -> HeadGradients | None:
        """What collects the gradients of the head; None where nothing learns."""
        sums, head = self.accumulator, self.head
        if sums is None:
            bias = head.bias is not None and head.bias.requires_grad
            sums = HeadGradients(head, head.weight.requires_grad, bias)
        return sums if sums.wanted or any(x.requires_grad for x in self.inputs) else None

    def __iter__(self) -> Iterator[Chunk]:
        """Make the logits of some positions; a chunk must have learned before the next one."""
        lookahead, num_thoughts, batch_size, num_positions = self.mixing_weight.shape
        if not self.head.is_linear:
            yield _recomputed(self)
            return
        products = Products(self.head, self.ahead, self.sums)
        # Mixed logits are held with those of the thoughts, and a fraction of the text's.
        most = 2 * chunk_rows(self.head.num_logits) // (lookahead * (2 * num_thoughts + 1))
        for texts, places in groups(batch_size, num_positions, most):
            chunk = _FusedChunk(self, products, texts, places)
            yield chunk
            chunk.free()

    def known(self) -> ThoughtScores:
        """Score all positions at once, in a pass of its own without gradient."""
        with torch.no_grad():
            everything = Predictions(
                self.head, self.text, self.ahead, self.mixing_weight, self.targets, self.base_nll,
                self.soft, needs_thought=self.needs_thought,
            )  # fmt: skip
            for _ in everything:  # fills the tables
                pass
        everywhere = slice(0, self.mixed.shape[2]), slice(0, self.mixed.shape[3])
        return Chunk(everything, *everywhere).scores

    def results(self) -> dict[str, Tensor | None]:
        """The tables as `quietstar.losses.scores.Scores` calls them, in the order (a k b p)."""
        return {
            "mixing_weight": self.mixing_weight.detach(),
            "mixed_logprobs": -self.mixed,
            "thought_logprobs": None if self.thought is None else -self.thought,
            "mixed_predicted": self.predicted,
            "divergence": self.divergence,
            "advantage": self.advantage,
            "reward": self.reward,
        }

    def candidates(
        self, tokens: Int[Tensor, " candidates"]
    ) -> Float[Tensor, "batch positions thoughts lookahead candidates"]:
        """Mixed logits of a few candidates for every target."""
        base = self.head.candidate_logits(self.text.gather(self.text.rows), tokens).unsqueeze(1)
        thought = self.head.candidate_logits(self.ahead, tokens)
        weight = self.mixing_weight.unsqueeze(-1).to(thought.dtype)
        mixed = torch.lerp(base.expand_as(thought), thought, weight)
        return rearrange(mixed, "a k b p c -> b p k a c")

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Sum of all that the chunks learned."""
        if self.sums is None:
            return self.value
        of_head = params = (None, None)
        if self.accumulator is None:
            of_head, params = self.sums.totals(), (self.head.weight, self.head.bias)
        given = self.value, [*of_head, self.grad_rows, self.grad_ahead, self.grad_weight]
        return WithGradients.apply(lambda _: given, *params, *self.inputs)  # pyright: ignore[reportReturnType]


class Chunk:
    """All thoughts at some positions of some texts, with their predictions."""

    def __init__(self, of: Predictions, texts: slice, places: slice) -> None:
        self.of, self.texts, self.places = of, texts, places
        self.where = (..., texts, places)

    @property
    def scores(self) -> ThoughtScores:
        """Log-probabilities of the ground-truth tokens after these thoughts."""
        of, order = self.of, "a k b p -> b p k a"
        assert of.base_nll is not None, "scores include the prediction without a thought"
        valid = of.targets[self.where] != IGNORE_INDEX
        base = of.base_nll[self.where].where(valid, 0.0)
        thought, divergence = of.thought, of.divergence
        return ThoughtScores(
            base=-rearrange(base, "a b p -> b p a"),
            thought=None if thought is None else -rearrange(thought[self.where], order),
            mixed=-rearrange(of.mixed[self.where], order),
            reference=None,
            valid=rearrange(valid, "a b p -> b p a"),
            divergence=None if divergence is None else rearrange(divergence[self.where], order),
        )

    def learn(self, weights: ThoughtWeights, count: Tensor) -> None:
        """Add the weighted NLLs of these targets to the loss, and their gradients.

        Args:
            weights: Weight of every target and thought.
            count: What the weights of targets are divided by.
        """
        of = self.of
        for name in ("advantage", "reward"):
            x = getattr(weights, name)
            if x is not None:
                if getattr(of, name) is None:
                    setattr(of, name, torch.zeros_like(of.mixed[0]))
                getattr(of, name)[self.where] = rearrange(x, "b p k -> k b p")
        valid = (of.targets[self.where] != IGNORE_INDEX).unsqueeze(1)
        coefficients = (
            None if x is None else rearrange(x, "b p k a -> a k b p") / count * valid
            for x in (weights.mixed, weights.thought)
        )
        self._add(*coefficients)

    def _add(self, for_mixed: Tensor | None, for_thought: Tensor | None) -> None:
        """Add coefficient * NLL of both predictions, (A, K, B', P')."""
        raise NotImplementedError


class _FusedChunk(Chunk):
    """A chunk of a linear head, whose logits live until it has learned."""

    @torch.no_grad()
    def __init__(self, of: Predictions, products: Products, texts: slice, places: slice) -> None:
        super().__init__(of, texts, places)
        self.products, where = products, self.where
        self.text = text = of.text.part(texts, places)
        self.text_states, base = products.logits(text.rows.flatten(0, 1))
        self.states, own = products.logits(of.ahead[..., texts, places, :].flatten(0, 3))
        self.fraction = at_least_float32(of.mixing_weight[where]).unsqueeze(-1)
        shape = self.fraction.shape[:-1]  # (A, K, B', P')
        grid = own.view(*shape, -1)
        base = text.gather(base.view(*text.rows.shape[:2], -1)).unsqueeze(1)  # a view
        targets = repeat(of.targets[where], "a b p -> (a k b p)", k=shape[1])
        soft = _soft_rows(of, texts, places)
        mixed_logits = torch.lerp(base, grid, self.fraction).flatten(0, 3)
        self.mixed = mixed = SoftmaxChunk(
            mixed_logits, targets, wants_predicted=of.needs_predicted, soft=soft
        )
        of.mixed[where] = mixed.nll.view(shape)
        if of.divergence is not None and mixed.divergence is not None:
            of.divergence[where] = mixed.divergence.view(shape)
        if of.predicted is not None and mixed.predicted is not None:
            of.predicted[where] = mixed.predicted.view(shape)
        if products.sums is not None:
            # Before the thought's logits turn into its probabilities in place.
            self.slope = _slope(mixed, grid, base, targets, soft)
        self.alone = None
        if of.thought is not None:
            self.alone = SoftmaxChunk(own, targets)
            of.thought[where] = self.alone.nll.view(shape)

    def free(self) -> None:
        """Let go of the logits, of which the next chunk has its own."""
        vars(self).clear()

    @torch.no_grad()
    def _add(self, for_mixed: Tensor | None, for_thought: Tensor | None) -> None:
        of, where, shape = self.of, self.where, self.fraction.shape[:-1]
        if for_mixed is not None:
            learned = of.mixed if of.divergence is None else of.divergence
            of.value = of.value + (for_mixed * learned[where]).sum()
        if for_thought is not None:
            assert of.thought is not None, "a weighted prediction is computed"
            of.value = of.value + (for_thought * of.thought[where]).sum()
        if self.products.sums is None:
            return
        grad = None
        if for_mixed is not None:
            grad = self.mixed.gradient_(for_mixed.flatten()).view(*shape, -1)
            of.grad_weight[where] = self.slope * for_mixed
            self._add_to_text(grad)
            grad = grad.mul_(self.fraction).flatten(0, 3)
        if for_thought is not None and self.alone is not None:
            own_grad = self.alone.gradient_(for_thought.flatten())
            grad = own_grad if grad is None else grad.add_(own_grad)
        if grad is not None:
            grad_states = self.products.backward(grad, self.states)
            of.grad_ahead[..., self.texts, self.places, :] = grad_states.view(*shape, -1)

    def _add_to_text(self, grad: Tensor) -> None:
        """Add the part that flows to the text's own states; its logits are gone afterwards."""
        text, fraction, grad_rows = self.text, self.fraction, self.of.grad_rows
        total = grad[:, 0] * (1 - fraction[:, 0])  # (A, B', P', V)
        for n in range(1, grad.shape[1]):
            total.addcmul_(grad[:, n], 1 - fraction[:, n])
        rows = self.products.backward(text.scatter_add(total).flatten(0, 1), self.text_states)
        rows, lookahead = rows.view(text.rows.shape), text.lookahead
        if text.contiguous:
            grad_rows[self.texts, self.places.start : self.places.stop + lookahead - 1] += rows
        else:
            by_step = grad_rows.unflatten(1, (lookahead, -1))
            by_step[self.texts, :, self.places] = rows.unflatten(1, (lookahead, -1))


def _slope(
    mixed: SoftmaxChunk, grid: Tensor, base: Tensor, targets: Tensor, soft: SoftTargets | None
) -> Tensor:
    """Derivative of the mixed NLL (of the divergence, with a teacher) by the mixing weight.

    d nll / d w = E_mixed[thought - base] - (thought - base) at the target; a teacher's expectation
    takes the place of the target.
    """
    shape = grid.shape[:-1]
    weights, index = mixed.weights.view(grid.shape), targets.clamp(min=0).view(*shape, 1)
    slope = torch.linalg.vecdot(weights, grid).sub_(torch.linalg.vecdot(weights, base))
    slope.div_(mixed.total.view(shape))
    if soft is not None:
        index = soft.tokens.view(*shape, -1)
    at_target = grid.gather(-1, index) - base.expand_as(grid).gather(-1, index)
    if soft is None:
        return slope.sub_(at_target.squeeze(-1))
    few = soft.logprobs.exp().to(slope.dtype).view(*shape, -1)
    slope.sub_((few * at_target).sum(-1))
    others = weights.scatter(-1, index, 0.0)
    rest = torch.linalg.vecdot(others, grid).sub_(torch.linalg.vecdot(others, base))
    share = soft.rest.exp().to(slope.dtype).view(shape)
    return slope.sub_(share * rest / mixed.others.view(shape))


class _RecomputedChunk(Chunk):
    """All positions under a head that is not linear in the states, with an ordinary graph."""

    learned: Tensor
    thought: Tensor | None = None

    def _add(self, for_mixed: Tensor | None, for_thought: Tensor | None) -> None:
        for nll, weight in ((self.learned, for_mixed), (self.thought, for_thought)):
            if nll is not None and weight is not None:
                self.of.value = self.of.value + (weight * nll).sum()


def _recomputed(of: Predictions) -> Chunk:
    shape, weight = of.mixing_weight.shape, of.mixing_weight.flatten()
    chunk = _RecomputedChunk(of, slice(0, shape[2]), slice(0, shape[3]))
    states = of.ahead.flatten(0, 3)
    targets = of.targets.unsqueeze(1).expand(shape).flatten()
    text = of.text.gather(of.text.rows).unsqueeze(1).expand_as(of.ahead).flatten(0, 3)
    soft = _soft_rows(of, chunk.texts, chunk.places)
    mixed = Segment(text, targets, soft=soft, other_states=states, other_weight=weight)
    rows = recomputed_rows(mixed, of.head)
    chunk.learned = rows.nll.view(shape)
    of.mixed = chunk.learned.detach()
    if rows.divergence is not None:
        chunk.learned = rows.divergence.view(shape)
        of.divergence = chunk.learned.detach()
    if of.needs_thought:
        chunk.thought = recomputed_rows(Segment(states, targets), of.head).nll.view(shape)
        of.thought = chunk.thought.detach()
    if of.needs_predicted and rows.predicted is not None:
        of.predicted = rows.predicted.view(shape)
    return chunk


def _soft_rows(of: Predictions, texts: slice, places: slice) -> SoftTargets | None:
    """Distributions at some positions, for all of their thoughts in rows (a k b p)."""
    if of.soft is None:
        return None
    some, num_thoughts = of.soft.part((slice(None), texts, places)), of.mixed.shape[1]
    return SoftTargets(*(repeat(x, "a b p ... -> (a k b p) ...", k=num_thoughts) for x in some))


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
