"""`QuietStarForCausalLM`: any Hugging Face causal LM that thinks before it predicts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from quietstar import registry
from quietstar.attention.layout import (
    IGNORE_INDEX,
    NO_POSITION,
    NO_TOKEN,
    OnHost,
    early_ends,
    has_content,
    lookahead_states,
    on_host,
    text_lookahead,
    to_device,
)
from quietstar.backbone.loading import drop_dropout_layers, load_base
from quietstar.backbone.output_head import OutputHead, find_output_head
from quietstar.backbone.run import (
    TextRun,
    embed_sparsely,
    embedding_weight,
    num_virtual,
    plain_pass,
    recomputing,
    run_text,
)
from quietstar.backbone.teacher_forced import ThoughtStates, embed_blocks, teacher_forced
from quietstar.config import LossConfig, MixingHeadConfig, ThoughtsConfig, TuningConfig, loss_config
from quietstar.config.loading import read_sections
from quietstar.data.tokenizer import check_tokenizer_fits, load_tokenizer
from quietstar.errors import UserError
from quietstar.generation.gates import Gate
from quietstar.generation.generate import generate
from quietstar.losses.distillation import TeacherTargets, student_rows, teacher_targets
from quietstar.losses.thought_loss import (
    ScoredThoughts,
    loss_from_states,
    mixed_candidates,
    mixed_predictions,
    next_token_entropy,
    next_token_loss,
    thought_logprobs,
)
from quietstar.losses.weights import LossTerms, ThoughtScores, ThoughtWeights, Weigh
from quietstar.model import saving
from quietstar.model.checks import expect, raise_failed, void_if_failed
from quietstar.model.configuration import QuietStarModelConfig
from quietstar.model.learning import Step, learn
from quietstar.model.mixing_head import MixingHead
from quietstar.model.outputs import (
    MixedScores,
    PlainScores,
    QuietStarOutput,
    ThoughtMetrics,
    Thoughts,
    decode_thoughts,
    plain_metrics,
    thought_metrics,
)
from quietstar.model.policy import LivePolicy
from quietstar.model.self_check import check_architecture, use_thinking_attention
from quietstar.model.tuning import apply_tuning, quantization
from quietstar.objectives import Objective
from quietstar.rewards import find_reward
from quietstar.sampling.positions import (
    LEARNED_RULES,
    SCORED_RULES,
    choose_positions,
)
from quietstar.sampling.stopping import StopTexts
from quietstar.sampling.thoughts import Sampling, Texts, ThoughtBatch

ROUNDING = 1e-3
"""What the log-probability of a certain token may be above 0, in half precisions too."""
TOP_TOKENS = 16
"""Most likely tokens whose entropy is the score of ``top_entropy`` (RPT, arXiv:2506.08007)."""


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
        self._markers: tuple[Tensor, Tensor] | None = None  # tokens, of markers that do not train
        self.judge: Any = None  # a `quietstar.judging.Critic`, which rewards may ask
        # From the sample_ids of texts to the records that they are made of, for rewards.
        self.records: Callable[[list[int]], list[dict[str, Any]]] | None = None
        self.language_model = language_model
        self.tuning = tuning or TuningConfig()
        self.mixing_head_config = mixing_head
        self.vocab_size, self.pause_token_id = vocab_size, pause_token_id
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
        # Most block tokens that learn at once (`quietstar.model.learning`), and text tokens whose
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
        return self._marker_vectors(0)

    @property
    def end_vectors(self) -> Float[Tensor, "end embedding"]:
        """Input embeddings that close every thought."""
        return self._marker_vectors(1)

    def _marker_vectors(self, index: int) -> Tensor:
        if self._markers is None:
            vectors = self._marker_parameters[index]
            return vectors.view(-1, vectors.shape[-1])
        if self._markers[0].device != self.device:
            self._markers = (self._markers[0].to(self.device), self._markers[1].to(self.device))
        return embed_sparsely(self.causal_lm, self._markers[index])

    @property
    def block_length(self) -> int:
        """Tokens after a position: start, the longest thought, end and true ones."""
        return sum(self.num_markers) + self.thoughts.length + self.thoughts.lookahead - 1

    @property
    def _marker_parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.start_embedding, self.end_embedding

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
        return positions - self.block_length - num_virtual(self.causal_lm)

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
            if self.stop is None or thoughts.stop != self.thoughts.stop:
                self.stop = self._find_ends(thoughts.stop)
            for text, fewest in (self.stop.fewest if self.stop is not None else {}).items():
                if fewest > thoughts.length:
                    raise UserError(
                        f"thoughts.stop: {text!r} takes at least {fewest} tokens, but "
                        f"thoughts.length ({thoughts.length}) is shorter, so no thought would end "
                        "with it. Leave it out, or raise thoughts.length."
                    )
            if thoughts.train_markers != (self._markers is None):
                for vectors in self._marker_parameters:
                    vectors.requires_grad_(thoughts.train_markers)
            self._markers = None if thoughts.train_markers else self._find_markers(thoughts)
            self.thoughts = thoughts
            with registry.running("thoughts.sampler", thoughts.sampler):
                self.sampler = registry.find("thoughts.sampler", thoughts.sampler)()
        if loss is not None:
            self.objective_name = loss.objective
            with registry.running("loss.objective", loss.objective):
                self.objective = registry.find("loss.objective", loss.objective)(loss)
            check_objective(self.objective, f"loss.objective ({loss.objective})")
            self.reward, self.reward_name = find_reward(loss.reward), loss.reward

    def _find_ends(self, texts: Sequence[str]) -> StopTexts | None:
        if not texts:
            return None
        if self.tokenizer is None:
            raise UserError(
                f"thoughts.stop ({texts}): needs the tokenizer of the model. Set model.tokenizer."
            )
        # The embeddings themselves may be sharded, and then have no rows here.
        rows = self.causal_lm.config.get_text_config().vocab_size
        return StopTexts.of_tokenizer(texts, self.tokenizer, rows)

    def _find_markers(self, thoughts: ThoughtsConfig) -> tuple[Tensor, Tensor]:
        if self.tokenizer is None:
            raise UserError(
                "thoughts.train_markers (false): needs the tokenizer of the model. Set "
                "model.tokenizer."
            )
        start, end = self._check_markers(self.tokenizer, thoughts)
        device = self.start_embedding.device
        return torch.tensor(start, device=device), torch.tensor(end, device=device)

    @torch.no_grad()
    def initial_vectors(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
        """The input embeddings of ``start_init`` and ``end_init``, token by token.

        Of the shapes of ``start_embedding`` and ``end_embedding``.

        Raises:
            UserError: A text without tokens, or with another number of them than there are vectors.
        """
        embed, device = self.causal_lm.get_input_embeddings(), self.start_embedding.device
        vectors = []
        for tokens, like in zip(self._check_markers(tokenizer, self.thoughts),
                                self._marker_parameters, strict=True):  # fmt: skip
            vectors.append(embed(torch.tensor(tokens, device=device)).float().view_as(like))
        return vectors[0], vectors[1]

    def _check_markers(
        self, tokenizer: PreTrainedTokenizerBase, thoughts: ThoughtsConfig
    ) -> tuple[list[int], list[int]]:
        """Tokens of the markers, as many as the model has vectors."""
        tokens = marker_tokens(tokenizer, thoughts)
        keys = ("start_init", "end_init")
        for key, ids, count in zip(keys, tokens, self.num_markers, strict=True):
            if len(ids) != count:
                raise UserError(
                    f"thoughts.{key} ({getattr(thoughts, key)!r}): has {len(ids)} tokens, but the "
                    f"model has a vector for {count}. Give a text of as many, or make the model "
                    "anew from its base."
                )
        return tokens

    # --- Making and keeping -----------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        name_or_path: str | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        thoughts: ThoughtsConfig | Mapping[str, Any] | None = None,
        mixing_head: MixingHeadConfig | Mapping[str, Any] | None = None,
        loss: LossConfig | Mapping[str, Any] | None = None,
        tuning: TuningConfig | Mapping[str, Any] | None = None,
        dtype: torch.dtype | str = torch.float32,
        trust_remote_code: bool = False,
        device_map: Any = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        **hub: Any,
    ) -> QuietStarForCausalLM:
        """Turn a plain causal LM into one that thinks.

        The sections of a config (``thoughts``, ``mixing_head``, ``loss``, ``tuning``) are given as
        their classes or as mappings of their keys, such as ``thoughts={"length": 4}``.

        Args:
            name_or_path: Hub id, folder, or a loaded model.
            tokenizer: Tokenizer; defaults to the one saved with the model.
            thoughts: Length, lookahead, number, temperature, initial vectors.
            mixing_head: Settings of the head.
            loss: Objective, reward and their settings, for training.
            tuning: Way to tune the base model.
            dtype: Type of the weights; float32 trains safely with small learning rates.
            trust_remote_code: Whether code that comes with the model may run.
            device_map: Where the weights go; this and ``max_memory`` as in `from_pretrained`.
            max_memory: Bytes that weights may take, with a ``device_map`` of "auto".
            **hub: Options of downloads, as in `from_pretrained`.

        Raises:
            UserError: A section or an argument is wrong, the model cannot be loaded or its
                architecture is not supported, or the tokenizer does not fit it.
        """
        given = {"thoughts": thoughts, "mixing_head": mixing_head, "loss": loss, "tuning": tuning}
        unknown = sorted(hub.keys() - saving.OF_DOWNLOADS)
        sections = read_sections("from_base", given, unknown)
        hub["trust_remote_code"] = trust_remote_code
        if isinstance(name_or_path, str):
            tokenizer = tokenizer or load_tokenizer(name_or_path, what="model.name_or_path", **hub)
            base = load_base(
                name_or_path, dtype=dtype, quantization=quantization(sections["tuning"]),
                device_map=device_map, max_memory=max_memory, **hub,
            )  # fmt: skip
        else:
            base = name_or_path
            drop_dropout_layers(base)
            tokenizer = tokenizer or load_tokenizer(str(base.name_or_path), **hub)
        check_architecture(base)
        check_tokenizer_fits(tokenizer, embedding_weight(base).shape[0])
        use_thinking_attention(base)
        start, end = marker_tokens(tokenizer, sections["thoughts"])
        model = cls(
            apply_tuning(base, sections["tuning"]),
            sections["thoughts"],
            sections["mixing_head"],
            sections["loss"],
            len(tokenizer),
            start[0],
            sections["tuning"],
            tokenizer,
            (len(start), len(end)),
        )
        vectors = model.initial_vectors(tokenizer)
        with torch.no_grad():
            model.start_embedding.copy_(vectors[0])
            model.end_embedding.copy_(vectors[1])
        return model

    save_pretrained: Any = saving.save_pretrained  # pyright: ignore
    from_pretrained: Any = classmethod(saving.from_pretrained)  # pyright: ignore
    push_to_hub: Any = saving.push_to_hub  # pyright: ignore

    @classmethod
    def _from_config(cls, config: QuietStarModelConfig, **options: Any) -> QuietStarForCausalLM:
        """Builds a model with random weights; for ``AutoModelForCausalLM.from_config``."""
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
            teacher: What `teach` said of these texts, for objectives with a teacher; by default
                the model teaches itself, as it is.
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
        labels = self._targets(input_ids, attention_mask, labels)
        if not (think and self.objective.thinks):
            states = plain_pass(self.causal_lm, input_ids)
            head = self.output_head
            loss, result, valid = next_token_loss(states, labels, head, num_items_in_batch)
            metrics = plain_metrics(result.nll, valid)
            logits = head.logits(states.detach()) if return_logits else None
            return QuietStarOutput(void_if_failed(loss), logits, metrics, input_ids=input_ids)
        self._check_length(input_ids)
        if sample_ids is None:
            first = self.texts_seen if self.training else 0
            sample_ids = torch.arange(first, first + len(input_ids), device=input_ids.device)
            if self.training:
                self.texts_seen += len(input_ids)
        if self.objective.student is not None:
            if teacher is None:
                teacher = self.teach(
                    input_ids, labels=labels, answers=answers, marked=marked,
                    sample_ids=sample_ids, seed=seed, places=places,
                )  # fmt: skip
            self._check_teacher(teacher, labels)
            if self.objective.student == "plain":
                return self._learn_plainly(input_ids, labels, teacher, num_items_in_batch, seed,
                                           sample_ids)  # fmt: skip
        # Else the graph of long texts would take more memory than what thoughts learn at once.
        is_large = input_ids.numel() > (self.learn_chunk_tokens or math.inf)
        is_large = is_large and torch.is_grad_enabled()
        with recomputing(self.causal_lm) if is_large else nullcontext():
            run = run_text(self.causal_lm, input_ids)
        texts = Texts(input_ids, labels, answers, sample_ids, run, marked, places)
        check_texts(texts)
        if thoughts is None:
            positions = self._choose(texts, seed, explore=True)
            spec = self.thoughts
            sampling = Sampling(
                spec.num_thoughts, spec.length, spec.temperature, seed, self.stop, spec.top_p,
                spec.top_k,
            )  # fmt: skip
            batch = self._sample(texts, positions, sampling)
            batch = replace(batch, reference_text=reference_text)
        else:
            positions, batch = given_thoughts(thoughts, texts)
            self._check_given(batch.tokens.transpose(1, 2), input_ids, positions)
        if teacher is not None:
            self._check_same_positions(teacher, positions)
        self._check_reference(batch)
        self._check_ratio(batch)
        if self._asks_policy and batch.reward is None:
            batch = replace(batch, reward=torch.zeros_like(batch.lengths, dtype=torch.float32))
        terms = self.objective.terms(
            self.weigher(batch, running, seed),
            self.policy_temperature,
            reward_reads_thought=getattr(self.reward, "reads_thought", True),
            weighs_at_once=self._asks_policy,
        )
        may_end_early = thoughts is not None or self.may_end_early
        step = Step(
            batch, positions, terms, num_items_in_batch, num_thought_items, fixed_mixing_weight,
            may_end_early, running, seed, teacher, places,
        )  # fmt: skip
        loss, scored = learn(self, run, step)
        loss = void_if_failed(loss)
        metrics, tokens = self._metrics(scored), batch.tokens.transpose(1, 2)
        if batch.sampling_logprobs is None:
            drawn = rearrange(scored.logprobs, "t k b p -> b p k t")
            batch = replace(batch, sampling_logprobs=drawn)
        if batch.advantage is None and scored.advantage is not None:
            batch = replace(batch, advantage=rearrange(scored.advantage, "k b p -> b p k"))
        logits = None
        if return_logits:
            logits = self.next_logits(input_ids, tokens, positions, fixed_mixing_weight)
        return QuietStarOutput(loss, logits, metrics, tokens, input_ids, positions, batch)

    def _check_reference(self, batch: ThoughtBatch) -> None:
        """Refuse to learn without what the objective compares with, which is not the model's."""
        reference = self.objective.reference
        if self.objective.student or not self.objective.reads_reference(self.reward_name):
            return  # a student's reference is its teacher
        compares = self.objective.kl_weight > 0 or self.objective.needs_log_ratio
        for name, is_read in (("reference_text", True), ("reference_logprobs", compares)):
            if is_read and getattr(batch, name) is None:
                raise UserError(
                    f"loss.reference ({reference}): forward was not given {name}. In your own loop "
                    "pass thoughts of draw with what score_reference says of them while the "
                    "weights are the reference's, or set loss.reference: current."
                )

    def _learn_plainly(
        self,
        input_ids: Tensor,
        labels: Tensor,
        teacher: TeacherTargets,
        num_items: Tensor | int | None,
        seed: int,
        sample_ids: Tensor,
    ) -> QuietStarOutput:
        """Compute the loss of the model without thoughts, beside its teacher's predictions."""
        states, head = plain_pass(self.causal_lm, input_ids), self.output_head
        loss, base, valid = next_token_loss(
            states, labels, head, num_items, weight=self.objective.base_weight
        )
        nll = base.nll.view(labels.shape)
        rows = student_rows(states, nll, labels, teacher, head, num_items)
        with registry.running("loss.objective", self.objective_name):
            more, figures = self.objective.student_loss(rows)
        counts = rows.targets != IGNORE_INDEX
        figures |= {"student_nll": rows.nll, "teacher_nll": rows.teacher_nll}
        sums = {n: (x.where(counts, 0.0).sum(), counts.sum()) for n, x in figures.items()}
        sums["teacher_tokens"] = (teacher.num_tokens, counts.sum())
        metrics = plain_metrics(base.nll, valid).joined(ThoughtMetrics(sums))
        return QuietStarOutput(void_if_failed(loss + more), metrics=metrics, input_ids=input_ids)

    @torch.no_grad()
    def teach(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        *,
        answers: Bool[Tensor, "batch seq"] | None = None,
        marked: Bool[Tensor, "batch seq"] | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        seed: int = 0,
        length: int | None = None,
        top: int | None = None,
        places: Int[np.ndarray, "batch positions"] | None = None,
    ) -> TeacherTargets:
        """Predict the true tokens after thoughts, drawn as in training, for a student to learn.

        Arguments as in `forward`, and by default as in the objective: ``length`` are the tokens of
        a thought, ``top`` the most likely tokens that are kept of each prediction. Where all
        positions think, no more than the next token is predicted, unless the student thinks too.
        """
        settings = self.objective.settings
        if length is None:
            length = getattr(settings, "teacher_length", None) or self.thoughts.length
        most = self.objective.top_tokens if top is None else top
        assert isinstance(length, int), "an objective's setting is one"
        spec, text = self.thoughts, self.run_text(input_ids)
        batch = self.draw(
            input_ids, attention_mask, labels, answers=answers, marked=marked, length=length,
            num_thoughts=spec.num_thoughts, temperature=spec.temperature, top_p=spec.top_p,
            top_k=spec.top_k, sample_ids=sample_ids, seed=seed, text=text, places=places,
        )  # fmt: skip
        positions = None if spec.positions == "all" else batch.positions
        is_next_enough = positions is None and self.objective.student != "thinking"
        lookahead = 1 if is_next_enough else spec.lookahead
        states, weight = self.states_with(
            input_ids, batch.token_major(), positions, lookahead=lookahead, text=text
        )
        drawn = (batch.lengths * (batch.positions >= 0).unsqueeze(-1)).sum()
        head = self.output_head
        return teacher_targets(states, weight, batch.labels, head, positions, most, drawn)

    def _check_teacher(self, teacher: TeacherTargets, labels: Tensor) -> None:
        """Refuse predictions of other texts."""
        places = labels.shape[1] if teacher.positions is None else teacher.positions.shape[1]
        if teacher.tokens.shape[:2] != (labels.shape[0], places):
            raise UserError(
                f"teacher: its predictions {tuple(teacher.tokens.shape)} are not of texts "
                f"{tuple(labels.shape)}. Give those of teach for these texts."
            )

    def _check_same_positions(self, teacher: TeacherTargets, positions: Tensor | None) -> None:
        """Refuse a teacher who thought elsewhere than a student who thinks too."""
        own, others = positions, teacher.positions
        ok = (own is None) == (others is None) and teacher.lookahead == self.thoughts.lookahead
        if ok and own is not None and others is not None:
            ok = own.shape == others.shape
        expect(
            (own == others).all() if ok and own is not None else torch.tensor(ok),
            "loss.teacher: it thought at other positions, or looked ahead by another number of "
            f"tokens ({teacher.lookahead}), than the student (thoughts.lookahead "
            f"{self.thoughts.lookahead}). Teach with the student's thoughts.positions; a teacher "
            "at all positions looks ahead by 1 token. Or set loss.student: plain.",
        )

    def _check_ratio(self, batch: ThoughtBatch) -> None:
        """Refuse ratios of probabilities at different temperatures."""
        own, drawn = self.policy_temperature, self.thoughts.temperature
        if batch.sampling_logprobs is not None and own != drawn:
            raise UserError(
                f"thoughts.temperature ({drawn}): must be that of the policy term ({own}) where "
                "thoughts come with their log-probabilities: ratios compare with the policy that "
                "drew them. Set another loss.estimator than paper, or leave "
                "sampling_logprobs out."
            )

    @property
    def policy_temperature(self) -> float:
        """Temperature of the log-probabilities of thought tokens in the loss."""
        return self.objective.policy_temperature(self.thoughts.temperature)

    @property
    def _asks_policy(self) -> bool:
        return getattr(self.reward, "asks_policy", False)

    @property
    def may_end_early(self) -> bool:
        """Whether thoughts can be shorter than others: a sampler of the user's may always do so."""
        sampler = self.thoughts.sampler
        return ":" in sampler or (self.stop is not None and sampler != "pause")

    def _metrics(self, scored: ScoredThoughts) -> ThoughtMetrics:
        return thought_metrics(scored, self.may_end_early, self.stop)

    def weigher(self, batch: ThoughtBatch, running: Tensor | None = None, seed: int = 0) -> Weigh:
        """Bind reward and objective to the thoughts of a batch; ``seed`` is the step's."""

        @torch.no_grad()
        def weigh(scores: ThoughtScores, texts: slice, places: slice) -> ThoughtWeights:
            part, device = batch.part(texts, places), scores.mixed.device
            reference = None
            if part.reference_text is not None:
                ahead = lookahead_states(
                    part.reference_text, scores.valid.shape[2], part.positions.clamp(min=0)
                )
                reference = rearrange(ahead, "a b p -> b p a").where(scores.valid, 0.0)
            policy = LivePolicy(self, seed) if self._asks_policy else None
            scores = replace(
                scores, reference=reference, lengths=part.lengths, running=running, policy=policy
            )
            # Later updates of a step keep what an outside reward said of its thoughts.
            if part.reward is not None and part.advantage is not None:
                reward = part.reward
            else:
                with registry.running("loss.reward", self.reward_name):
                    reward = self.reward(part, scores)
            check_figures(reward, part.lengths.shape, device, f"loss.reward ({self.reward_name})")
            with registry.running("loss.objective", self.objective_name):
                weights = self.objective.weigh(reward, scores)
            if part.reward is not None:
                part.reward.copy_(reward)
            name = f"loss.objective ({self.objective_name})"
            if not isinstance(weights, ThoughtWeights):
                raise UserError(
                    f"{name}: it returned {type(weights).__name__}, but must return "
                    "ThoughtWeights. Mend its last line."
                )
            for figure in ("advantage", "mixed", "thought", "reward"):
                x = getattr(weights, figure)
                if x is not None:
                    of_thoughts = figure in ("advantage", "reward")
                    shape = part.lengths.shape if of_thoughts else scores.mixed.shape
                    check_figures(x, shape, device, f"{name}: {figure}")
            if weights.reward is None:
                weights = replace(weights, reward=reward)
            if part.advantage is not None:  # of the first update of the step
                weights = replace(weights, advantage=part.advantage)
            return weights

        return weigh

    @torch.no_grad()
    def _choose(self, texts: Texts, seed: int, explore: bool) -> Tensor | None:
        """Choose where to think; None for all positions."""
        if texts.places is not None:
            return to_device(texts.places, texts.input_ids.device)
        rule, score = self.thoughts.positions, None
        if rule in SCORED_RULES:
            states, head = None if texts.run is None else texts.run.states, self.output_head
            assert states is not None, "the text ran"
            score = torch.ones_like(states[..., 0])
            if rule in LEARNED_RULES:
                ahead = text_lookahead(states, 1, None)
                score = self.mixing_head(ahead, torch.zeros_like(states)[None, None])[0, 0]
            if rule != "weight":
                top = TOP_TOKENS if rule == "top_entropy" else None
                score = score * next_token_entropy(states, head, top)
        return choose_positions(
            rule, self.thoughts.position_fraction, texts.labels,
            answers=texts.answer_mask, marked=texts.marked,
            score=score, sample_ids=texts.sample_ids, seed=seed, explore=explore,
        )  # fmt: skip

    def _sample(self, texts: Texts, positions: Tensor | None, spec: Sampling) -> ThoughtBatch:
        """Draw thoughts, and check what a sampler of the user's gives."""
        with registry.running("thoughts.sampler", self.thoughts.sampler):
            batch = self.sampler.sample(self, texts, positions, spec)
        places = texts.input_ids.shape if positions is None else positions.shape
        shape = (*places, spec.num_thoughts, spec.thought_length)
        name = f"thoughts.sampler ({self.thoughts.sampler})"
        if not isinstance(batch, ThoughtBatch):
            raise UserError(
                f"{name}: it returned {type(batch).__name__}, but must return a ThoughtBatch. "
                "Make one with ThoughtBatch.of_texts."
            )
        if batch.tokens.shape != shape or batch.tokens.dtype != torch.long:
            raise UserError(
                f"{name}: its tokens are {batch.tokens.dtype} of shape {tuple(batch.tokens.shape)},"
                f" but must be torch.int64 of (batch, positions, thoughts, length) = {shape}. "
                "Mend its sample method."
            )
        if batch.tokens.device != texts.input_ids.device:
            raise UserError(
                f"{name}: its tokens are on {batch.tokens.device}, but must be on "
                f"{texts.input_ids.device}. Make them on the device of texts.input_ids."
            )
        if ":" in self.thoughts.sampler:
            check_lengths(batch, f"{name}: its thoughts")
            check_logprobs(batch, f"{name}: its sampling_logprobs")
            self._check_thoughts(batch.tokens, f"{name}: its tokens")
        return batch

    def states_with(
        self,
        input_ids: Tensor,
        thoughts: Tensor,
        positions: Tensor | None,
        fixed_mixing_weight: float | None = None,
        lookahead: int | None = None,
        text: TextRun | None = None,
        ends: tuple[Tensor | None, OnHost | None] | None = None,
    ) -> tuple[ThoughtStates, Tensor]:
        """Run thoughts (length, thoughts, batch, positions); their states and mixing weight.

        ``ends`` are the lengths of the thoughts, None if all are whole, and what the host knows.
        """
        text = run_text(self.causal_lm, input_ids) if text is None else text
        lengths, known = (early_ends(thoughts), None) if ends is None else ends
        inputs = embed_blocks(
            self.causal_lm, self.start_vectors, self.end_vectors, input_ids, thoughts,
            lookahead or self.thoughts.lookahead, positions, lengths, known,
        )  # fmt: skip
        states = teacher_forced(self.causal_lm, text, inputs)
        ahead = text_lookahead(states.text, states.ahead.shape[0], positions)
        return states, self.mixing_head(ahead, states.ahead, fixed_mixing_weight)

    def _texts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        sample_ids: Tensor | None,
        answers: Tensor | None = None,
        marked: Tensor | None = None,
        text: TextRun | None = None,
    ) -> Texts:
        """Put what a caller gives about texts together; texts number from 0 by default.

        Raises:
            UserError: Something does not fit the texts, or these the model.
        """
        labels = self._targets(input_ids, attention_mask, labels)
        self._check_length(input_ids)
        if sample_ids is None:
            sample_ids = torch.arange(input_ids.shape[0], device=input_ids.device)
        texts = Texts(input_ids, labels, answers, sample_ids, text, marked=marked)
        check_texts(texts)
        return texts

    def _targets(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
    ) -> Int[Tensor, "batch seq"]:
        """Give the labels with padding ignored; token ids and labels must be in the vocabulary."""
        if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
            given = "None" if input_ids is None else f"of shape {tuple(input_ids.shape)}"
            raise UserError(
                f"input_ids {given}: must be (texts, tokens), with one at least. Leave empty texts "
                "out."
            )
        self._check_ids(input_ids, "input_ids", ignored=False)
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise UserError(
                    f"labels of shape {tuple(labels.shape)} do not fit input_ids of "
                    f"{tuple(input_ids.shape)}. Give one for each token."
                )
            self._check_ids(labels, "labels", ignored=True)
        return target_labels(input_ids, attention_mask, labels)

    def _check_ids(self, ids: Tensor, name: str, ignored: bool) -> None:
        """Refuse ids outside the vocabulary.

        A negative label would count as token 0, one that is too large reads foreign memory.
        """
        vocab_size = self.causal_lm.config.get_text_config().vocab_size
        wrong = (ids < 0) | (ids >= vocab_size)
        if ignored:
            wrong &= ids != IGNORE_INDEX
        also = f" or {IGNORE_INDEX}, which is no target" if ignored else ""
        expect(
            ~wrong.any(),
            f"{name}{_first(ids, wrong)}: must be a token id from 0 to {vocab_size - 1}{also}. Use "
            "the tokenizer of this model.",
        )

    def _check_thoughts(self, tokens: Tensor, name: str = "thoughts") -> None:
        """Refuse tokens (..., length) outside the vocabulary, or after the end of a thought."""
        vocab_size = self.causal_lm.config.get_text_config().vocab_size
        is_token = tokens != NO_TOKEN
        wrong = is_token & ((tokens < 0) | (tokens >= vocab_size))
        late = is_token[..., 1:] & ~is_token[..., :-1]
        expect(
            ~wrong.any(),
            f"{name}{_first(tokens, wrong)}: must be token ids from 0 to {vocab_size - 1}, and "
            f"{NO_TOKEN} after the end of a thought. Use the tokenizer of this model.",
        )
        expect(
            ~late.any(),
            f"{name}: {NO_TOKEN} stands before a token, but a thought ends at its first "
            f"{NO_TOKEN}. Put the tokens of each thought first.",
        )

    def _check_given(self, thoughts: Tensor, input_ids: Tensor, positions: Tensor | None) -> None:
        """Refuse given thoughts that do not fit the texts or the model."""
        if positions is not None:
            check_positions(positions, input_ids)
        places = input_ids.shape if positions is None else positions.shape
        shape = thoughts.shape
        if len(shape) != 4 or (shape[0], shape[2]) != tuple(places) or 0 in shape:
            raise UserError(
                f"thoughts of shape {tuple(shape)}: must be (batch, thoughts, positions, length), "
                f"here ({places[0]}, .., {places[1]}, ..) with a thought and a token at least. "
                "Give those of these positions."
            )
        self._check_thoughts(thoughts)
        longest = self.max_text_length
        room = None if longest is None else longest + self.thoughts.length - input_ids.shape[1]
        if room is not None and shape[3] > room:
            raise UserError(
                f"thoughts of {shape[3]} tokens: after a text of {input_ids.shape[1]} this model "
                f"has room for {room}. Give shorter ones."
            )

    def _check_length(self, input_ids: Tensor) -> None:
        longest = self.max_text_length
        if longest is not None and longest < 1:
            raise UserError(
                f"thoughts.length ({self.thoughts.length}): with thoughts.lookahead "
                f"({self.thoughts.lookahead}) and the {sum(self.num_markers)} tokens of "
                "thoughts.start_init and end_init a thought leaves no room for a text in the "
                "model's positions. Make one of them shorter."
            )
        if longest is not None and input_ids.shape[1] > longest:
            raise UserError(
                f"a text of {input_ids.shape[1]} tokens leaves no room for a thought: with "
                f"thoughts.length {self.thoughts.length} and thoughts.lookahead "
                f"{self.thoughts.lookahead} this model takes at most {longest}. Shorten it."
            )

    # --- Looking at it: thoughts, scores, generated texts -----------------------------------------

    @torch.no_grad()
    def run_text(self, input_ids: Int[Tensor, "batch seq"]) -> TextRun:
        """Run texts once, for calls of `sample` and `think` that look at the same ones."""
        self._check_ids(input_ids, "input_ids", ignored=False)
        return run_text(self.causal_lm, input_ids)

    def decode_thoughts(self, tokens: Int[Tensor, "*thoughts length"]) -> Any:
        """Return the texts of thoughts, in nested lists of their shape.

        Args:
            tokens: As `think`, `sample` and `generate` give them; -1 follows the last of each.

        Raises:
            UserError: The model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("decode_thoughts: the model has no tokenizer. Give it one (tokenizer=)")
        return decode_thoughts(self.tokenizer, tokens.cpu())

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
        top_p: float | None = None,
        top_k: int | None = None,
        positions: Int[Tensor, "batch positions"] | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        seed: int = 0,
        text: TextRun | None = None,
    ) -> Thoughts:
        """Think at every position and say what it did to the prediction of the true tokens.

        Args:
            input_ids: Texts, padded on the right if at all.
            attention_mask: (batch, seq), true (or 1) for real tokens.
            labels: Targets, as in `forward`.
            thoughts: Score these thoughts instead of sampling; -1 stands after the last token of
                one that ends early.
            num_thoughts: Thoughts a position.
            temperature: Sampling temperature; None takes the most likely tokens.
            top_p: Sample among the most likely tokens that together reach this probability.
            top_k: Sample among so many of the most likely tokens.
            positions: Think there only: ascending, -1 after the last of a text with fewer
                (`choose_positions`).
            sample_ids: As in `forward`; by default 0, 1, ...
            seed: Seed of the noise.
            text: What `run_text` made of the texts; without it they run here.

        Raises:
            UserError: A text too long for the model, padded on the left, or with ids outside the
                vocabulary.
        """
        labels = self._targets(input_ids, attention_mask, labels)
        self._check_length(input_ids)
        if thoughts is None:
            thoughts = self.sample(
                input_ids, num_thoughts=num_thoughts, temperature=temperature, top_p=top_p,
                top_k=top_k, positions=positions, sample_ids=sample_ids, seed=seed, text=text,
            )  # fmt: skip
        self._check_given(thoughts, input_ids, positions)
        tokens = token_major(thoughts)
        states, weight = self.states_with(input_ids, tokens, positions, text=text)
        head, terms = self.output_head, LossTerms(None, scoring=True)
        _, scored = loss_from_states(
            states, weight, tokens, labels, head, terms, positions=positions
        )
        raise_failed()
        return Thoughts.from_scored(scored, self._metrics(scored))

    @torch.no_grad()
    def sample(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        num_thoughts: int = 1,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        positions: Int[Tensor, "batch positions"] | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        seed: int = 0,
        text: TextRun | None = None,
    ) -> Int[Tensor, "batch thoughts positions length"]:
        """Thoughts at every (chosen) position, not scored; arguments as in `think`.

        ``text`` is that of `run_text`, where the texts were run already.
        After the last token of one that ends early stands -1.
        """
        texts = self._texts(input_ids, None, None, sample_ids, text=text)
        if positions is not None:
            check_positions(positions, input_ids)
        length = self.thoughts.length
        sampling = Sampling(num_thoughts, length, temperature, seed, self.stop, top_p, top_k)
        batch = self._sample(texts, positions, sampling)
        raise_failed()
        return batch.tokens.transpose(1, 2)

    @torch.no_grad()
    def draw(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        *,
        answers: Bool[Tensor, "batch seq"] | None = None,
        marked: Bool[Tensor, "batch seq"] | None = None,
        num_thoughts: int = 1,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        positions: Int[Tensor, "batch positions"] | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        seed: int = 0,
        text: TextRun | None = None,
        length: int | None = None,
        places: Int[np.ndarray, "batch positions"] | None = None,
    ) -> ThoughtBatch:
        """Draw thoughts that `forward` can learn from; arguments as in `sample` and `forward`.

        By default they are where `forward` would think, by ``thoughts.positions``, and have
        ``thoughts.length`` tokens.
        """
        texts = self._texts(input_ids, attention_mask, labels, sample_ids, answers, marked, text)
        texts = replace(texts, places=places)
        if positions is not None:
            check_positions(positions, input_ids)
        elif self.thoughts.positions != "all":
            if text is None and self.thoughts.positions in SCORED_RULES:
                texts = replace(texts, run=run_text(self.causal_lm, input_ids))
            positions = self._choose(texts, seed, explore=True)
        length = self.thoughts.length if length is None else length
        sampling = Sampling(num_thoughts, length, temperature, seed, self.stop, top_p, top_k)
        return self._sample(texts, positions, sampling)

    @torch.no_grad()
    def choose_positions(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        *,
        answers: Bool[Tensor, "batch seq"] | None = None,
        marked: Bool[Tensor, "batch seq"] | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        seed: int = 0,
    ) -> Int[Tensor, "batch positions"] | None:
        """Where to think in these texts by ``thoughts.positions``; None for all.

        Ascending, -1 after the last of a text with fewer; arguments as in `forward`. Training
        thinks there too, but leaves a quarter of the positions of ``weight`` and
        ``weighted_entropy`` to chance.
        """
        if self.thoughts.positions == "all":
            return None
        labels = self._targets(input_ids, attention_mask, labels)
        if sample_ids is None:
            sample_ids = torch.arange(input_ids.shape[0], device=input_ids.device)
        run = None
        if self.thoughts.positions in SCORED_RULES:
            run = run_text(self.causal_lm, input_ids)
        texts = Texts(input_ids, labels, answers, sample_ids, run, marked)
        return self._choose(texts, seed, explore=False)

    @torch.no_grad()
    def generate(
        self,
        inputs: Int[Tensor, "batch seq"] | None = None,
        *,
        think: bool | Gate = True,
        num_thoughts: int = 1,
        thought_temperature: float | None = None,
        thought_top_p: float | None = None,
        thought_top_k: int | None = None,
        seed: int = 0,
        streamer: BaseStreamer | None = None,
        replace_thoughts: Callable[[Tensor], Tensor] | None = None,
        thoughts: Int[Tensor, "texts thoughts length"] | None = None,
        **arguments: Any,
    ) -> Any:
        """Generate texts, thinking before new tokens (`quietstar.generation.generate`).

        Thoughts are dropped after use; the text is never run twice.

        Args:
            inputs: Texts, padded on the left if at all; also as ``input_ids``.
            think: True: as the model was trained, once before the first new token with
                ``thoughts.positions: answer_start``, and otherwise before each. False: what the
                plain model generates. A `Gate`: texts think where it says so.
            num_thoughts: At a time; their predictions are averaged.
            thought_temperature: Of thoughts; None takes the most likely tokens. (``temperature``
                is that of the text, as in transformers.)
            thought_top_p: Of thoughts: sample among the most likely tokens that together reach this
                probability. (``top_p`` is that of the text.)
            thought_top_k: Of thoughts: sample among so many of the most likely tokens.
            seed: Seed of the thoughts' noise.
            streamer: Is given each new token.
            replace_thoughts: Makes of the thoughts of some texts, (texts, thoughts, length), -1
                after the end of each, others of the same shape, fewer tokens or one for all; the
                model reads them in place of its own. `quietstar.evaluation.controls` has some.
            thoughts: Read before the first new token in place of any that would be drawn, -1 after
                the end of each; only for a model that thinks once (or ``Gate("once")``).
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
        self._check_ids(inputs, "inputs", ignored=False)
        if thoughts is not None:
            num_thoughts = thoughts.shape[1]
        sampling = Sampling(
            num_thoughts, self.thoughts.length, thought_temperature, seed, self.stop,
            thought_top_p, thought_top_k,
        )  # fmt: skip
        others = (streamer, arguments, replace_thoughts, thoughts)
        output = generate(self, inputs, sampling, think, *others)
        raise_failed()
        return output

    @torch.no_grad()
    def score_plain(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        candidates: Int[Tensor, " candidates"] | None = None,
    ) -> PlainScores:
        """Predict the next tokens without thoughts, as the plain model does.

        ``candidates`` are tokens whose logits are wanted; other arguments are as in `forward`.
        """
        labels = self._targets(input_ids, attention_mask, labels)
        states = plain_pass(self.causal_lm, input_ids)
        _, result, valid = next_token_loss(states, labels, self.output_head, scoring=True)
        assert result.predicted is not None, "scoring was asked for"
        shape = input_ids.shape
        metrics = plain_metrics(result.nll, valid)
        few = None if candidates is None else self.output_head.candidate_logits(states, candidates)
        logprobs, predicted = -result.nll.view(shape), result.predicted.view(shape)
        raise_failed()
        return PlainScores(logprobs, predicted, valid, metrics, few)

    @torch.no_grad()
    def next_logits(
        self,
        input_ids: Int[Tensor, "batch seq"],
        thoughts: Int[Tensor, "batch thoughts positions length"],
        positions: Int[Tensor, "batch positions"] | None = None,
        fixed_mixing_weight: float | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next token after every position, in float32, with these thoughts.

        They mix the prediction after the thought with the one without; several thoughts are
        averaged as probabilities, which makes logits log-probabilities. At a position without a
        thought, the latest one before it counts as far as ``thoughts.lookahead`` reaches, and the
        plain prediction beyond.

        Args:
            input_ids: Texts, padded on the right if at all.
            thoughts: Tokens from `sample`, or any; -1 after the last of one that ends early.
            positions: Where they are, -1 after the last of a text; None for all.
            fixed_mixing_weight: As in `forward`.
        """
        self._check_ids(input_ids, "input_ids", ignored=False)
        self._check_length(input_ids)
        self._check_given(thoughts, input_ids, positions)
        reach = 1 if positions is None else self.thoughts.lookahead
        states, weight = self.states_with(
            input_ids, token_major(thoughts), positions, fixed_mixing_weight, lookahead=reach
        )
        head, seq = self.output_head, input_ids.shape[1]
        if positions is None:
            positions = torch.arange(seq, device=input_ids.device).expand(input_ids.shape)
        logits = head.logits(states.text)
        for ahead in reversed(range(reach)):  # nearer thoughts overwrite
            places = positions + ahead
            rows, columns = ((positions >= 0) & (places < seq)).nonzero(as_tuple=True)
            places = places[rows, columns]
            # Anew: a thought further back may have been mixed into these logits already.
            base = head.logits(states.text[rows, places])
            behind = head.logits(states.ahead[ahead, :, rows, columns])
            share = weight[ahead, :, rows, columns, None].to(base.dtype)
            mixed = torch.lerp(base.expand_as(behind), behind, share)
            if len(mixed) > 1:
                mixed = mixed.log_softmax(-1).logsumexp(0, keepdim=True) - math.log(len(mixed))
            logits[rows, places] = mixed[0]
        raise_failed()
        return logits

    @torch.no_grad()
    def score_reference(
        self,
        input_ids: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"],
        thoughts: ThoughtBatch | None = None,
    ) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch positions thoughts length"] | None]:
        """Score texts, and given thoughts, as the reference of another model's training step.

        Called while the weights are those of the reference. Returns what `ThoughtBatch` calls
        ``reference_text``, and with thoughts ``reference_logprobs``, at the temperature of the
        policy term.
        """
        by_token = None
        if thoughts is None:
            text_states = plain_pass(self.causal_lm, input_ids)
        else:
            texts = Texts(input_ids, labels, None, thoughts.sample_ids)
            positions, batch = given_thoughts(thoughts, texts)
            tokens = batch.token_major()
            states, _ = self.states_with(input_ids, tokens, positions)
            text_states = states.text
            logprobs = thought_logprobs(
                states.policy, tokens, self.output_head, self.policy_temperature
            )
            by_token = rearrange(logprobs, "t k b p -> b p k t")
        _, result, _ = next_token_loss(text_states, labels, self.output_head)
        return -result.nll.view(input_ids.shape), by_token

    @torch.no_grad()
    def score_mixed(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None,
        labels: Int[Tensor, "batch seq"],
        thoughts: Int[Tensor, "batch thoughts positions length"],
        positions: Int[Tensor, "batch positions"] | None = None,
        candidates: Int[Tensor, " candidates"] | None = None,
        lookahead: int | None = None,
        text: TextRun | None = None,
    ) -> MixedScores:
        """Predict the next tokens with these thoughts, as `think` does, but for less.

        ``thoughts`` are tokens from `sample`, or any, at ``positions`` (None: at all);
        ``candidates`` are tokens whose logits are wanted. With a ``lookahead`` so many true tokens
        are predicted after each thought, and the scores have an axis for them after that of the
        positions. ``text`` is that of `run_text`, where the texts were run already.
        """
        labels = self._targets(input_ids, attention_mask, labels)
        self._check_length(input_ids)
        self._check_given(thoughts, input_ids, positions)
        tokens, head = token_major(thoughts), self.output_head
        states, weight = self.states_with(
            input_ids, tokens, positions, lookahead=lookahead or 1, text=text
        )
        result = mixed_predictions(states, weight, labels, head, positions)
        few = None
        if candidates is not None:
            few = mixed_candidates(states, weight, head, candidates, positions)
        assert result.predicted is not None, "it was asked for"
        order = "a k b p ... -> b k p a ..."
        logprobs, predicted = rearrange(-result.mixed, order), rearrange(result.predicted, order)
        raise_failed()
        few = None if few is None else rearrange(few, order)
        if lookahead is None:
            few = None if few is None else few[..., 0, :]
            return MixedScores(logprobs[..., 0], predicted[..., 0], few)
        return MixedScores(logprobs, predicted, few)


def marker_tokens(
    tokenizer: PreTrainedTokenizerBase, thoughts: ThoughtsConfig
) -> tuple[list[int], list[int]]:
    """Tokens of the texts that open and close thoughts.

    Raises:
        UserError: A text without tokens.
    """
    tokens = []
    for key, text in (("start_init", thoughts.start_init), ("end_init", thoughts.end_init)):
        tokens.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not tokens[-1]:
            raise UserError(
                f"thoughts.{key}: {text!r} has no tokens in this tokenizer; choose another text"
            )
    return tokens[0], tokens[1]


def given_thoughts(
    thoughts: ThoughtBatch, texts: Texts
) -> tuple[Int[Tensor, "batch positions"] | None, ThoughtBatch]:
    """Fit given thoughts to the texts of a call; their positions, None for all.

    Raises:
        UserError: Thoughts of other texts, at no position, or with lengths that their tokens do
            not have.
    """
    ids, positions = texts.input_ids, thoughts.positions
    if thoughts.input_ids.shape != ids.shape or thoughts.tokens.shape[:2] != positions.shape:
        raise UserError(
            f"thoughts of texts {tuple(thoughts.input_ids.shape)} at positions "
            f"{tuple(positions.shape)} with tokens {tuple(thoughts.tokens.shape)} do not fit "
            f"input_ids {tuple(ids.shape)}. Give the texts that they were sampled for."
        )
    expect(
        (thoughts.input_ids == ids).all(),
        "thoughts of other texts than input_ids. Give those texts.",
    )
    check_lengths(thoughts, "thoughts")
    check_logprobs(thoughts, "thoughts.sampling_logprobs")
    batch = replace(thoughts, input_ids=ids, labels=texts.labels, answer_mask=texts.answer_mask)
    is_everywhere = thoughts.everywhere
    if is_everywhere is None and positions.shape == ids.shape and has_content(ids):
        seq = torch.arange(ids.shape[1], device=ids.device)  # a user's own making: waits to see
        is_everywhere = bool((positions == seq).all())
    if is_everywhere:
        return None, batch
    return positions.where(positions >= 0, NO_POSITION), batch


def check_texts(texts: Any) -> None:
    """Refuse what does not fit the texts beside which it is given.

    Raises:
        UserError: Sample ids, answers or marks of another shape than the texts ask for.
    """
    shape = texts.input_ids.shape
    for name, x, wanted in (
        ("sample_ids", texts.sample_ids, shape[:1]),
        ("answers", texts.answer_mask, shape),
        ("marked", texts.marked, shape),
    ):
        if x is not None and x.shape != wanted:
            raise UserError(
                f"{name} of shape {tuple(x.shape)}: must be {tuple(wanted)}, as input_ids have "
                f"shape {tuple(shape)}. Give those of these texts."
            )


def check_positions(positions: Tensor, input_ids: Tensor) -> None:
    """Refuse positions that no texts have.

    Raises:
        UserError: Another shape or type than (batch, positions) of integers; or not ascending, with
            -1 after the last, inside the texts.
    """
    shape, batch_size = positions.shape, input_ids.shape[0]
    if positions.dtype != torch.long or len(shape) != 2 or shape[0] != batch_size or not shape[1]:
        raise UserError(
            f"positions: {positions.dtype} of shape {tuple(shape)} cannot be; they must be "
            f"torch.int64 of ({batch_size}, positions), one at least. Pad with {NO_POSITION}."
        )
    before, after = positions[:, :-1], positions[:, 1:]
    follows = ((before >= 0) & (after > before)) | (after == NO_POSITION)
    ok = follows.all() & (positions < input_ids.shape[1]).all() & (positions >= NO_POSITION).all()
    expect(
        ok,
        f"positions: must ascend from 0 to {input_ids.shape[1] - 1} in every text, each once, with "
        f"{NO_POSITION} after the last. Sort them.",
    )


def check_lengths(thoughts: ThoughtBatch, name: str) -> None:
    """Refuse lengths that the tokens do not have."""
    counted = (thoughts.tokens != NO_TOKEN).sum(-1)
    is_shape = thoughts.lengths.shape == counted.shape
    expect(
        (thoughts.lengths == counted).all() if is_shape else torch.tensor(False),
        f"{name} have other lengths than tokens before the first {NO_TOKEN}. Make them with "
        "ThoughtBatch.of_texts(texts, positions, tokens, lengths).",
    )


def check_objective(objective: Objective, name: str) -> None:
    """Refuse attributes of an objective that mean nothing."""
    for attribute, known in (
        ("reference", ("current", "ema", "base")),
        ("token_weighting", ("sum", "mean", "constant")),
        ("target_weighting", ("mean", "sum")),
    ):
        value = getattr(objective, attribute)
        if value not in known:
            raise UserError(
                f"{name}: its {attribute} ({value!r}) must be {', '.join(known[:-1])} or "
                f"{known[-1]}. Correct it."
            )


def check_logprobs(thoughts: Any, name: str) -> None:
    """Refuse log-probabilities that are none of these tokens."""
    x, tokens = thoughts.sampling_logprobs, thoughts.tokens
    if x is None:
        return
    if x.shape != tokens.shape or x.device != tokens.device or not x.is_floating_point():
        raise UserError(
            f"{name} are {x.dtype} of shape {tuple(x.shape)} on {x.device}, but must be "
            f"floating-point numbers of the tokens' shape {tuple(tokens.shape)} on "
            f"{tokens.device}. Give one for each token, or None."
        )
    expect(
        ((x <= ROUNDING) & x.isfinite() | (tokens < 0)).all(),
        f"{name} are above 0 or not finite at some tokens, but those of tokens that were drawn are "
        "neither. Give natural logarithms of probabilities, or None.",
    )


def token_major(thoughts: Int[Tensor, "batch thoughts positions length"]) -> Tensor:
    """Thought tokens in the order in which blocks are laid out."""
    return thoughts.permute(3, 1, 0, 2).contiguous().long()


def check_figures(x: object, shape: torch.Size, device: torch.device, name: str) -> None:
    """Refuse what a part of the user's must not return.

    Raises:
        UserError: No tensor, another shape, type or device, a gradient, or a figure that is not
            finite.
    """
    axes = ", ".join(("batch", "positions", "thoughts", "lookahead")[: len(shape)])
    if not isinstance(x, Tensor) or x.shape != shape:
        what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(
            f"{name}: it returned {what}, but must return a tensor of shape {tuple(shape)} "
            f"({axes}). Mend its last line."
        )
    if not x.is_floating_point() or x.device != device:
        raise UserError(
            f"{name}: it returned a tensor of {x.dtype} on {x.device}, but must return one of "
            f"float32 on {device}. Make it from the tensors it is given, and call float() on it."
        )
    if x.requires_grad:
        raise UserError(
            f"{name}: it returned a tensor with a gradient, but rewards and weights are constants "
            "of the loss. Call detach() on it."
        )
    expect(
        x.isfinite().all(),
        f"{name}: it returned figures that are not finite. Bound them, or mask them by valid.",
    )


def _first(x: Tensor, wrong: Tensor) -> str:
    """The first wrong one in brackets, where the host sees it."""
    return f" ({x[wrong][0].item()})" if on_host(x) and wrong.any() else ""


def target_labels(
    input_ids: Tensor,
    attention_mask: Bool[Tensor, "batch seq"] | Tensor | None,
    labels: Tensor | None,
) -> Int[Tensor, "batch seq"]:
    """Labels with padding ignored.

    Raises:
        UserError: Padding on the left.
    """
    labels = input_ids if labels is None else labels
    if attention_mask is None:
        return labels
    real = attention_mask.bool()
    expect(
        (real[:, 1:] <= real[:, :-1]).all(),
        "texts must be padded on the right (tokenizer.padding_side = 'right')",
    )
    return labels.where(real, IGNORE_INDEX)


AutoModelForCausalLM.register(QuietStarModelConfig, QuietStarForCausalLM)
