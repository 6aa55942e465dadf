"""`QuietStarForCausalLM`: any Hugging Face causal LM that thinks at every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from quietstar import saving
from quietstar.config import LossConfig, MixingHeadConfig, ThoughtsConfig, TuningConfig
from quietstar.data.tokenizer import check_tokenizer_fits, load_tokenizer
from quietstar.engine.backbone import embedding_weight, num_virtual
from quietstar.engine.layout import IGNORE_INDEX
from quietstar.engine.learn import LearnStates, learn_pass, plain_pass
from quietstar.engine.positions import choose_positions
from quietstar.engine.rollout import Sampling, TextRun, run_text, sample_thoughts
from quietstar.engine.self_check import check_architecture, use_thinking_attention
from quietstar.errors import UserError
from quietstar.gates import Gate
from quietstar.generation import generate
from quietstar.loading import drop_dropout_layers, initial_embedding, load_base
from quietstar.losses.output_head import OutputHead, find_output_head
from quietstar.losses.quiet_star import (
    ScoredThoughts,
    choose_policy_temperature,
    mixed_candidates,
    mixed_predictions,
    next_token_entropy,
    next_token_loss,
    quiet_star_loss,
)
from quietstar.metrics import plain_metrics, thought_metrics
from quietstar.mixing_head import MixingHead
from quietstar.outputs import MixedScores, PlainScores, QuietStarOutput, Thoughts
from quietstar.tuning import apply_tuning
from quietstar.tuning.peft_methods import keep_gradients_of_4bit, quantization


class QuietStarForCausalLM(nn.Module):
    """A causal LM with the two learned vectors and the mixing head of Quiet-STaR.

    Build one with `from_base` (a plain model) or `from_pretrained` (a saved Quiet-STaR model).
    Both phases, sampling and learning, run inside `forward`, so DDP, FSDP and DeepSpeed see them.

    Args:
        language_model: The causal LM, or a PEFT model around it; its architecture was checked.
        thoughts: Length, lookahead, number and temperature.
        mixing_head: Settings of the head.
        loss: Weights, estimator, reward.
        vocab_size: Tokens of the tokenizer; rows of the vocabulary beyond are never sampled.
        pause_token_id: Stands for every thought token in the pause control of evaluations.
        tuning: How ``language_model`` was made to train (`quietstar.tuning.apply_tuning`).
    """

    def __init__(
        self,
        language_model: nn.Module,
        thoughts: ThoughtsConfig,
        mixing_head: MixingHeadConfig,
        loss: LossConfig,
        vocab_size: int,
        pause_token_id: int = 0,
        tuning: TuningConfig | None = None,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.tuning = tuning or TuningConfig()
        self.thoughts, self.loss, self.mixing_head_config = thoughts, loss, mixing_head
        self.vocab_size, self.pause_token_id = vocab_size, pause_token_id
        device = embedding_weight(self.causal_lm).device
        size = embedding_weight(self.causal_lm).shape[1]
        head = find_output_head(self.causal_lm)
        self.start_embedding = nn.Parameter(torch.zeros(size, device=device))
        self.end_embedding = nn.Parameter(torch.zeros(size, device=device))
        self.mixing_head = MixingHead(head.weight.shape[1], mixing_head).to(device)
        self._calls = 0

    # --- Making and keeping -----------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        name_or_path: str | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        thoughts: ThoughtsConfig | None = None,
        mixing_head: MixingHeadConfig | None = None,
        loss: LossConfig | None = None,
        tuning: TuningConfig | None = None,
        dtype: torch.dtype | str = torch.float32,
        **hub: Any,
    ) -> QuietStarForCausalLM:
        """Turn a plain causal LM into one that thinks.

        Args:
            name_or_path: Hub id, folder, or a loaded model.
            tokenizer: By default the one that lies with the model.
            thoughts: Length, lookahead, number, temperature, initial vectors.
            mixing_head: Settings of the head.
            loss: Weights, estimator, reward.
            tuning: Which weights train.
            dtype: Of the weights; float32 trains safely with small learning rates.
            **hub: ``revision``, ``trust_remote_code``.

        Raises:
            UserError: The model cannot be loaded or its architecture is not supported, or the
                tokenizer does not fit it.
        """
        thoughts, tuning = thoughts or ThoughtsConfig(), tuning or TuningConfig()
        if isinstance(name_or_path, str):
            tokenizer = tokenizer or load_tokenizer(name_or_path, **hub)
            base = load_base(name_or_path, dtype=dtype, quantization=quantization(tuning), **hub)
        else:
            base = name_or_path
            drop_dropout_layers(base)
            tokenizer = tokenizer or load_tokenizer(str(base.name_or_path), **hub)
        check_architecture(base)
        check_tokenizer_fits(tokenizer, embedding_weight(base).shape[0])
        use_thinking_attention(base)
        keep_gradients_of_4bit(base)
        model = cls(
            apply_tuning(base, tuning),
            thoughts,
            mixing_head or MixingHeadConfig(),
            loss or LossConfig(),
            len(tokenizer),
            _first_token(tokenizer, thoughts.start_init),
            tuning,
        )
        model.initialise_vectors(tokenizer)
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Save everything that was learned, as safetensors and JSON (`quietstar.saving`).

        Args:
            folder: Made if need be.
            tokenizer: Saved beside the model.
            weights: To save in place of the model's own, where an engine holds them in pieces.
        """
        saving.save_pretrained(self, Path(folder), tokenizer, weights)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        trainable: bool = False,
        **hub: Any,
    ) -> QuietStarForCausalLM:
        """Load a saved Quiet-STaR model: what was saved is what is used.

        Args:
            folder: Written by `save_pretrained`.
            dtype: Of the language model's weights; by default the one they were trained in.
            trainable: Whether adapters can be trained further.
            **hub: ``revision`` (of an adapter's base; the one trained on by default) and
                ``trust_remote_code``.

        Raises:
            UserError: The folder holds no Quiet-STaR model.
        """
        return saving.from_pretrained(cls, Path(folder), dtype=dtype, trainable=trainable, **hub)

    # --- The parts --------------------------------------------------------------------------------

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face causal LM itself (adapters, if any, are inside its layers)."""
        model = self.language_model
        get_base_model = getattr(model, "get_base_model", None)
        return get_base_model() if get_base_model is not None else model  # pyright: ignore

    @property
    def output_head(self) -> OutputHead:
        """From final states to logits."""
        return find_output_head(self.causal_lm, self.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the learned vectors are."""
        return self.start_embedding.device

    @property
    def max_text_length(self) -> int | None:
        """Longest text that leaves room for a block; None if the model has no limit."""
        config = self.causal_lm.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None:
            return None
        block = self.thoughts.length + self.thoughts.lookahead + 1
        return positions - block - num_virtual(self.causal_lm)

    def configure(self, thoughts: ThoughtsConfig, loss: LossConfig) -> None:
        """Think and learn by other settings from now on; weights stay."""
        self.thoughts, self.loss = thoughts, loss

    def initial_vectors(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Float[Tensor, " embedding"], Float[Tensor, " embedding"]]:
        """The input embeddings of ``start_init`` and ``end_init``.

        Raises:
            UserError: A text without tokens.
        """
        return tuple(  # pyright: ignore[reportReturnType]
            initial_embedding(
                self.causal_lm, tokenizer, getattr(self.thoughts, name), f"thoughts.{name}"
            )
            for name in ("start_init", "end_init")
        )

    @torch.no_grad()
    def initialise_vectors(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set both vectors to `initial_vectors`.

        Raises:
            UserError: A text without tokens.
        """
        start, end = self.initial_vectors(tokenizer)
        self.start_embedding.copy_(start)
        self.end_embedding.copy_(end)

    # --- Training ---------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        answers: Bool[Tensor, "batch seq"] | None = None,
        num_thought_items: Tensor | int | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        seed: int = 0,
        fixed_mixing_weight: float | None = None,
        think: bool = True,
    ) -> QuietStarOutput:
        """Sample thoughts at every position (or those of ``thoughts.positions``); the loss.

        Args:
            input_ids: Texts, padded on the right if at all.
            attention_mask: (batch, seq), true (or 1) for real tokens.
            labels: Token ids where a token is a target, -100 elsewhere; default: all real tokens.
            num_items_in_batch: Valid targets of the whole optimiser step, over micro-batches and
                ranks; by default those of this batch.
            answers: True at a token of an answer; only ``thoughts.positions: answer`` reads it.
            num_thought_items: Like ``num_items_in_batch``, those behind a thought.
            sample_ids: Index of each text in the run. Keys the noise, so that the same text draws
                the same thoughts however batches are cut. By default the texts of all calls are
                counted.
            seed: Of the noise.
            fixed_mixing_weight: Stands in for the head's output (warm-up of the gate).
            think: Without it the loss is that of plain language modelling.

        Raises:
            ValueError: A text too long for the model, or padded on the left, or answers missing.
        """
        labels = _target_labels(input_ids, attention_mask, labels)
        if not think:
            return self._next_token(input_ids, labels, num_items_in_batch)
        self._check_length(input_ids)
        if sample_ids is None:
            first = self._calls * input_ids.shape[0]
            sample_ids = torch.arange(first, first + input_ids.shape[0], device=input_ids.device)
            self._calls += 1
        sampling = Sampling(
            self.thoughts.num_thoughts, self.thoughts.length, self.thoughts.temperature, seed
        )
        # Only the choice by entropy needs the text before the rollout runs it.
        text = self._run_text(input_ids) if self.thoughts.positions == "entropy" else None
        positions = self._choose(labels, answers, text, sample_ids, seed)
        thoughts = self._sample(input_ids, sample_ids, sampling, positions, text)
        loss, scored = self._learn(
            input_ids,
            labels,
            thoughts,
            positions,
            (num_items_in_batch, num_thought_items),
            fixed_mixing_weight,
        )
        return QuietStarOutput(
            loss=loss,
            metrics=thought_metrics(scored),
            thoughts=thoughts.permute(2, 1, 3, 0),
            input_ids=input_ids,
            positions=positions,
        )

    def _next_token(
        self, input_ids: Tensor, labels: Tensor, num_items: Tensor | int | None
    ) -> QuietStarOutput:
        states = plain_pass(self.causal_lm, input_ids)
        loss, result, valid = next_token_loss(states, labels, self.output_head, num_items)
        metrics = plain_metrics(result.nll, valid)
        return QuietStarOutput(loss=loss, metrics=metrics, input_ids=input_ids)

    def _run_text(self, input_ids: Tensor) -> TextRun:
        return run_text(self.causal_lm, input_ids, self.thoughts.length)

    @torch.no_grad()
    def _choose(
        self,
        labels: Tensor,
        answers: Tensor | None,
        text: TextRun | None,
        sample_ids: Tensor,
        seed: int,
    ) -> Tensor | None:
        entropy = None if text is None else next_token_entropy(text.states, self.output_head)
        return choose_positions(
            self.thoughts.positions,
            self.thoughts.share,
            labels,
            answers=answers,
            entropy=entropy,
            sample_ids=sample_ids,
            seed=seed,
        )

    def _sample(
        self,
        input_ids: Tensor,
        sample_ids: Tensor,
        sampling: Sampling,
        positions: Tensor | None,
        text: TextRun | None = None,
    ) -> Tensor:
        if self.thoughts.source == "pause":
            places = input_ids if positions is None else positions
            shape = (sampling.thought_length, sampling.num_thoughts, *places.shape)
            return input_ids.new_full(shape, self.pause_token_id)
        return sample_thoughts(
            self.causal_lm,
            self.output_head,
            self.start_embedding,
            input_ids,
            sample_ids,
            sampling,
            positions,
            text,
        )

    def _learn(
        self,
        input_ids: Tensor,
        labels: Tensor,
        thoughts: Tensor,
        positions: Tensor | None,
        counts: tuple[Tensor | int | None, Tensor | int | None] = (None, None),
        fixed_mixing_weight: float | None = None,
    ) -> tuple[Tensor, ScoredThoughts]:
        states, weight = self.states_with(input_ids, thoughts, positions, fixed_mixing_weight)
        temperature = choose_policy_temperature(self.loss, self.thoughts.temperature)
        return quiet_star_loss(
            states,
            weight,
            thoughts,
            labels,
            self.output_head,
            self.loss,
            temperature,
            counts[0],
            positions=positions,
            num_thought_items=counts[1],
        )

    def states_with(
        self,
        input_ids: Tensor,
        thoughts: Tensor,
        positions: Tensor | None,
        fixed_mixing_weight: float | None = None,
    ) -> tuple[LearnStates, Tensor]:
        """States of the learn pass, and the mixing weight."""
        states = learn_pass(
            self.causal_lm,
            self.start_embedding,
            self.end_embedding,
            input_ids,
            thoughts,
            self.thoughts.lookahead,
            positions,
        )
        return states, self._mixing_weight(states, positions, fixed_mixing_weight)

    def _mixing_weight(
        self, states: LearnStates, positions: Tensor | None, fixed: float | None
    ) -> Float[Tensor, "lookahead thoughts batch positions"]:
        weight = self.mixing_head(states.text, states.ahead, positions)
        if fixed is None:
            return weight
        # The head stays in the graph, with gradient zero: DDP wants every parameter used.
        return weight * 0.0 + fixed

    # --- Looking ----------------------------------------------------------------------------------

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
        labels = _target_labels(input_ids, attention_mask, labels)
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
        """Where training would think in these texts (``thoughts.positions``); None for all.

        Ascending, -1 behind the last of a text with fewer; arguments as in `forward`.
        """
        if self.thoughts.positions == "all":
            return None
        labels = _target_labels(input_ids, attention_mask, labels)
        if sample_ids is None:
            sample_ids = torch.arange(input_ids.shape[0], device=input_ids.device)
        text = self._run_text(input_ids) if self.thoughts.positions == "entropy" else None
        return self._choose(labels, answers, text, sample_ids, seed)

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
        """Generate texts, thinking before each new token (`quietstar.generation`).

        Thoughts are dropped after use; the text is never run twice.

        Args:
            inputs: Texts, padded on the left if at all; also as ``input_ids``.
            think: False: what the plain model generates. A gate (`quietstar.gates`): texts think
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
        labels = _target_labels(input_ids, attention_mask, labels)
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
        labels = _target_labels(input_ids, attention_mask, labels)
        self._check_length(input_ids)
        states, weight = self.states_with(input_ids, Thoughts.to_engine(thoughts), positions)
        states, weight, head = states.next_only(), weight[:1], self.output_head
        result = mixed_predictions(states, weight, labels, head, positions)
        few = None
        if candidates is not None:
            few = mixed_candidates(states, weight, head, candidates, positions).transpose(0, 1)
        assert result.predicted is not None, "it was asked for"
        logprobs, predicted = (
            x.view(weight.shape)[0].transpose(0, 1) for x in (-result.nll, result.predicted)
        )
        return MixedScores(logprobs, predicted, few)

    def _check_length(self, input_ids: Tensor) -> None:
        longest = self.max_text_length
        if longest is not None and input_ids.shape[1] > longest:
            raise ValueError(
                f"a text of {input_ids.shape[1]} tokens leaves no room for a thought: with "
                f"thoughts.length {self.thoughts.length} and thoughts.lookahead "
                f"{self.thoughts.lookahead} this model takes at most {longest}. Shorten it."
            )


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[0] if ids else 0  # a text without tokens is refused where the vectors are set


def _target_labels(
    input_ids: Tensor,
    attention_mask: Bool[Tensor, "batch seq"] | Tensor | None,
    labels: Tensor | None,
) -> Int[Tensor, "batch seq"]:
    """Labels with padding ignored.

    Raises:
        ValueError: Padding on the left.
    """
    labels = input_ids if labels is None else labels
    if attention_mask is None:
        return labels
    real = attention_mask.bool()
    padded_right = (real[:, 1:] <= real[:, :-1]).all()
    message = "texts must be padded on the right (tokenizer.padding_side = 'right')"
    if real.device.type != "cpu":
        torch._assert_async(padded_right, message)  # pyright: ignore  (no host sync)
    elif not padded_right:
        raise ValueError(message)
    return labels.where(real, IGNORE_INDEX)
