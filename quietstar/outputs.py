"""What the model returns."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.utils.generic import ModelOutput

from quietstar.losses.quiet_star import ScoredThoughts
from quietstar.metrics import ThoughtMetrics


@dataclass
class QuietStarOutput(ModelOutput):
    """Output of `QuietStarForCausalLM.forward`.

    Attributes:
        loss: Scalar, to call ``backward`` on.
        metrics: Figures of the batch as sums and counts; ``metrics.means()`` gives numbers.
        thoughts: Sampled tokens, (batch, thoughts, seq, length).
        input_ids: The texts, (batch, seq).
    """

    loss: Tensor | None = None
    metrics: ThoughtMetrics | None = None
    thoughts: Tensor | None = None
    input_ids: Tensor | None = None


@dataclass(frozen=True)
class PlainScores:
    """Predictions without thoughts; output of `QuietStarForCausalLM.score_plain`.

    Attributes:
        logprobs: Of the true next token, 0 where there is none.
        predicted: Most likely next token.
        valid: Where there is a true next token.
        metrics: Figures of the batch.
    """

    logprobs: Float[Tensor, "batch seq"]
    predicted: Int[Tensor, "batch seq"]
    valid: Bool[Tensor, "batch seq"]
    metrics: ThoughtMetrics


@dataclass(frozen=True)
class Thoughts:
    """Thoughts of every position and what they did; output of `QuietStarForCausalLM.think`.

    Position i of a text is the thought after token i; entry a - 1 of the last axis of the
    predictions is about the true token x_{i+a}.

    Attributes:
        tokens: Thought tokens.
        logprobs: Their log-probabilities (natural logarithm).
        mixing_weight: Share of the thought in the prediction.
        base_logprobs: Of the true token without the thought.
        thought_logprobs: By the thought's own prediction.
        mixed_logprobs: Mixed.
        valid: Where there is a true token to predict; elsewhere log-probabilities are 0.
        base_predicted: Most likely next token without the thought.
        mixed_predicted: Most likely x_{i+a} with it.
        metrics: Figures of the batch.
    """

    tokens: Int[Tensor, "batch thoughts seq length"]
    logprobs: Float[Tensor, "batch thoughts seq length"]
    mixing_weight: Float[Tensor, "batch thoughts seq lookahead"]
    base_logprobs: Float[Tensor, "batch seq lookahead"]
    thought_logprobs: Float[Tensor, "batch thoughts seq lookahead"]
    mixed_logprobs: Float[Tensor, "batch thoughts seq lookahead"]
    valid: Bool[Tensor, "batch seq lookahead"]
    base_predicted: Int[Tensor, "batch seq"]
    mixed_predicted: Int[Tensor, "batch thoughts seq lookahead"]
    metrics: ThoughtMetrics

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
        )

    @staticmethod
    def to_engine(tokens: Int[Tensor, "batch thoughts seq length"]) -> Tensor:
        """Tokens in the engine's order, (length, thoughts, batch, seq)."""
        return tokens.permute(3, 1, 0, 2).contiguous().long()
