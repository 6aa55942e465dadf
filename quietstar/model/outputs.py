"""What the model returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from quietstar.losses.thought_loss import ScoredThoughts
from quietstar.model.metrics import ThoughtMetrics

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class QuietStarOutput(ModelOutput):
    """Output of `QuietStarForCausalLM.forward`.

    Attributes:
        loss: Scalar, to call ``backward`` on.
        metrics: Figures of the batch as sums and counts; ``metrics.means()`` gives numbers.
        thoughts: Sampled tokens, (batch, thoughts, positions, length).
        input_ids: The texts, (batch, seq).
        positions: Where the thoughts are, (batch, positions), -1 behind the last; None for all.
    """

    loss: Tensor | None = None
    metrics: ThoughtMetrics | None = None
    thoughts: Tensor | None = None
    input_ids: Tensor | None = None
    positions: Tensor | None = None


@dataclass(frozen=True)
class PlainScores:
    """Predictions without thoughts; output of `QuietStarForCausalLM.score_plain`.

    Attributes:
        logprobs: Of the true next token, 0 where there is none.
        predicted: Most likely next token.
        valid: Whether there is a true next token.
        metrics: Figures of the batch.
        candidates: Logits of the candidates after every text position; None if none were asked for.
    """

    logprobs: Float[Tensor, "batch seq"]
    predicted: Int[Tensor, "batch seq"]
    valid: Bool[Tensor, "batch seq"]
    metrics: ThoughtMetrics
    candidates: Float[Tensor, "batch seq candidates"] | None = None


@dataclass(frozen=True)
class MixedScores:
    """Predictions with thoughts; output of `QuietStarForCausalLM.score_mixed`.

    Attributes:
        logprobs: Of the true next token, 0 where there is none.
        predicted: Most likely next token.
        candidates: Logits of the candidates; None if none were asked for.
    """

    logprobs: Float[Tensor, "batch thoughts positions"]
    predicted: Int[Tensor, "batch thoughts positions"]
    candidates: Float[Tensor, "batch thoughts positions candidates"] | None = None


@dataclass(frozen=True)
class Thoughts:
    """Thoughts of every position and what they did; output of `QuietStarForCausalLM.think`.

    Position i of a text is the thought after token i; entry a - 1 of the last axis of the
    predictions is about the true token x_{i+a}. ``positions`` are all, (seq,), or the chosen ones.

    Attributes:
        tokens: Tokens of the thoughts.
        logprobs: Their log-probabilities (natural logarithm).
        mixing_weight: Share of the thought in the prediction.
        base_logprobs: Log-probabilities of the true tokens without the thought.
        thought_logprobs: The same by the thought's own prediction.
        mixed_logprobs: The same by the mixed prediction.
        valid: Where there is a true token to predict; elsewhere log-probabilities are 0.
        base_predicted: Most likely next token without the thought, after every text position.
        mixed_predicted: Most likely x_{i+a} with it.
        metrics: Figures of the batch.
        positions: The chosen ones, -1 behind the last of a text; None for all.
    """

    tokens: Int[Tensor, "batch thoughts positions length"]
    logprobs: Float[Tensor, "batch thoughts positions length"]
    mixing_weight: Float[Tensor, "batch thoughts positions lookahead"]
    base_logprobs: Float[Tensor, "batch positions lookahead"]
    thought_logprobs: Float[Tensor, "batch thoughts positions lookahead"]
    mixed_logprobs: Float[Tensor, "batch thoughts positions lookahead"]
    valid: Bool[Tensor, "batch positions lookahead"]
    base_predicted: Int[Tensor, "batch seq"]
    mixed_predicted: Int[Tensor, "batch thoughts positions lookahead"]
    metrics: ThoughtMetrics
    positions: Int[Tensor, "batch positions"] | None = None

    @classmethod
    def from_scored(cls, scored: ScoredThoughts, metrics: ThoughtMetrics) -> Thoughts:
        """From the engine's order, (token or lookahead, thoughts, batch, seq)."""

        def public(x: Tensor) -> Tensor:
            return x.permute(2, 1, 3, 0)

        assert scored.thought_logprobs is not None, "compute with scoring"
        assert scored.base_predicted is not None, "compute with scoring"
        assert scored.mixed_predicted is not None, "compute with scoring"
        return cls(
            tokens=public(scored.thoughts),
            logprobs=public(scored.logprobs),
            mixing_weight=public(scored.mixing_weight),
            base_logprobs=scored.base_logprobs.permute(1, 2, 0),
            thought_logprobs=public(scored.thought_logprobs),
            mixed_logprobs=public(scored.mixed_logprobs),
            valid=scored.valid.permute(1, 2, 0),
            base_predicted=scored.base_predicted,
            mixed_predicted=public(scored.mixed_predicted),
            metrics=metrics,
            positions=scored.positions,
        )

    def next_predicted(self) -> Int[Tensor, "batch thoughts seq"]:
        """Most likely next token after every text position, thoughts considered."""
        if self.positions is None:
            return self.mixed_predicted[..., 0]
        return predict_everywhere(self.base_predicted, self.mixed_predicted, self.positions)

    def to_frame(self, tokenizer: PreTrainedTokenizerBase | None = None) -> DataFrame:
        """A pandas frame with a row for every thought and true token that it looks ahead to.

        Columns: ``text``, ``position``, ``thought``, ``ahead`` (1 for the next token), ``tokens``,
        ``mixing_weight``, ``base_logprob``, ``thought_logprob``, ``mixed_logprob`` and ``gain``
        (mixed minus base); with a tokenizer also ``thought_text``.
        """
        from pandas import DataFrame

        where = self.valid.unsqueeze(1).expand_as(self.mixed_logprobs).nonzero()
        text, thought, place, ahead = where.T
        base = self.base_logprobs[text, place, ahead]
        mixed = self.mixed_logprobs[text, thought, place, ahead]
        tokens = self.tokens[text, thought, place].tolist()
        position = place if self.positions is None else self.positions[text, place]
        columns: dict[str, Any] = {
            "text": text, "position": position, "thought": thought, "ahead": ahead + 1,
            "mixing_weight": self.mixing_weight[text, thought, place, ahead],
            "base_logprob": base,
            "thought_logprob": self.thought_logprobs[text, thought, place, ahead],
            "mixed_logprob": mixed,
            "gain": mixed - base,
        }  # fmt: skip
        columns = {name: column.cpu().numpy() for name, column in columns.items()}
        columns["tokens"] = tokens
        if tokenizer is not None:
            columns["thought_text"] = tokenizer.batch_decode(tokens)
        return DataFrame(columns)

    @staticmethod
    def token_major(tokens: Int[Tensor, "batch thoughts positions length"]) -> Tensor:
        """The tokens in the order in which blocks are laid out."""
        return tokens.permute(3, 1, 0, 2).contiguous().long()


def predict_everywhere(
    base: Int[Tensor, "batch seq"],
    mixed: Int[Tensor, "batch thoughts positions lookahead"],
    positions: Int[Tensor, "batch positions"],
) -> Int[Tensor, "batch thoughts seq"]:
    """Next tokens of a whole text from thoughts at chosen positions.

    By the thought there, else by the latest one whose lookahead reaches as far, else without.

    Args:
        base: Most likely next token without thoughts.
        mixed: Most likely x_{i+a} with them.
        positions: Positions of the thoughts, -1 behind the last.
    """
    num_thoughts, lookahead, last = mixed.shape[1], mixed.shape[-1], base.shape[-1]
    predicted = base.unsqueeze(1).expand(-1, num_thoughts, -1)
    predicted = torch.nn.functional.pad(predicted, (0, 1))  # takes what lies at no position
    for ahead in reversed(range(lookahead)):  # nearer thoughts overwrite
        index = positions + ahead
        index = index.where((positions >= 0) & (index < last), last)
        index = index.unsqueeze(1).expand(-1, num_thoughts, -1)
        predicted = predicted.scatter(-1, index, mixed[..., ahead])
    return predicted[..., :last]
