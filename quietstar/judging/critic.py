"""What rewards ask in training: a judge's verdicts on texts, and what they cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from quietstar.config import JudgeConfig
from quietstar.errors import UserError
from quietstar.generation.continuations import Writing
from quietstar.judging.judge import Judge, of_model
from quietstar.judging.prompts import Kind
from quietstar.judging.reward_model import RewardModel, is_classifier

LEAST_RATING = -1.0
"""Of a candidate without text, which no judge is asked about."""


class Critic:
    """Says how good texts are, for ``scores.judge`` of rewards (`ThoughtScores`).

    Set it as ``model.judge``. Candidates are judged without the white space around them, equal ones
    of a prompt once. One without text gets the lowest rating, or loses against any other.

    Args:
        judge: A judge, or a reward model.
        writing: How the model that trains writes what is judged.
        mode: Whether a judge rates every candidate, or compares those of a prompt in pairs.
        context: Entered around every call, as ``model.disable_adapter``.
    """

    def __init__(
        self,
        judge: Judge | RewardModel,
        writing: Writing,
        mode: Literal["rating", "pairs"] = "rating",
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.judge, self.writing, self.mode, self._context = judge, writing, mode, context
        self._seconds, self._tokens_before = 0.0, judge.tokens_run

    def __call__(
        self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Give each candidate of each prompt a number; more is better.

        Raises:
            UserError: Texts that the judge cannot read, or logits that are not finite.
        """
        begun = time.perf_counter()  # what was asked before has been read: these are texts
        with self._context(), naming_keys():
            if isinstance(self.judge, RewardModel):
                results = self._score(self.judge, prompts, candidates)
            elif self.mode == "rating":
                results = self._rate(self.judge, prompts, candidates)
            else:
                results = self._win_rates(self.judge, prompts, candidates)
        self._seconds += time.perf_counter() - begun
        return results

    def take_costs(self) -> tuple[float, int]:
        """Return seconds and tokens that the judge has run since the last call."""
        seconds, tokens = self._seconds, self.judge.tokens_run - self._tokens_before
        self._seconds, self._tokens_before = 0.0, self.judge.tokens_run
        return seconds, tokens

    def _score(
        self, model: RewardModel, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        rows = [[prompt] * len(texts) for prompt, texts in zip(prompts, candidates, strict=True)]
        flat = iter(model.score(_flat(rows), _flat(candidates)))
        return [[next(flat) for _ in texts] for texts in candidates]

    def _rate(
        self, judge: Judge, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        stripped = [[text.strip() for text in texts] for texts in candidates]
        pairs = [(p, text) for p, texts in zip(prompts, stripped, strict=True) for text in texts]
        asked = [pair for pair in dict.fromkeys(pairs) if pair[1]]
        ratings = judge.rate([p for p, _ in asked], [text for _, text in asked])
        scores = dict(zip(asked, (rating.score for rating in ratings), strict=True))
        return [
            [scores.get((prompt, text), LEAST_RATING) for text in texts]
            for prompt, texts in zip(prompts, stripped, strict=True)
        ]

    def _win_rates(
        self, judge: Judge, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Mean probability of each candidate to be preferred to the others of its prompt."""
        stripped = [[text.strip() for text in texts] for texts in candidates]
        asked = [
            (prompt, *pair)
            for prompt, texts in zip(prompts, stripped, strict=True)
            for pair in itertools.combinations(sorted({*texts} - {""}), 2)
        ]
        asked = list(dict.fromkeys(asked))
        columns = [[row[n] for row in asked] for n in range(3)]
        results = judge.compare(columns[0], columns[1], columns[2])
        wins = {row: x.probability for row, x in zip(asked, results, strict=True)}

        def beats(prompt: str, text: str, other: str) -> float:
            if text == other:
                return 0.5
            if not (text and other):
                return float(bool(text))
            first, second = sorted((text, other))
            probability = wins[prompt, first, second]
            return probability if text == first else 1 - probability

        return [
            [
                sum(beats(prompt, text, other) for m, other in enumerate(texts) if m != n)
                / max(1, len(texts) - 1)
                for n, text in enumerate(texts)
            ]
            for prompt, texts in zip(prompts, stripped, strict=True)
        ]


def load_critic(
    settings: JudgeConfig, reward: str, thinker: Any, lookahead: int, device: torch.device
) -> Critic:
    """Load what the ``judge`` section of a config names.

    Args:
        settings: Section ``judge`` of the config.
        reward: ``loss.reward``: reward_model asks for a classifier, others for a judge.
        thinker: `QuietStarForCausalLM` that trains.
        lookahead: Tokens of a continuation where the section names no number.
        device: Where the model trains, and the judge is.

    Raises:
        UserError: A model or template that cannot be used.
    """
    num_tokens = lookahead if settings.continuation is None else settings.continuation
    writing, place = Writing(num_tokens), str(device)
    kind: Kind = "pair" if settings.mode == "pairs" else "rating"
    with naming_keys():
        if reward == "reward_model":
            assert settings.model is not None, "the config was validated"
            return Critic(RewardModel.load(settings.model, device=place), writing)
        given = {"template": settings.template, "rationale_tokens": settings.rationale}
        if settings.model is None:
            if thinker.passes_together:
                raise UserError(
                    "judge.model (null): the base of the model that trains cannot judge where "
                    "weights are sharded (ZeRO-3, FSDP2). Set judge.model to a folder."
                )
            base = thinker.language_model
            judge = Judge(base, thinker.tokenizer, **given)
            judge.check(kind)
            return Critic(judge, writing, settings.mode, base.disable_adapter)
        if is_classifier(settings.model):
            raise UserError(
                f"judge.model ({settings.model}): is a sequence classifier, and loss.reward: judge "
                "asks a causal LM. Set loss.reward: reward_model."
            )
        judge = Judge.load(settings.model, device=place, **given)
        with of_model(settings.model):
            judge.check(kind)
        return Critic(judge, writing, settings.mode)


@contextmanager
def naming_keys() -> Iterator[None]:
    """Names keys of a config where a judge names options of the command line."""
    try:
        yield
    except UserError as problem:
        message = str(problem)
        for option in ("model", "template", "chat", "rationale", "cache", "device"):
            message = message.replace(f"--{option}", f"judge.{option}")
        raise UserError(message) from problem


def _flat(rows: Sequence[Sequence[str]]) -> list[str]:
    return [text for row in rows for text in row]
