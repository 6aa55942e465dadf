"""`QuietStarForCausalLM`: any Hugging Face causal LM that thinks at every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar.backbone.learn import plain_pass
from quietstar.backbone.loading import drop_dropout_layers, load_base
from quietstar.backbone.run import embedding_weight
from quietstar.config import LossConfig, MixingHeadConfig, ThoughtsConfig, TuningConfig
from quietstar.data.tokenizer import check_tokenizer_fits, load_tokenizer
from quietstar.losses.quiet_star import (
    choose_policy_temperature,
    next_token_loss,
    quiet_star_loss,
)
from quietstar.losses.scores import ScoredThoughts
from quietstar.model import saving
from quietstar.model.inference import ThinkingInference
from quietstar.model.learning import Step, learn_in_groups
from quietstar.model.metrics import plain_metrics, thought_metrics
from quietstar.model.outputs import QuietStarOutput
from quietstar.model.parts import target_labels
from quietstar.model.self_check import check_architecture, use_thinking_attention
from quietstar.model.tuning import apply_tuning
from quietstar.model.tuning.peft_methods import keep_gradients_of_4bit, quantization
from quietstar.sampling.positions import SCORED_RULES
from quietstar.sampling.rollout import Sampling, TextRun, run_text


class QuietStarForCausalLM(ThinkingInference):
    """A causal LM with the two learned vectors and the mixing head of Quiet-STaR.

    Build one with `from_base` (a plain model) or `from_pretrained` (a saved Quiet-STaR model).
    Both phases, sampling and learning, run inside `forward`, so DDP, FSDP and DeepSpeed see them.
    """

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
        """Save everything that was learned, as safetensors and JSON (`quietstar.model.saving`).

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
        labels = target_labels(input_ids, attention_mask, labels)
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
        text = self._text_before(input_ids)
        positions = self._choose(labels, answers, text, sample_ids, seed, explore=True)
        thoughts = self._sample(input_ids, sample_ids, sampling, positions, text)
        step = Step(
            input_ids, labels, thoughts, positions, num_items_in_batch, num_thought_items,
            choose_policy_temperature(self.loss, self.thoughts.temperature), fixed_mixing_weight,
        )  # fmt: skip
        if text is not None and self.block_tokens is not None:
            loss, scored = learn_in_groups(self, text, step, self.block_tokens)
        else:
            loss, scored = self._learn_at_once(step)
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

    def _text_before(self, input_ids: Tensor) -> TextRun | None:
        """The text, where something needs it before the rollout would run it.

        Learning in groups does, with its graph; a choice of positions by score does.
        """
        if self.block_tokens is not None:
            return run_text(self.causal_lm, input_ids)
        if self.thoughts.positions not in SCORED_RULES:
            return None
        with torch.no_grad():
            return run_text(self.causal_lm, input_ids)

    def _learn_at_once(self, step: Step) -> tuple[Tensor, ScoredThoughts]:
        """The loss with the graph of text and all blocks alive at once."""
        states, weight = self.states_with(
            step.input_ids, step.thoughts, step.positions, step.fixed_mixing_weight
        )
        return quiet_star_loss(
            states,
            weight,
            step.thoughts,
            step.labels,
            self.output_head,
            self.loss,
            step.policy_temperature,
            step.num_items,
            positions=step.positions,
            num_thought_items=step.num_thought_items,
        )


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[0] if ids else 0  # a text without tokens is refused where the vectors are set
