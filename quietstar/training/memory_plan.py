"""The memory of a run, by what it is for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from quietstar.backbone.loading import build_config, drop_dropout
from quietstar.config import Config, ThoughtsConfig, TuningConfig
from quietstar.errors import UserError
from quietstar.losses.cross_entropy import chunk_rows
from quietstar.model.learning import resolve_chunk_tokens
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.tuning import decoder_layers
from quietstar.sampling.positions import ANSWER_RULES, most_positions
from quietstar.training.memory_trace import MemoryTrace, fake_tokens, num_bytes, trainable
from quietstar.training.optimizer import is_projected
from quietstar.training.setup import find_tokenizer, teach_thinking
from quietstar.training.stages import Stage, begin_stage, plan_stages

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
IN_PIECES = ("zero3", "fsdp2")
"""Engines that hold weights in pieces."""
PROGRAM = 175 * 2**20
"""What a run loads into the machine's memory besides: texts, tokenizer, loggers, kernels' code.

Measured: 174 and 176 MiB in two runs of SmolLM2-135M.
"""
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process, above those of the process that has imported everything.

    Attributes:
        weights: Of the model, this process's part.
        gradients: When all are there.
        optimizer: State, and the copy of the weights that ZeRO keeps.
        exchange: Layers gathered from pieces, and buffers of gradients under way.
        rollout: Most that is alive while thoughts are sampled.
        learning: Most that is alive in forward and backward, beyond the gradients alive then.
        learning_gradients: Those gradients.
        cache: Keys and values of a rollout, a part of ``rollout``.
        logits: Of one chunk of the cross entropy, a part of ``learning``.
    """

    weights: int
    gradients: int
    optimizer: int
    exchange: int
    rollout: int
    learning: int
    learning_gradients: int
    cache: int
    logits: int

    @property
    def step(self) -> int:
        """Most at any moment of a step, beyond what is there all the time."""
        return max(self.rollout, self.learning + self.learning_gradients, self.gradients)

    @property
    def resting(self) -> int:
        """What is there all the time."""
        return self.weights + self.optimizer + self.exchange

    @property
    def total(self) -> int:
        """Most at any moment."""
        return self.resting + self.step

    @property
    def total_on_cpu(self) -> int:
        """The same where the machine's memory also holds the program."""
        return self.total + PROGRAM


@dataclass(frozen=True)
class Shares:
    """Part of the weights, gradients and optimiser's state that one process holds."""

    weights: float
    gradients: float
    optimizer: float

    @classmethod
    def of(cls, engine: str, processes: int) -> Shares:
        """What an engine cuts over how many processes."""
        part = 1 / processes
        return cls(
            weights=part if engine in IN_PIECES else 1.0,
            gradients=part if engine in ("zero2", "zero3", "fsdp2") else 1.0,
            optimizer=part if engine not in ("single", "ddp") else 1.0,
        )


def estimate_run(config: Config, engine: str, processes: int) -> Estimate:
    """The memory of the stage that needs most.

    Args:
        config: Of the run; its weights are not loaded, but its tokenizer and config are.
        engine: One of `ENGINES`.
        processes: All of them together.

    Raises:
        UserError: The model cannot be built, or the tuning method cannot be planned.
    """
    if config.tuning.method == "qlora":
        raise UserError(
            "tuning.method: qlora cannot be planned, since 4-bit weights exist only once loaded; "
            "plan lora, and take three quarters of its frozen weights off"
        )
    tokenizer = find_tokenizer(config, _hub(config))
    stages = plan_stages(config)
    estimates = [_estimate_stage(stage, tokenizer, engine, processes) for stage in stages]
    return max(estimates, key=lambda estimate: estimate.total)


def _hub(config: Config) -> dict[str, Any]:
    return {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}


def _estimate_stage(
    stage: Stage, tokenizer: PreTrainedTokenizerBase, engine: str, processes: int
) -> Estimate:
    config = _with_known_positions(stage.config)
    model = _without_weights(config, tokenizer)
    on_cpu = engine == "single" and not torch.cuda.is_available()
    model.learn_chunk_tokens = resolve_chunk_tokens(
        config.training.learn_chunk_tokens,
        "cpu" if on_cpu else "cuda",
        engine in IN_PIECES,
        config.training.gradient_checkpointing,
    )
    begin_stage(model, dataclasses.replace(stage, config=config))
    shares = Shares.of(engine, processes)
    rollout, learning = _trace(model, config, stage.thinks, shares.gradients)
    trained = num_bytes(trainable(model))
    return Estimate(
        weights=int(num_bytes(model.parameters()) * shares.weights),
        gradients=int(trained * shares.gradients),
        optimizer=int(_optimizer_bytes(model, config.tuning, engine) * shares.optimizer),
        exchange=_exchange_bytes(model, engine),
        rollout=rollout.peak,
        learning=learning.peak - learning.peak_gradients,
        learning_gradients=learning.peak_gradients,
        cache=_cache_bytes(model, config) if stage.thinks else 0,
        logits=chunk_rows(model.vocab_size) * model.vocab_size * _FLOAT,
    )


def _with_known_positions(config: Config) -> Config:
    """Answers may be as long as the text: then every position thinks."""
    if config.thoughts.positions not in ANSWER_RULES:
        return config
    thoughts = config.thoughts.model_copy(update={"positions": "all"})
    return config.model_copy(update={"thoughts": thoughts})


def _without_weights(config: Config, tokenizer: PreTrainedTokenizerBase) -> QuietStarForCausalLM:
    """The model as a run builds it, on the meta device."""
    settings = _model_config(config, len(tokenizer))
    drop_dropout(settings)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            settings,
            dtype=getattr(torch, config.model.dtype),
            trust_remote_code=config.model.trust_remote_code,
        )
    return teach_thinking(base, config, tokenizer).train()


def _model_config(config: Config, vocab_size: int) -> PreTrainedConfig:
    name = config.model.name_or_path
    try:
        if name is None:
            return build_config(dict(config.model.config or {}), vocab_size)
        return AutoConfig.from_pretrained(name, **_hub(config))
    except (OSError, ValueError, KeyError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise UserError(
            f"model.name_or_path: {name!r}: its config cannot be read ({reason})"
        ) from problem


def _trace(
    model: QuietStarForCausalLM, config: Config, thinks: bool, gradient_share: float
) -> tuple[MemoryTrace, MemoryTrace]:
    """Rollout alone, and whole micro-batches (two where gradients are accumulated)."""
    settings = config.training
    passes = 2 if settings.global_batch_size > settings.micro_batch_size else 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        tokens = fake_tokens(settings.micro_batch_size, config.data.seq_len)
        ids = torch.arange(len(tokens))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.mixed_precision == "bf16")
        rollout, learning = MemoryTrace(model), MemoryTrace(model, gradient_share)
        if thinks:
            with rollout, autocast:
                positions = model.choose_positions(tokens, sample_ids=ids)
                count, temperature = config.thoughts.num_thoughts, config.thoughts.temperature
                model.sample(
                    tokens, num_thoughts=count, temperature=temperature, positions=positions
                )
        for _ in range(passes):
            with learning, autocast:
                output = model(tokens, sample_ids=ids, think=thinks)
            assert output.loss is not None, "forward gives a loss"
            with learning:
                output.loss.backward()
            del output
    return rollout, learning


def _optimizer_bytes(model: nn.Module, tuning: TuningConfig, engine: str) -> int:
    """AdamW's two moments in the parameters' type; ZeRO adds a copy of the weights in float32."""
    total = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = parameter.numel()
        if tuning.method == "galore" and is_projected(name, parameter, tuning.galore_rank):
            moments = tuning.galore_rank * max(parameter.shape)
            total += tuning.galore_rank * min(parameter.shape) * parameter.element_size()
        total += 2 * moments * parameter.element_size()
        if engine.startswith("zero"):
            total += _FLOAT * parameter.numel()
    return total


def _exchange_bytes(model: QuietStarForCausalLM, engine: str) -> int:
    """What is gathered at once, and the buffers in which gradients travel."""
    trained = num_bytes(trainable(model))
    if engine == "single":
        return 0
    if engine == "ddp":
        return trained  # its buckets
    if engine in ("zero1", "zero2"):
        return min(trained, 2 * 500_000_000 * _FLOAT)  # two buckets of 5e8 elements
    layers = decoder_layers(model.causal_lm)
    of_layers = [num_bytes(layer.parameters()) for layer in layers]
    outer = num_bytes(model.parameters()) - sum(of_layers)
    return outer + 2 * max(of_layers)  # the layer at work and the next one


def _cache_bytes(model: QuietStarForCausalLM, config: Config) -> int:
    """Keys and values of the text and of all thoughts."""
    fields = model.causal_lm.config.get_text_config()
    heads = getattr(fields, "num_key_value_heads", None) or fields.num_attention_heads
    size = getattr(fields, "head_dim", None) or fields.hidden_size // fields.num_attention_heads
    in_bf16 = config.training.mixed_precision == "bf16" or config.model.dtype == "bfloat16"
    tokens = _cached_tokens(config.thoughts, config.data.seq_len)
    rows = config.training.micro_batch_size * tokens
    return rows * fields.num_hidden_layers * 2 * heads * size * (2 if in_bf16 else _FLOAT)


def _cached_tokens(thoughts: ThoughtsConfig, seq_len: int) -> int:
    positions = seq_len
    if thoughts.positions != "all":
        positions = most_positions(thoughts.position_fraction, seq_len)
    return seq_len + thoughts.num_thoughts * positions * thoughts.length
