"""`QuietStarForCausalLM`: any Hugging Face causal LM that thinks before it predicts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quietstar import registry
from quietstar.algorithm import Step, choose, draw, learn
from quietstar.backbone.output_head import OutputHead, find_output_head
from quietstar.backbone.run import (
    embedding_weight,
    num_virtual,
    plain_pass,
    recomputing,
    run_text,
)
from quietstar.checks import (
    check_objective,
    check_ratio,
    check_reference,
    check_same_positions,
    check_same_texts,
    check_teacher,
    checked_labels,
    void_if_failed,
)
from quietstar.config import LossConfig, MixingHeadConfig, ThoughtsConfig, TuningConfig, loss_config
from quietstar.errors import UserError
from quietstar.generation.generate import generate
from quietstar.losses.distillation import TeacherTargets, plain_student_loss
from quietstar.losses.next_token import next_token_loss
from quietstar.model import building, saving, scoring
from quietstar.model.configuration import QuietStarModelConfig
from quietstar.model.markers import (
    find_stop,
    frozen_markers,
    marker_vectors,
)
from quietstar.model.mixing_head import MixingHead
from quietstar.model.outputs import (
    QuietStarOutput,
    ThoughtMetrics,
    decode_thoughts,
    plain_metrics,
    thought_metrics,
)
from quietstar.model.policy import LivePolicy
from quietstar.model.scoring import (
    check_thoughts_given,
    checked_texts,
    next_logits,
    positions_of,
    teach,
)
from quietstar.rewards import find_reward
from quietstar.sampling.positions import LEARNED_RULES
from quietstar.sampling.thoughts import Sampling, ThoughtBatch


class QuietStarForCausalLM(PreTrainedModel):
    """A causal LM with the learned start and end vectors and the mixing head of Quiet-STaR.

    Build one with `from_base` (a plain model) or `from_pretrained` (a saved Quiet-STaR model).
    Both phases, sampling and learning, run inside `forward`, so DDP, FSDP and DeepSpeed see them.
    transformers' ``Trainer``, ``pipeline`` and Auto classes take it as one of their own models.

    Args:
        language_model: Causal LM, or a PEFT model around it; its architecture was checked.
        thoughts: Length, lookahead, number, positions and sampler of the thoughts.
        mixing_head: Settings of the head.
        loss: Objective, reward and their settings; only training reads them.
        vocab_size: Tokens of the tokenizer; rows of the vocabulary beyond are never sampled.
        pause_token_id: Token that stands for every thought token in the pause control.
        tuning: Way in which ``language_model`` was made to train.
        tokenizer: Tokenizer of the model, which ``thoughts.stop`` needs, and markers that do not
            train.
        num_markers: Vectors that open, and that close a thought.
    """

    def __init__(
        self,
        language_model: nn.Module,
        thoughts: ThoughtsConfig,
        mixing_head: MixingHeadConfig,
        loss: LossConfig | None,
        vocab_size: int,
        pause_token_id: int = 0,
        tuning: TuningConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_markers: tuple[int, int] = (1, 1),
    ) -> None:
        base: Any = getattr(language_model, "get_base_model", lambda: language_model)()
        super().__init__(QuietStarModelConfig(base.config, name_or_path=base.config.name_or_path))
        self.all_tied_weights_keys = {}  # those of the language model are its own
        self.tokenizer, self.stop = tokenizer, None
        # Tokens of markers that do not train.
        self.frozen_markers: tuple[Tensor, Tensor] | None = None
        self.judge: Any = None  # a `quietstar.judging.Critic`, which rewards may ask
        # From the sample_ids of texts to the records that they are made of, for rewards.
        self.records: Callable[[list[int]], list[dict[str, Any]]] | None = None
        self.language_model = language_model
        self.tuning = tuning or TuningConfig()
        self.mixing_head_config = mixing_head
        self.vocab_size, self.pause_token_id = vocab_size, pause_token_id
        self.num_embeddings = base.config.get_text_config().vocab_size  # unused rows included
        # Weights that a device map keeps elsewhere until they are needed are "meta" until then.
        here = (p.device for p in self.causal_lm.parameters() if p.device.type != "meta")
        device = next(here, embedding_weight(self.causal_lm).device)
        size = embedding_weight(self.causal_lm).shape[1]
        # One vector is saved as (embedding,), as it was when there was never more than one.
        self.num_markers = num_markers
        start, end = ((count, size) if count > 1 else (size,) for count in num_markers)
        self.start_embedding = nn.Parameter(torch.zeros(start, device=device))
        self.end_embedding = nn.Parameter(torch.zeros(end, device=device))
        self.configure(thoughts, loss or loss_config())
        for module in language_model.modules():
            # On a CPU bitsandbytes repacks 4-bit layers after a forward pass in eval mode, as a
            # rollout may be, and from then on no gradient flows.
            if type(module).__name__ == "Linear4bit":
                module.support_avx512bf16_for_cpu = False  # pyright: ignore
        head = find_output_head(self.causal_lm)
        self.mixing_head = MixingHead(head.weight.shape[1], mixing_head).to(device)
        self.has_frozen_adapters = False  # of a saved model that was loaded for use
        self.texts_seen = 0  # keys the noise of texts that come without an index
        # Most block tokens that learn at once (`quietstar.losses.groups`), and text tokens whose
        # activations are kept; None: all, with an ordinary graph, as engines that shard the weights
        # need it.
        self.learn_chunk_tokens: int | None = None
        # Whether every pass gathers weights from other processes, which then must run as many.
        self.passes_together = False

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face causal LM itself (adapters, if any, are inside its layers)."""
        model = self.language_model
        get_base_model = getattr(model, "get_base_model", None)
        return get_base_model() if get_base_model is not None else model  # pyright: ignore

    # --- What transformers asks its models --------------------------------------------------------

    if TYPE_CHECKING:  # its decorator hides its type

        def to(self, *arguments: Any, **options: Any) -> QuietStarForCausalLM:  # pyright: ignore
            """Moves or casts the model, as any module."""
            ...

    config_class = QuietStarModelConfig
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    output_modalities = ("text",)
    # Losses are means over the targets and the thoughts of a batch, of which Trainer counts the
    # first only. So it averages over the batches that it accumulates.
    accepts_loss_kwargs = False

    @classmethod
    def can_generate(cls) -> bool:
        """Returns True: `generate` is our own."""
        return True

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The language model's defaults for `generate`."""
        return self.causal_lm.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        if "language_model" in self._modules:  # the base class makes one before there is a model
            self.causal_lm.generation_config = value  # pyright: ignore

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings of the language model."""
        return self.causal_lm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer of the language model."""
        return self.causal_lm.get_output_embeddings()

    def train(self, mode: bool = True) -> QuietStarForCausalLM:
        """Sets the mode, and warns if adapters were loaded for use and would not train."""
        if mode and self.has_frozen_adapters:
            warnings.warn(
                "The adapters of this model are frozen: markers and mixing head alone would train. "
                "Load it by from_pretrained(..., trainable=True).", stacklevel=2,
            )  # fmt: skip
        return super().train(mode)

    def tie_weights(self, *arguments: Any, **options: Any) -> None:
        """Ties what the language model ties."""
        self.causal_lm.tie_weights(*arguments, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Recomputes activations of the language model in the backward pass."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        with warnings.catch_warnings():  # its new name is not known to the oldest transformers
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprec")
            self.causal_lm.gradient_checkpointing_enable(options)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        self.causal_lm.gradient_checkpointing_disable()

    # --- Parts ------------------------------------------------------------------------------------

    @property
    def output_head(self) -> OutputHead:
        """From final states to logits."""
        return find_output_head(self.causal_lm, self.vocab_size)

    @property
    def start_vectors(self) -> Float[Tensor, "start embedding"]:
        """Input embeddings that open every thought."""
        return marker_vectors(self, 0)

    @property
    def end_vectors(self) -> Float[Tensor, "end embedding"]:
        """Input embeddings that close every thought."""
        return marker_vectors(self, 1)

    def configure(
        self, thoughts: ThoughtsConfig | None = None, loss: LossConfig | None = None
    ) -> None:
        """Think or learn by other settings from now on; weights stay.

        Raises:
            UserError: A sampler, reward or objective that cannot be found or called, a stop text
                that the tokenizer cannot write, or positions by a mixing weight that is fixed.
        """
        if thoughts is not None:
            fixed = self.mixing_head_config.fixed_weight
            if fixed is not None and thoughts.positions in LEARNED_RULES:
                raise UserError(
                    f"thoughts.positions ({thoughts.positions}): asks the mixing head, whose weight"
                    f" is fixed at {fixed} for all positions (mixing_head.fixed_weight). Set"
                    " another rule, such as entropy, or fixed_weight to null."
                )
            self.stop, markers = find_stop(self, thoughts), frozen_markers(self, thoughts)
            if (markers is None) != (self.frozen_markers is None):
                for vectors in (self.start_embedding, self.end_embedding):
                    vectors.requires_grad_(thoughts.train_markers)
            self.frozen_markers = markers
            self.thoughts = thoughts
            with registry.running("thoughts.sampler", thoughts.sampler):
                self.sampler = registry.find("thoughts.sampler", thoughts.sampler)()
            # A sampler of the user's may always end thoughts early.
            can_stop = self.stop is not None and thoughts.sampler != "pause"
            self.may_end_early = ":" in thoughts.sampler or can_stop
            # Tokens after a position: start, the longest thought, end and ground-truth ones.
            self.block_length = sum(self.num_markers) + thoughts.length + thoughts.lookahead - 1
            config = self.causal_lm.config.get_text_config()
            positions = getattr(config, "max_position_embeddings", None)
            self.max_text_length: int | None = None  # the longest that leaves room for a block
            if positions is not None:
                self.max_text_length = positions - self.block_length - num_virtual(self.causal_lm)
        if loss is not None:
            self.objective_name = loss.objective
            with registry.running("loss.objective", loss.objective):
                self.objective = registry.find("loss.objective", loss.objective)(loss)
            check_objective(self.objective, f"loss.objective ({loss.objective})")
            self.reward, self.reward_name = find_reward(loss.reward), loss.reward
        # Temperature of the log-probabilities of thought tokens in the loss.
        self.policy_temperature = self.objective.policy_temperature(self.thoughts.temperature)

    # --- Making and keeping -----------------------------------------------------------------------

    from_base: Any = classmethod(building.from_base)  # pyright: ignore
    save_pretrained: Any = saving.save_pretrained  # pyright: ignore
    from_pretrained: Any = classmethod(saving.from_pretrained)  # pyright: ignore
    push_to_hub: Any = saving.push_to_hub  # pyright: ignore

    @classmethod
    def _from_config(cls, config: QuietStarModelConfig, **options: Any) -> QuietStarForCausalLM:
        raise UserError(
            "AutoModelForCausalLM.from_config: a config alone says nothing of thoughts. Build the "
            "language model from it, and call QuietStarForCausalLM.from_base(model, tokenizer=...)."
        )

    # --- Training ---------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        answers: Bool[Tensor, "batch seq"] | None = None,
        marked: Bool[Tensor, "batch seq"] | None = None,
        num_thought_items: Tensor | int | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        seed: int = 0,
        fixed_mixing_weight: float | None = None,
        think: bool = True,
        thoughts: ThoughtBatch | None = None,
        reference_text: Float[Tensor, "batch seq"] | None = None,
        running: Float[Tensor, " 2"] | None = None,
        teacher: TeacherTargets | None = None,
        places: Int[np.ndarray, "batch positions"] | None = None,
        return_logits: bool | None = None,
    ) -> QuietStarOutput:
        """Sample thoughts where ``thoughts.positions`` says, and compute the loss.

        Args:
            input_ids: Texts, padded on the right if at all.
            attention_mask: Mask of real tokens, (batch, seq), true or 1.
            labels: Token ids where a token is a target, -100 elsewhere; default: all real tokens.
            num_items_in_batch: Valid targets of the whole optimizer step, over micro-batches and
                ranks; by default those of this batch.
            answers: Mask of answer tokens; only the rules of answers in ``thoughts.positions``
                read it.
            marked: Mask of the tokens before which to think, for ``thoughts.positions`` pattern and
                field (`quietstar.data.PatternMarker` makes it by ``thoughts.pattern``).
            num_thought_items: Positions of the whole step with a thought and a target after it.
            sample_ids: Index of each text in the run. Keys the noise, so that the same text draws
                the same thoughts however batches are cut. By default the texts of all calls in
                training mode are counted; in eval mode each call counts from 0, so that it gives
                the same twice.
            seed: Seed of the noise.
            fixed_mixing_weight: Replacement for the head's output (warm-up of the gate); by
                default ``mixing_head.fixed_weight``, if it is set.
            think: Whether to think; otherwise the loss is that of plain language modeling.
            thoughts: Thoughts to learn from instead of sampling: of an earlier call, another
                policy, another machine. Their texts must be ``input_ids``.
            reference_text: As in `ThoughtBatch`, where thoughts are sampled.
            running: As in `ThoughtScores`.
            teacher: What `quietstar.model.scoring.teach` said of these texts, for objectives with a
                teacher; by default the model teaches itself, as it is.
            places: Where to think, as `quietstar.sampling.positions.choose_positions` says of these
                texts on the host: rules of answers and marks need not wait for a device then.
            return_logits: Whether the output has the logits of the next tokens, which take memory
                for the whole vocabulary at every token; by default in eval mode without labels.

        Raises:
            UserError: A text too long for the model or padded on the left, ids or labels outside
                the vocabulary, answers or marks missing, thoughts that do not fit the texts, or a
                sampler, reward or objective of the user's that returns what it must not.
        """
        if return_logits is None:
            return_logits = labels is None and not self.training
        head = self.output_head
        if not (think and self.objective.thinks):
            labels = checked_labels(input_ids, attention_mask, labels, self.num_embeddings)
            states = plain_pass(self.causal_lm, input_ids)
            loss, result, valid = next_token_loss(states, labels, head, num_items_in_batch)
            metrics = plain_metrics(result.nll, valid)
            logits = head.logits(states.detach()) if return_logits else None
            return QuietStarOutput(void_if_failed(loss), logits, metrics, input_ids=input_ids)
        texts = checked_texts(self, input_ids, attention_mask, labels, sample_ids, answers, marked)
        if sample_ids is None and self.training:
            texts = replace(texts, sample_ids=texts.sample_ids + self.texts_seen)
            self.texts_seen += len(input_ids)
        if self.objective.student is not None:
            if teacher is None:
                teacher = teach(
                    self, input_ids, labels=texts.labels, answers=answers, marked=marked,
                    sample_ids=texts.sample_ids, seed=seed, places=places,
                )  # fmt: skip
            check_teacher(teacher, texts.labels)
            if self.objective.student == "plain":
                states = plain_pass(self.causal_lm, input_ids)
                with registry.running("loss.objective", self.objective_name):
                    loss, sums = plain_student_loss(
                        states, texts.labels, teacher, self.objective, head, num_items_in_batch
                    )
                return QuietStarOutput(
                    void_if_failed(loss), metrics=ThoughtMetrics(sums), input_ids=input_ids
                )
        # Else the graph of long texts would take more memory than what thoughts learn at once.
        is_large = input_ids.numel() > (self.learn_chunk_tokens or math.inf)
        is_large = is_large and torch.is_grad_enabled()
        with recomputing(self.causal_lm) if is_large else nullcontext():
            run = run_text(self.causal_lm, input_ids)
        texts = replace(texts, run=run, places=places)
        if thoughts is None:
            positions = choose(self, texts, seed, explore=True)
            batch = draw(self, texts, positions, Sampling.by(self.thoughts, self.stop, seed=seed))
            batch = replace(batch, reference_text=reference_text)
        else:
            check_same_texts(thoughts, input_ids)
            positions = positions_of(thoughts)
            batch = replace(thoughts, labels=texts.labels, answer_mask=answers)
            check_thoughts_given(self, batch.tokens, input_ids, positions)
        if teacher is not None:
            check_same_positions(teacher, positions, self.thoughts.lookahead)
        check_reference(batch, self.objective, self.reward_name)
        check_ratio(batch, self.policy_temperature, self.thoughts.temperature)
        asks = getattr(self.reward, "asks_policy", False)
        if asks and batch.reward is None:
            batch = replace(batch, reward=torch.zeros_like(batch.lengths, dtype=torch.float32))
        step = Step(
            num_items_in_batch, num_thought_items, fixed_mixing_weight, running,
            LivePolicy(self, seed) if asks else None,
            None if teacher is None else teacher.soft_targets(), places,
            may_end_early=thoughts is not None or self.may_end_early,
        )  # fmt: skip
        loss, scores = learn(self, run, batch, positions, step)
        loss = void_if_failed(loss)
        metrics = thought_metrics(scores, self.may_end_early, self.stop)
        if batch.sampling_logprobs is None:
            batch = replace(batch, sampling_logprobs=scores.logprobs)
        if batch.advantage is None:
            batch = replace(batch, advantage=scores.advantage)
        logits = None
        if return_logits:
            logits = next_logits(self, input_ids, batch.tokens, positions, fixed_mixing_weight)
        return QuietStarOutput(loss, logits, metrics, batch.tokens, input_ids, positions, batch)

    # --- Looking at it: thoughts, scores, generated texts -----------------------------------------

    def decode_thoughts(self, tokens: Int[Tensor, "*thoughts length"]) -> Any:
        """Return the texts of thoughts, in nested lists of their shape.

        Args:
            tokens: As `draw` and `generate` give them; -1 follows the last of each.

        Raises:
            UserError: The model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("decode_thoughts: the model has no tokenizer. Give it one (tokenizer=)")
        return decode_thoughts(self.tokenizer, tokens.cpu())

    choose_positions = scoring.choose_positions
    draw = scoring.draw
    score = scoring.score
    score_plain = scoring.score_plain
    run_text = scoring.run_text
    generate: Any = generate  # pyright: ignore


AutoModelForCausalLM.register(QuietStarModelConfig, QuietStarForCausalLM)
