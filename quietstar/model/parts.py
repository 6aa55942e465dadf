"""What a Quiet-STaR model is made of, and the passes that training and looking share."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar.attention.layout import IGNORE_INDEX, TextAhead, text_ahead
from quietstar.backbone.learn import LearnStates, learn_pass
from quietstar.backbone.loading import initial_embedding
from quietstar.backbone.output_head import OutputHead, find_output_head
from quietstar.backbone.run import embedding_weight, num_virtual
from quietstar.config import LossConfig, MixingHeadConfig, ThoughtsConfig, TuningConfig
from quietstar.losses.scores import next_token_entropy
from quietstar.model.mixing_head import MixingHead
from quietstar.sampling.positions import LEARNED_RULES, SCORED_RULES, choose_positions
from quietstar.sampling.rollout import Sampling, TextRun, sample_thoughts


class ThinkingParts(nn.Module):
    """A causal LM, the two learned vectors and the mixing head.

    Args:
        language_model: The causal LM, or a PEFT model around it; its architecture was checked.
        thoughts: Length, lookahead, number and temperature.
        mixing_head: Settings of the head.
        loss: Weights, estimator, reward.
        vocab_size: Tokens of the tokenizer; rows of the vocabulary beyond are never sampled.
        pause_token_id: Stands for every thought token in the pause control of evaluations.
        tuning: How ``language_model`` was made to train (`quietstar.model.tuning.apply_tuning`).
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
        # Tokens of thoughts that learn at once (`quietstar.model.learning`); None: all.
        self.block_tokens: int | None = None

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

    # --- Passes -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _choose(
        self,
        labels: Tensor,
        answers: Tensor | None,
        text: TextRun | None,
        sample_ids: Tensor,
        seed: int,
        explore: bool,
    ) -> Tensor | None:
        score = None
        if self.thoughts.positions in SCORED_RULES:
            assert text is not None, "the text ran"
            score = self._score_positions(text.states)
        return choose_positions(
            self.thoughts.positions,
            self.thoughts.position_fraction,
            labels,
            answers=answers,
            score=score,
            sample_ids=sample_ids,
            seed=seed,
            explore=explore,
        )

    def _score_positions(
        self, states: Float[Tensor, "batch seq width"]
    ) -> Float[Tensor, "batch seq"]:
        """By which `SCORED_RULES` choose."""
        rule = self.thoughts.positions
        score = torch.ones_like(states[..., 0])
        if rule in LEARNED_RULES:
            ahead = TextAhead.at_neighbours(states, 1, 0, states.shape[1])
            score = self.mixing_head(ahead, torch.zeros_like(states)[None, None])[0, 0]
        return score if rule == "weight" else score * next_token_entropy(states, self.output_head)

    def _sample(
        self,
        input_ids: Tensor,
        sample_ids: Tensor,
        sampling: Sampling,
        positions: Tensor | None,
        text: TextRun | None = None,
    ) -> Tensor:
        if self.thoughts.sampler == "pause":
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
        ahead = text_ahead(states.text, states.ahead.shape[0], positions)
        return states, self.mixing_weight(ahead, states.ahead, fixed_mixing_weight)

    def mixing_weight(
        self, text: TextAhead, ahead: Tensor, fixed: float | None
    ) -> Float[Tensor, "lookahead thoughts batch positions"]:
        """From text states and those behind thoughts; ``fixed`` stands in for the head's output."""
        weight = self.mixing_head(text, ahead)
        if fixed is None:
            return weight
        # The head stays in the graph, with gradient zero: DDP wants every parameter used.
        return weight * 0.0 + fixed

    def _check_length(self, input_ids: Tensor) -> None:
        longest = self.max_text_length
        if longest is not None and input_ids.shape[1] > longest:
            raise ValueError(
                f"a text of {input_ids.shape[1]} tokens leaves no room for a thought: with "
                f"thoughts.length {self.thoughts.length} and thoughts.lookahead "
                f"{self.thoughts.lookahead} this model takes at most {longest}. Shorten it."
            )


def target_labels(
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
