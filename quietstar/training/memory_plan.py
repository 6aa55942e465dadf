"""The memory of a run, by purpose, from a step on fake tensors: shapes without content."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from quietstar.backbone.loading import build_config, drop_dropout, read_config
from quietstar.backbone.run import decoder_layers
from quietstar.config import Config
from quietstar.config.schema import GYM, SYNTHETIC
from quietstar.data import build_data
from quietstar.data.sources import find_local
from quietstar.errors import UserError, reading, reason_of
from quietstar.losses.cross_entropy import chunk_rows
from quietstar.losses.groups import resolve_chunk_tokens
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.tuning import WHOLE
from quietstar.sampling.positions import ANSWER_RULES, MARKED_RULES, most_positions
from quietstar.training.batches import count_thinking
from quietstar.training.build import find_tokenizer, hub_source, teach_thinking
from quietstar.training.gpu_cost import GPUS, Shape, StepCost, Work, step_cost
from quietstar.training.optimizer import is_projected
from quietstar.training.stages import Stage, begin_stage, plan_stages

logger = logging.getLogger(__name__)

CUT = {"single": "", "ddp": "", "zero1": "optimizer", "zero2": "optimizer gradients",
       "zero3": "optimizer gradients weights", "fsdp2": "optimizer gradients weights"}  # fmt: skip
"""What engines cut into a part for each process."""
LIBRARIES = 480 * 2**20
"""Resident bytes of a process that has imported everything (torch 2.13)."""
PROGRAM, PROGRAM_BY_TOKEN = 53 * 2**20, 2560
"""Bytes that a run loads into the machine's memory besides (texts, loggers, kernels), and for each
token of the vocabulary (tokenizer, texts of tokens): a line through 175 MiB at 49k (SmolLM2-135M)
and 430 at 152k (Qwen2.5-Coder-0.5B)."""
HEAP_OF_ALL, HEAP_OF_FEW = 1.25, 1.7
"""What glibc's heap takes for what a step has alive, since it keeps what is freed and the holes
between what stays: where all weights train, and beside frozen ones, whose small activations stay
between large ones that go. Measured in two and in four runs (results/lab/scaling.md)."""
MOST_LAYERS = 2_000
TRACED_LAYERS = 2
"""Layers of the smaller of two models that are traced, whole periods of unlike layers; memory is a
straight line in their number."""
SAMPLED_TEXTS = 128
"""Texts of the data that say how long texts are, and how many thoughts they have."""
_FLOAT = 4  # bytes
_LEAST_IN_8_BIT = 4096  # weights of a parameter whose moments bitsandbytes keeps in 8 bits


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process, above those of a process that has imported everything."""

    weights: int  # this process's part of the model
    gradients: int  # all gradients, when all are there
    optimizer: int  # its state, and the copy of the weights that ZeRO keeps
    average: int  # of the weights (training.ema_decay), and the start (loss.reference: base)
    exchange: int  # gathered layers, and buffers of gradients under way
    rollout: int  # peak while thoughts are sampled
    learning: int  # peak in forward and backward, beyond the gradients alive at that moment
    learning_gradients: int  # those gradients
    cache: int  # keys and values of a rollout, a part of `rollout`
    logits: int  # logits of one chunk of the cross entropy, a part of `learning`
    program: int  # texts, tokenizer and the like in the machine's memory
    heap: float  # memory of a CPU that a step takes, over what it has alive
    costs: dict[str, StepCost]  # seconds of a step by GPU, by the model of cost, not measured

    @property
    def step(self) -> int:
        """Peak of a step, beyond what is there all the time."""
        return max(self.rollout, self.learning + self.learning_gradients, self.gradients)

    @property
    def total(self) -> int:
        """Peak at any moment."""
        return self.weights + self.optimizer + self.average + self.exchange + self.step

    @property
    def total_on_cpu(self) -> int:
        """The same where the machine's memory also holds the program, and the heap has holes."""
        return self.total + int((self.heap - 1) * self.step) + self.program

    @property
    def resident(self) -> int:
        """Resident memory of a whole process on a CPU."""
        return self.total_on_cpu + LIBRARIES


def estimate_run(config: Config, engine: str, processes: int) -> Estimate:
    """Estimates the memory of the stage that needs most, without loading weights.

    The engine is one of `CUT`.

    Raises:
        UserError: The model cannot be built, or the tuning method cannot be planned.
    """
    if config.tuning.method == "qlora":
        raise UserError(
            "tuning.method: qlora cannot be planned, since 4-bit weights exist only once loaded; "
            "plan lora, and take three quarters of its frozen weights off"
        )
    tokenizer, stages = find_tokenizer(config), plan_stages(config)
    try:
        estimates = [_estimate_stage(stage, tokenizer, engine, processes) for stage in stages]
    except UserError:
        raise
    except Exception as problem:  # whatever a model raises at sizes that do not fit together
        name = config.model.name_or_path or "model.config"
        raise UserError(
            f"model ({name}): a step of it cannot be planned ({reason_of(problem)}). Check the "
            "sizes in its config, and those of thoughts and data."
        ) from problem
    return max(estimates, key=lambda estimate: estimate.total)


def _estimate_stage(
    stage: Stage, tokenizer: PreTrainedTokenizerBase, engine: str, processes: int
) -> Estimate:
    config = _as_the_data_are(stage, tokenizer)
    model = model_without_weights(config, tokenizer)
    objective, loss = model.objective, config.loss
    reads_start = objective.reference == "base" and objective.reads_reference(loss.reward)
    # What other weights say is not there without weights, nor what a user's reward would read.
    alone = {"reference": "current", "kl_weight": 0.0, "reward_kl_weight": 0.0}
    alone = {key: value for key, value in alone.items() if key in type(loss).model_fields}
    alone |= {"reward": "thought"} if ":" in loss.reward else {}
    config = config.model_copy(update={"loss": loss.model_copy(update=alone)})
    device = "cpu" if engine == "single" and not torch.cuda.is_available() else "cuda"
    sharded, training = "weights" in CUT[engine], config.training
    chunk_tokens = resolve_chunk_tokens(
        training.learn_chunk_tokens, device, sharded, training.gradient_checkpointing
    )
    stage = dataclasses.replace(stage, config=config)
    begin_stage(model, stage)
    weight_share, gradient_share, optimizer_share = (
        1 / processes if part in CUT[engine] else 1.0
        for part in ("weights", "gradients", "optimizer")
    )
    rollout, learning, learning_gradients = _peaks(
        model, tokenizer, stage, chunk_tokens, gradient_share
    )
    weights, judge = num_bytes(model.parameters()), config.judge.model
    others = 0  # of which every process has all: a judge in a folder
    if judge is not None:
        others = sum(path.stat().st_size for path in Path(judge).glob("*.safetensors"))
    trained = num_bytes(p for p in model.parameters() if p.requires_grad)
    average = _FLOAT * sum(p.numel() for p in model.parameters() if p.requires_grad) * weight_share
    num_averages = (training.ema_decay is not None) + (loss.thinks and reads_start)
    if sharded:  # gathered at once: what no layer holds, the layer at work, the next one
        layers = [num_bytes(layer.parameters()) for layer in decoder_layers(model.causal_lm)]
        exchange = weights - sum(layers) + 2 * max(layers)
    else:  # gradients in transit: DDP's buckets, or two of 5e8 elements
        largest = {"single": 0, "ddp": trained}.get(engine, 2 * 500_000_000 * _FLOAT)
        exchange = min(trained, largest)
    return Estimate(
        weights=int(weights * weight_share) + others,
        gradients=int(trained * gradient_share),
        optimizer=int(_optimizer_bytes(model, config, engine) * optimizer_share),
        average=int(average) * num_averages,
        exchange=exchange,
        rollout=rollout,
        learning=learning - learning_gradients,
        learning_gradients=learning_gradients,
        cache=_cache_bytes(model, config) if stage.thinks else 0,
        logits=chunk_rows(model.vocab_size) * model.vocab_size * _FLOAT,
        program=PROGRAM + PROGRAM_BY_TOKEN * model.vocab_size,
        heap=HEAP_OF_ALL if config.tuning.method in WHOLE else HEAP_OF_FEW,
        costs=_costs(model, stage, processes, reads_start),
    )


def _costs(
    model: QuietStarForCausalLM, stage: Stage, processes: int, reference: bool
) -> dict[str, StepCost]:
    """Count a step's seconds on each GPU of `GPUS`."""
    config, thoughts, training = stage.config, stage.config.thoughts, stage.config.training
    places = most_positions(thoughts.positions, thoughts.position_fraction, config.data.seq_len)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    work = Work(
        texts=-(-training.global_batch_size // processes),
        text_length=config.data.seq_len,
        places=places if stage.thinks else 0,
        num_thoughts=thoughts.num_thoughts,
        thought_length=thoughts.length,
        lookahead=thoughts.lookahead,
        trained=trained / sum(p.numel() for p in model.parameters()),
        micro_batch=training.micro_batch_size,
        epochs=training.inner_epochs,
        reference=reference and stage.thinks,
        recompute=training.gradient_checkpointing,
    )
    layers = decoder_layers(model.causal_lm)
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
    shape = Shape.of(model.causal_lm.config, weights // len(layers))
    rows = chunk_rows(model.vocab_size)
    return {name: step_cost(shape, work, gpu, rows) for name, gpu in GPUS.items()}


def _as_the_data_are(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> Config:
    """Replaces what only the data know, how long texts are and where they think, by a sample's.

    Data that lie elsewhere are assumed to fill ``data.seq_len`` and to have one answer a text, or
    marks everywhere.
    """
    config, thoughts = stage.config, stage.config.thoughts
    named, rule, data = config.data.train, thoughts.positions, config.data
    width, count = data.seq_len, 1 if rule == "answer_start" else data.seq_len - 1
    try:
        generated = str(named).startswith((GYM, SYNTHETIC))
        if named is None or (find_local(named, "data.train") is None and not generated):
            raise UserError("data.train is not on this machine.")
        few = data.task_options | {"size": SAMPLED_TEXTS} if generated else {}
        lazily = {"streaming": True, "eval": None, "eval_sequences": 16, "task_options": few}
        train_data, _, _ = build_data(
            data.model_copy(update=lazily), tokenizer, config.training.seed,
            thoughts if stage.thinks else None,
        )  # fmt: skip
        texts = train_data.batch(0, SAMPLED_TEXTS)
        width, count = texts.input_ids.shape[1], max(1, int(count_thinking(texts, thoughts).max()))
    except UserError as problem:
        logger.warning(
            "%s: planned for texts of data.seq_len (%d) tokens, with at most %d thoughts each (%s)",
            stage.name, width, count if stage.thinks else 0, problem,
        )  # fmt: skip
    config = config.model_copy(update={"data": data.model_copy(update={"seq_len": width})})
    if rule in (*ANSWER_RULES, *MARKED_RULES):
        rule = "random" if count > 1 else "one_random"
        chosen = {"positions": rule, "position_fraction": float(count)}
        config = config.model_copy(update={"thoughts": thoughts.model_copy(update=chosen)})
    return config


def model_without_weights(
    config: Config, tokenizer: PreTrainedTokenizerBase, num_layers: int | None = None
) -> QuietStarForCausalLM:
    """Builds the model as a run does, on the meta device; UserError if its config is unreadable.

    With ``num_layers``, only the first layers of the base.
    """
    name = config.model.name_or_path
    what = "model.config" if name is None else f"model.name_or_path ({name})"
    with reading(what, "Give the config of a causal language model."):
        if name is None:
            settings = build_config(dict(config.model.config or {}), len(tokenizer))
        else:
            source, options = hub_source(name, config)
            settings = read_config(source, **options)
        fields = settings.get_text_config()
        layers = getattr(fields, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise UserError(
                f"{what}: num_hidden_layers ({layers}): must be at most {MOST_LAYERS}, since a "
                "plan goes through the layers one by one. Set it lower."
            )
    if num_layers is not None:
        for key, value in _by_layer(fields).items():
            setattr(fields, key, value[:num_layers])
        fields.num_hidden_layers = num_layers
    drop_dropout(settings)
    with reading(what, "Give the config of a causal language model."), torch.device("meta"):
        dtype, trust = getattr(torch, config.model.dtype), config.model.trust_remote_code
        base = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=trust)
    return teach_thinking(base, config, tokenizer).train()


def _by_layer(fields: PreTrainedConfig) -> dict[str, list[Any]]:
    """Lists the settings that say something of every layer."""
    count = fields.num_hidden_layers
    return {k: v for k, v in vars(fields).items() if isinstance(v, list) and len(v) == count}


def _peaks(
    model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, stage: Stage,
    chunk_tokens: int | None, gradient_share: float,
) -> tuple[int, int, int]:  # fmt: skip
    """Peaks of rollout and learning, and the gradients at the latter, from few layers if many."""
    config, fields = stage.config, model.causal_lm.config.get_text_config()
    lists, total = _by_layer(fields).values(), fields.num_hidden_layers
    period = next(n for n in range(1, total + 1) if all(v[n:] == v[:-n] for v in lists))
    few = period * -(-TRACED_LAYERS // period)
    whole = 2 * few >= total or bool(config.tuning.unfreeze)
    found = []
    for count in (None,) if whole else (few, 2 * few):
        part = model if count is None else model_without_weights(config, tokenizer, count)
        part.learn_chunk_tokens = chunk_tokens
        begin_stage(part, stage)
        rollout, learning = _trace(part, config, stage.thinks, gradient_share)
        found.append((rollout.peak, learning.peak, learning.peak_gradients))
    if whole:
        return found[0]
    rollout, learning, gradients = (
        a + (b - a) * (total - few) // few for a, b in zip(*found, strict=True)
    )
    return rollout, learning, gradients


def _trace(
    model: QuietStarForCausalLM, config: Config, thinks: bool, gradient_share: float
) -> tuple[MemoryTrace, MemoryTrace]:
    """Traces a rollout alone, and whole micro-batches (two where gradients are accumulated)."""
    settings = config.training
    passes = 2 if settings.global_batch_size > settings.micro_batch_size else 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                # Backward would look for the padding in tokens that have no content.
                module.padding_idx = None
        tokens = torch.zeros(settings.micro_batch_size, config.data.seq_len, dtype=torch.long)
        ids = torch.arange(len(tokens))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.mixed_precision == "bf16")
        rollout, learning = MemoryTrace(model), MemoryTrace(model, gradient_share)
        if thinks:
            drawn = config.thoughts.model_dump(
                include={"num_thoughts", "temperature", "top_p", "top_k"}
            )
            with rollout, autocast:
                positions = model.choose_positions(tokens, sample_ids=ids)
                model.draw(tokens, positions=positions, **drawn)
        for _ in range(passes):
            with learning, autocast:
                output = model(tokens, sample_ids=ids, think=thinks)
            assert output.loss is not None, "forward gives a loss"
            with learning:
                output.loss.backward()
            del output
    return rollout, learning


def _optimizer_bytes(model: nn.Module, config: Config, engine: str) -> int:
    """Counts AdamW's two moments; ZeRO adds a float32 copy of weights.

    They have the parameters' type, or the bits of ``optim.name``; bitsandbytes keeps those of small
    parameters in 32 bits, and pages that have left the GPU are counted.
    """
    total, tuning = 0, config.tuning
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = parameter.numel()
        rank = tuning.method_options.rank if tuning.method == "galore" else 0
        if rank and is_projected(name, parameter, rank):
            moments = rank * max(parameter.shape)
            total += rank * min(parameter.shape) * parameter.element_size()
        size = parameter.element_size()
        if config.optim.name != "adamw_torch":
            is_small = moments < _LEAST_IN_8_BIT or config.optim.name.endswith("32bit")
            size = _FLOAT if is_small else 1
        total += 2 * moments * size
        if engine.startswith("zero"):
            total += _FLOAT * parameter.numel()
    return total


def _cache_bytes(model: QuietStarForCausalLM, config: Config) -> int:
    """Counts keys and values of the text and of all thoughts."""
    fields, thoughts = model.causal_lm.config.get_text_config(), config.thoughts
    heads = getattr(fields, "num_key_value_heads", None) or fields.num_attention_heads
    size = getattr(fields, "head_dim", None) or fields.hidden_size // fields.num_attention_heads
    in_bf16 = config.training.mixed_precision == "bf16" or config.model.dtype == "bfloat16"
    length = config.data.seq_len
    positions = most_positions(thoughts.positions, thoughts.position_fraction, length)
    tokens = length + thoughts.num_thoughts * positions * thoughts.length
    rows = config.training.micro_batch_size * tokens
    return rows * fields.num_hidden_layers * 2 * heads * size * (2 if in_bf16 else _FLOAT)


class MemoryTrace(TorchDispatchMode):
    """Counts the bytes that operators make and that are let go, while it is entered.

    Parameters of the model are not counted; gradients are, by the share that stays on this process.
    ``peak`` is the most alive at once, ``peak_gradients`` that of gradients at that moment.
    """

    def __init__(self, model: QuietStarForCausalLM, gradient_share: float = 1.0) -> None:
        super().__init__()
        self.peak = self.peak_gradients = 0
        self._share = gradient_share
        self._live: dict[int, int] = {}
        self._others = self._gradients = 0
        for parameter in model.parameters():
            self._live[_key(parameter)] = 0
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._mark_gradient)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operator; counts what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # Sparse ones are rows of a gradient, counted already, and their tokens.
            if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
                continue
            storage, key = leaf.untyped_storage(), _key(leaf)
            if key not in self._live:
                self._live[key] = storage.nbytes()
                self._others += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
                self._note()
        return result

    def _forget(self, key: int) -> None:
        self._others -= self._live.pop(key, 0)

    def _mark_gradient(self, parameter: nn.Parameter) -> None:
        """Moves a gradient that stays from the other tensors to the gradients."""
        assert parameter.grad is not None, "called after it was added up"
        key = _key(parameter.grad)
        if size := self._live.get(key, 0):
            self._live[key] = 0
            self._others -= size
            self._gradients += int(size * self._share)
            self._note()

    def _note(self) -> None:
        alive = self._others + self._gradients
        if alive > self.peak:
            self.peak, self.peak_gradients = alive, self._gradients


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Counts the bytes of tensors that share no memory."""
    return sum(x.numel() * x.element_size() for x in tensors)
