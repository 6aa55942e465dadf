"""What an objective is given and what it gives: scores of thoughts, weights and terms of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.errors import UserError


@dataclass(frozen=True)
class Continuations:
    """What the model writes after thoughts: an entry for every position that has some.

    Attributes:
        prompts: Text up to the position.
        texts: What the model goes on with after each thought of the position.
        targets: What truly follows, as far as its tokens are targets.
        places: Text and position of each entry in the batch.
        like: Tensor with the shape and on the device of rewards.
    """

    prompts: list[str]
    texts: list[list[str]]
    targets: list[str]
    places: Int[Tensor, "entries two"]
    like: Tensor

    def table(
        self, numbers: Sequence[Sequence[float]]
    ) -> Float[Tensor, "batch positions thoughts"]:
        """Put a number for every text into the shape of rewards, 0 where there is no position.

        Raises:
            UserError: Another number of them than of texts.
        """
        given, wanted = [len(row) for row in numbers], [len(texts) for texts in self.texts]
        if given != wanted:
            raise UserError(
                f"table of continuations: got {sum(given)} numbers in {len(given)} rows, but must "
                f"have one for each of {sum(wanted)} texts in {len(wanted)} rows. Give a list for "
                "each prompt with a number for each of its texts."
            )
        table = self.like.new_zeros(self.like.shape, dtype=torch.float32)
        if numbers:
            table[self.places[:, 0], self.places[:, 1]] = table.new_tensor(numbers)
        return table


@runtime_checkable
class Policy(Protocol):
    """The model that trains, as rewards may ask it; `ThoughtScores` describes the questions."""

    def logprob(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
        """Compute log p(completion | prompt)."""
        ...

    def continuations(
        self,
        thoughts: Any,
        num_tokens: int | None,
        temperature: float | None,
        stop: Sequence[str] | None,
    ) -> Continuations:
        """Continue after thoughts."""
        ...

    def judge(
        self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Ask the judge of the run."""
        ...

    def records(self, thoughts: Any) -> list[dict[str, Any]]:
        """Return the raw record of each text."""
        ...

    def decode(self, thoughts: Any) -> list[list[str]]:
        """Return the texts of thoughts, by entry as those of `continuations`."""
        ...


@dataclass(frozen=True)
class ThoughtScores:
    """Log-probabilities of the true tokens after thoughts: natural logarithm, no gradient.

    Entry a - 1 of the last axis is about the true token x_{i+a}. Where there is no target, entries
    are 0 and ``valid`` is False.

    Attributes:
        base: Log-probabilities without a thought.
        thought: By the thought's own prediction; None if neither reward nor objective reads it.
        mixed: Log-probabilities by the mixed prediction.
        reference: By a reference model without a thought; None if there is none.
        valid: Whether there is a target.
        log_ratio: log pi(t) - log pi_ref(t) of each thought's tokens together, by the policy that
            drew them; None without a reference that scores thoughts.
        lengths: Tokens of each thought.
        running: Means of the rewards and of their standard deviations in a group, over earlier
            steps; None in the first step, and for objectives that do not ask for them.
        divergence: KL(teacher || mixed) of each target; None without a teacher.
        policy: What methods such as `continuations` ask; None outside of a training step.
    """

    base: Float[Tensor, "batch positions lookahead"]
    thought: Float[Tensor, "batch positions thoughts lookahead"] | None
    mixed: Float[Tensor, "batch positions thoughts lookahead"]
    reference: Float[Tensor, "batch positions lookahead"] | None
    valid: Bool[Tensor, "batch positions lookahead"]
    log_ratio: Float[Tensor, "batch positions thoughts"] | None = None
    lengths: Int[Tensor, "batch positions thoughts"] | None = None
    running: Float[Tensor, " 2"] | None = None
    divergence: Float[Tensor, "batch positions thoughts lookahead"] | None = None
    policy: Policy | None = None

    def logprob(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> Float[Tensor, " texts"]:
        """Ask the model that trains for log p(completion | prompt) of any texts.

        Batched, without thoughts and without gradient. A reward that calls this is marked with
        `quietstar.rewards.asks_policy`.

        Args:
            prompts: What stands before; may be empty texts where the model has a token that
                begins them.
            completions: As many; their log-probabilities are summed over their tokens, nats.

        Raises:
            UserError: Another number of completions than of prompts, or a reward without the mark.
        """
        return self._ask("logprob").logprob(prompts, completions)

    def continuations(
        self,
        thoughts: Any,
        num_tokens: int | None = None,
        temperature: float | None = None,
        stop: Sequence[str] | None = None,
    ) -> Continuations:
        """Have the model continue each thought, as it predicts after it.

        One sample a thought, from the mixed prediction, by noise that is keyed as that of the
        thoughts. A reward that calls this is marked with `quietstar.rewards.asks_policy`.

        Args:
            thoughts: The `ThoughtBatch` that the reward is given.
            num_tokens: Most tokens; by default ``judge.continuation``.
            temperature: Of the sampling; by default 1.
            stop: Texts before which a continuation ends; by default none.

        Raises:
            UserError: A model without a tokenizer, or a reward without the mark.
        """
        asked = self._ask("continuations")
        return asked.continuations(thoughts, num_tokens, temperature, stop)

    def judge(
        self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Ask the judge of the run (section ``judge`` of its config) how good texts are.

        A reward that calls this is marked with `quietstar.rewards.asks_policy`.

        Args:
            prompts: What the candidates answer or continue.
            candidates: Some for each prompt.

        Returns:
            A number for each candidate: its rating in [-1, 1], its win rate over the others of its
            prompt, or the score of a reward model, as ``judge.mode`` and ``loss.reward`` say.

        Raises:
            UserError: There is no judge, it cannot judge these texts, or a reward without the mark.
        """
        return self._ask("judge").judge(prompts, candidates)

    def records(self, thoughts: Any) -> list[dict[str, Any]]:
        """Return the raw record that each text of the batch was made of, with all its fields.

        A reward that calls this is marked with `quietstar.rewards.asks_policy`.

        Args:
            thoughts: The `ThoughtBatch` that the reward is given.

        Raises:
            UserError: The texts are not one record each, or a reward without the mark.
        """
        return self._ask("records").records(thoughts)

    def decode(self, thoughts: Any) -> list[list[str]]:
        """Return the texts of the thoughts: for every position with some, in order, K of them.

        These are the entries of `continuations`. A reward that calls this is marked with
        `quietstar.rewards.asks_policy`.
        """
        return self._ask("decode").decode(thoughts)

    def _ask(self, name: str) -> Policy:
        if self.policy is None:
            raise UserError(
                f"scores.{name}: only a reward marked with quietstar.rewards.asks_policy may ask "
                "the model. Put @asks_policy above it."
            )
        return self.policy


@dataclass(frozen=True)
class ThoughtWeights:
    """What an objective makes of scores and rewards, without gradient.

    The loss divides the sums by counts of the whole step: by K M, with M positions that have a
    target; and by numbers of tokens, as `Objective.token_weighting` and `target_weighting` say.

    Attributes:
        advantage: Weight of the log-probability of each thought's tokens.
        mixed: Weight of the NLL of each true token by the mixed prediction, with a teacher of its
            divergence from that; None for zero.
        thought: The same for the thought's own prediction.
        reward: What the thoughts were given in all, for figures; None for ``loss.reward`` alone.
    """

    advantage: Float[Tensor, "batch positions thoughts"] | None
    mixed: Float[Tensor, "batch positions thoughts lookahead"] | None = None
    thought: Float[Tensor, "batch positions thoughts lookahead"] | None = None
    reward: Float[Tensor, "batch positions thoughts"] | None = None

    def part(self, texts: slice, places: slice) -> ThoughtWeights:
        """Take those of some texts and some of their positions."""
        tables = (self.advantage, self.mixed, self.thought, self.reward)
        return ThoughtWeights(*(None if x is None else x[texts, places] for x in tables))


@runtime_checkable
class Student(Protocol):
    """Predictions of a student without thoughts, and its teacher's, (rows,), without gradient.

    Attributes:
        targets: True tokens, -100 where a row has none.
        nll: NLL of these by the student.
        teacher_nll: NLL of these by the teacher.
        scale: Weight of each row in a mean over the targets of the whole step.
    """

    targets: Tensor
    nll: Tensor
    teacher_nll: Tensor

    @property
    def scale(self) -> Tensor:
        """Weight of each row in a mean over the targets of the whole step."""
        ...

    def token_loss(self, tokens: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
        """Sum weight * -log p(token) by the student, differentiable; (rows,) each."""
        ...

    def divergence_loss(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sum weight * KL(teacher || student), differentiable; and the divergences, (rows,)."""
        ...
