"""What thoughts did, position by position: `Scores`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.attention.layout import NO_TOKEN

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Scores:
    """Predictions after thoughts: natural logarithms, no gradient.

    B texts of S tokens; P positions of each; K thoughts at each, of T tokens; A ground-truth tokens
    after it. Position i is that after token i; entry a - 1 of the last axis of a prediction is
    about the ground-truth token x_{i+a}, and 0 where there is none. What was not asked for, or
    belongs to training alone, is None.

    Attributes:
        tokens: Tokens of the thoughts, -1 after the last of one that ends early.
        positions: Where they are, -1 after the last of a text; None for all.
        valid: Whether there is a target x_{i+a}.
        mixing_weight: Share of the thought in the prediction.
        mixed_logprobs: Log-probabilities of the targets by the mixed prediction.
        mixed_predicted: Most likely x_{i+a} by it.
        candidates: Its logits of the candidates.
        base_logprobs: Log-probabilities of the targets without the thought.
        thought_logprobs: By the thought's own prediction alone.
        text_logprobs: Of the next token after every text position, without thoughts.
        text_valid: Whether there is a next token.
        base_predicted: Most likely next token without thoughts.
        logprobs: Of the thoughts' tokens, at the policy temperature.
        entropy: Of the distribution of each.
        since_drawn: Log-probability of each, minus that by the policy that drew it.
        is_clipped: Whether it is no longer reinforced.
        divergence: KL(teacher || mixed) of each target.
        advantage, reward: Of each thought.
        metrics: `quietstar.model.outputs.ThoughtMetrics` of the batch.
    """

    tokens: Int[Tensor, "batch positions thoughts length"]
    positions: Int[Tensor, "batch positions"] | None
    valid: Bool[Tensor, "batch positions lookahead"]
    mixing_weight: Float[Tensor, "batch positions thoughts lookahead"]
    mixed_logprobs: Float[Tensor, "batch positions thoughts lookahead"]
    mixed_predicted: Int[Tensor, "batch positions thoughts lookahead"] | None = None
    candidates: Float[Tensor, "batch positions thoughts lookahead candidates"] | None = None
    base_logprobs: Float[Tensor, "batch positions lookahead"] | None = None
    thought_logprobs: Float[Tensor, "batch positions thoughts lookahead"] | None = None
    text_logprobs: Float[Tensor, "batch seq"] | None = None
    text_valid: Bool[Tensor, "batch seq"] | None = None
    base_predicted: Int[Tensor, "batch seq"] | None = None
    logprobs: Float[Tensor, "batch positions thoughts length"] | None = None
    entropy: Float[Tensor, "batch positions thoughts length"] | None = None
    since_drawn: Float[Tensor, "batch positions thoughts length"] | None = None
    is_clipped: Bool[Tensor, "batch positions thoughts length"] | None = None
    divergence: Float[Tensor, "batch positions thoughts lookahead"] | None = None
    advantage: Float[Tensor, "batch positions thoughts"] | None = None
    reward: Float[Tensor, "batch positions thoughts"] | None = None
    metrics: Any = None

    def next_predicted(self) -> Int[Tensor, "batch seq thoughts"]:
        """Most likely next token after every text position, thoughts considered."""
        assert self.base_predicted is not None, "scored in full"
        assert self.mixed_predicted is not None, "scored"
        return of_nearest_thought(self.base_predicted, self.mixed_predicted, self.positions)

    def next_logprobs(self) -> Float[Tensor, "batch seq thoughts"]:
        """Log-probability of the ground-truth next token there, 0 where there is none."""
        assert self.text_logprobs is not None, "the text was asked for"
        return of_nearest_thought(self.text_logprobs, self.mixed_logprobs, self.positions)

    def to_frame(self, tokenizer: PreTrainedTokenizerBase | None = None) -> DataFrame:
        """Return a pandas frame with a row for every thought and target that it looks ahead to.

        Columns: ``text``, ``position``, ``thought``, ``ahead`` (1 for the next token), ``tokens``,
        ``mixing_weight``, ``base_logprob``, ``thought_logprob``, ``mixed_logprob`` and ``gain``
        (mixed minus base); with a tokenizer also ``thought_text``.
        """
        from pandas import DataFrame

        assert self.base_logprobs is not None, "scored in full"
        assert self.thought_logprobs is not None, "scored in full"
        rows = self.valid.unsqueeze(2).expand_as(self.mixed_logprobs).nonzero().unbind(1)
        text, place, thought, ahead = rows
        base, mixed = self.base_logprobs[text, place, ahead], self.mixed_logprobs[rows]
        columns: dict[str, Any] = {
            "text": text,
            "position": place if self.positions is None else self.positions[text, place],
            "thought": thought,
            "ahead": ahead + 1,
            "mixing_weight": self.mixing_weight[rows],
            "base_logprob": base,
            "thought_logprob": self.thought_logprobs[rows],
            "mixed_logprob": mixed,
            "gain": mixed - base,
        }
        columns = {name: column.cpu().numpy() for name, column in columns.items()}
        columns["tokens"] = [without_padding(x) for x in self.tokens[text, place, thought].tolist()]
        if tokenizer is not None:
            columns["thought_text"] = tokenizer.batch_decode(columns["tokens"])
        return DataFrame(columns)


def without_padding(tokens: Sequence[int]) -> list[int]:
    """Return the tokens of a thought without the -1 after its end."""
    return [token for token in tokens if token != NO_TOKEN]


def of_nearest_thought(
    text: Shaped[Tensor, "batch seq"],
    mixed: Shaped[Tensor, "batch positions thoughts lookahead"],
    positions: Int[Tensor, "batch positions"] | None,
) -> Shaped[Tensor, "batch seq thoughts"]:
    """Return what is known of the token after every position of a text.

    From the thought there, else from the latest one whose lookahead reaches as far, else without.

    Args:
        text: What is known of the next token without thoughts.
        mixed: What is known of x_{i+a} with them.
        positions: Positions of the thoughts, -1 after the last; None for all.
    """
    if positions is None:
        return mixed[..., 0]
    num_thoughts, lookahead = mixed.shape[2:]
    last = text.shape[1]
    known = text.unsqueeze(2).expand(-1, -1, num_thoughts)
    known = torch.nn.functional.pad(known, (0, 0, 0, 1))  # a row for what lies at no position
    for ahead in reversed(range(lookahead)):  # nearer thoughts overwrite
        index = positions + ahead
        index = index.where((positions >= 0) & (index < last), last)
        index = index.unsqueeze(2).expand(-1, -1, num_thoughts)
        known = known.scatter(1, index, mixed[..., ahead])
    return known[:, :last]


def by_position(
    x: Shaped[Tensor, "*of_each thoughts batch positions"] | None,
) -> Shaped[Tensor, "batch positions thoughts *of_each"] | None:
    """Bring a table of thoughts from the order in which blocks are laid out into that of scores."""
    return None if x is None else rearrange(x, "... k b p -> b p k ...")
