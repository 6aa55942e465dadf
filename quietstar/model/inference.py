"""Looking at a model: its thoughts, its scores with and without them, the texts it generates."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from quietstar.backbone.learn import plain_pass
from quietstar.errors import UserError
from quietstar.generation.gates import Gate
from quietstar.generation.generate import generate
from quietstar.losses.quiet_star import next_token_loss, quiet_star_loss
from quietstar.losses.scores import mixed_candidates, mixed_predictions
from quietstar.model.metrics import plain_metrics, thought_metrics
from quietstar.model.outputs import MixedScores, PlainScores, Thoughts
from quietstar.model.parts import ThinkingParts, target_labels
from quietstar.sampling.positions import SCORED_RULES
from quietstar.sampling.rollout import Sampling, run_text


class ThinkingInference(ThinkingParts):
    """What can be asked of a model that thinks; nothing here trains."""

    @torch.no_grad()
    def think(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        *,
        thoughts: Int[Tensor, "batch thoughts positions length"] | None = None,
        num_thoughts: int = 1,
        temperature: float | None = None,
        positions: Int[Tensor, "batch positions"] | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        seed: int = 0,
    ) -> Thoughts:
        """Think at every position and say what it did to the prediction of the true tokens.

        Args:
            input_ids: Texts, padded on the right if at all.
            attention_mask: (batch, seq), true (or 1) for real tokens.
            labels: As in `forward`.
            thoughts: Score these thoughts instead of sampling.
            num_thoughts: Thoughts a position.
            temperature: Of the sampling; None takes the most likely tokens.
            positions: Think there only: ascending, -1 behind the last of a text with fewer
                (`choose_positions`).
            sample_ids: As in `forward`; by default 0, 1, ...
            seed: Of the noise.

        Raises:
            ValueError: A text too long for the model, or padded on the left.
        """
        labels = target_labels(input_ids, attention_mask, labels)
        self._check_length(input_ids)
        if thoughts is None:
            thoughts = self.sample(
                input_ids,
                num_thoughts=num_thoughts,
                temperature=temperature,
                positions=positions,
                sample_ids=sample_ids,
                seed=seed,
            )
        tokens = Thoughts.to_engine(thoughts)
        states, weight = self.states_with(input_ids, tokens, positions)
        head = self.output_head
        _, scored = quiet_star_loss(
            states, weight, tokens, labels, head, self.loss, 1.0, scoring=True, positions=positions
        )
        return Thoughts.from_scored(scored, thought_metrics(scored))

    @torch.no_grad()
    def sample(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        num_thoughts: int = 1,
        temperature: float | None = None,
        positions: Int[Tensor, "batch positions"] | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        seed: int = 0,
    ) -> Int[Tensor, "batch thoughts positions length"]:
        """Thoughts at every (chosen) position, not scored; arguments as in `think`."""
        self._check_length(input_ids)
        if sample_ids is None:
            sample_ids = torch.arange(input_ids.shape[0], device=input_ids.device)
        sampling = Sampling(num_thoughts, self.thoughts.length, temperature, seed)
        return self._sample(input_ids, sample_ids, sampling, positions).permute(2, 1, 3, 0)

    @torch.no_grad()
    def choose_positions(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        *,
        answers: Bool[Tensor, "batch seq"] | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        seed: int = 0,
    ) -> Int[Tensor, "batch positions"] | None:
        """Where to think in these texts by ``thoughts.positions``; None for all.

        Ascending, -1 behind the last of a text with fewer; arguments as in `forward`. Training
        thinks there too, but leaves a quarter of the positions of ``weight`` and
        ``weighted_entropy`` to chance.
        """
        if self.thoughts.positions == "all":
            return None
        labels = target_labels(input_ids, attention_mask, labels)
        if sample_ids is None:
            sample_ids = torch.arange(input_ids.shape[0], device=input_ids.device)
        scored = self.thoughts.positions in SCORED_RULES
        text = run_text(self.causal_lm, input_ids) if scored else None
        return self._choose(labels, answers, text, sample_ids, seed, explore=False)

    @torch.no_grad()
    def generate(
        self,
        inputs: Int[Tensor, "batch seq"] | None = None,
        *,
        think: bool | Gate = True,
        num_thoughts: int = 1,
        thought_temperature: float | None = None,
        seed: int = 0,
        streamer: BaseStreamer | None = None,
        **arguments: Any,
    ) -> Any:
        """Generate texts, thinking before each new token (`quietstar.generation.generate`).

        Thoughts are dropped after use; the text is never run twice.

        Args:
            inputs: Texts, padded on the left if at all; also as ``input_ids``.
            think: False: what the plain model generates. A `Gate`: texts think
                where it says so.
            num_thoughts: Before each token; their predictions are averaged.
            thought_temperature: Of thoughts; None takes the most likely tokens. (``temperature``
                is that of the text, as in transformers.)
            seed: Of the thoughts' noise.
            streamer: Is given each new token.
            **arguments: Those of transformers' ``generate``: ``attention_mask``,
                ``max_new_tokens``, ``do_sample``, ``top_p``, ``num_return_sequences``,
                ``generation_config``, ``logits_processor``, ``stopping_criteria``, ...

        Returns:
            Token ids, (batch * num_return_sequences, prompt and new); with
            ``return_dict_in_generate`` a `ThinkingOutput`, with the thoughts.

        Raises:
            UserError: No texts, beams, or more tokens than the model has positions.
        """
        inputs = arguments.pop("input_ids", None) if inputs is None else inputs
        if inputs is None:
            raise UserError("inputs: no texts are given; write generate(input_ids, ...)")
        sampling = Sampling(num_thoughts, self.thoughts.length, thought_temperature, seed)
        return generate(self, inputs, sampling, think, streamer, arguments)

    @torch.no_grad()
    def score_plain(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        candidates: Int[Tensor, " candidates"] | None = None,
    ) -> PlainScores:
        """Predict the next tokens without thoughts, as the plain model does.

        Args:
            input_ids: Texts, padded on the right if at all.
            attention_mask: (batch, seq), true (or 1) for real tokens.
            labels: As in `forward`.
            candidates: Tokens whose logits are wanted.
        """
        labels = target_labels(input_ids, attention_mask, labels)
        states = plain_pass(self.causal_lm, input_ids)
        _, result, valid = next_token_loss(states, labels, self.output_head, scoring=True)
        assert result.predicted is not None, "scoring was asked for"
        shape = input_ids.shape
        metrics = plain_metrics(result.nll, valid)
        few = None if candidates is None else self.output_head.candidate_logits(states, candidates)
        return PlainScores(
            -result.nll.view(shape), result.predicted.view(shape), valid, metrics, few
        )

    @torch.no_grad()
    def score_mixed(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None,
        labels: Int[Tensor, "batch seq"],
        thoughts: Int[Tensor, "batch thoughts positions length"],
        positions: Int[Tensor, "batch positions"] | None = None,
        candidates: Int[Tensor, " candidates"] | None = None,
    ) -> MixedScores:
        """Predict the next tokens with these thoughts, as `think` does, but for less.

        Args:
            input_ids: Texts, padded on the right if at all.
            attention_mask: (batch, seq), true (or 1) for real tokens.
            labels: As in `forward`.
            thoughts: From `sample`, or any.
            positions: Of the thoughts; None for all.
            candidates: Tokens whose logits are wanted.
        """
        labels = target_labels(input_ids, attention_mask, labels)
        self._check_length(input_ids)
        states, weight = self.states_with(input_ids, Thoughts.to_engine(thoughts), positions)
        states, weight, head = states.next_only(), weight[:1], self.output_head
        result = mixed_predictions(states, weight, labels, head, positions)
        few = None
        if candidates is not None:
            few = mixed_candidates(states, weight, head, candidates, positions).transpose(0, 1)
        assert result.predicted is not None, "it was asked for"
        logprobs, predicted = (x[0].transpose(0, 1) for x in (-result.mixed, result.predicted))
        return MixedScores(logprobs, predicted, few)
