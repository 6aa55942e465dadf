"""What a training step costs on a GPU, by arithmetic: a model of cost, not a measurement.

Every part of a step takes the longest of three times: its products at half of the GPU's peak in
bfloat16, its bytes at the bandwidth, and its kernel launches. Communication between processes and
elementwise kernels (norms, rotary) are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

EFFICIENCY = 0.5
"""Share of the peak that large matrix products reach."""
LAUNCH = 6e-6
"""Seconds of the host for one kernel."""
LAUNCHES_OF_LAYER, LAUNCHES_OF_TOKEN = 69, 153
"""Kernels of one pass of the rollout, by layer and besides (sampling, noise, stops)."""
LEARN_LAUNCHES = 3 * LAUNCHES_OF_LAYER
"""Kernels of a layer, forward and backward, for each group of thoughts."""
GROUP_TOKENS = 16_384
"""Tokens that learn at once (``training.learn_chunk_tokens: auto`` on a GPU)."""
HEAD_PASSES = 6
"""Times that a chunk of the loss moves the head's weights: two reads in bfloat16, and its gradient
read and written in float32."""
ADAMW_BYTES = 28.0
"""Read and written for each float32 weight: weight, gradient and two moments; all but one twice."""
MARKERS = 2
"""Tokens around a thought."""
_HALF = 2.0  # bytes


class Gpu(NamedTuple):
    """What a GPU's maker says of it."""

    tflops: float  # bfloat16 products without sparsity, TFLOP/s
    memory: float  # GB
    bandwidth: float  # TB/s


GPUS = {
    "H100": Gpu(989.0, 80.0, 3.35),
    "A100": Gpu(312.0, 80.0, 2.04),
    "RTX 4090": Gpu(165.0, 24.0, 1.01),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model.

    Attributes:
        layers: Decoder layers.
        layer_weights: Weights of one layer that a token is multiplied with.
        head_weights: Weights of the output head.
        query_size: Heads times the size of a head.
        key_size: The same of keys, fewer with grouped heads.
    """

    layers: int
    layer_weights: int
    head_weights: int
    query_size: int
    key_size: int

    @classmethod
    def of(cls, config: Any, layer_weights: int | None = None) -> Shape:
        """Read a transformers config.

        Without ``layer_weights``, those of a layer with a gated MLP (Llama, Qwen, Mistral).
        """
        fields = config.get_text_config()
        heads, hidden = fields.num_attention_heads, fields.hidden_size
        size = getattr(fields, "head_dim", None) or hidden // heads
        query = heads * size
        key = (getattr(fields, "num_key_value_heads", None) or heads) * size
        if layer_weights is None:
            layer_weights = int(hidden * (2 * query + 2 * key + 3 * fields.intermediate_size))
        head = fields.vocab_size * hidden
        return cls(fields.num_hidden_layers, layer_weights, head, query, key)

    @property
    def weights(self) -> int:
        """Weights that a token is multiplied with, the head's too."""
        return self.layers * self.layer_weights + self.head_weights

    def attention(self, context: float) -> float:
        """FLOP of one token's attention to ``context`` keys, all layers."""
        return 4.0 * self.query_size * context * self.layers


@dataclass(frozen=True)
class Work:
    """What one process does in a step.

    Attributes:
        texts: B.
        text_length: S, tokens of a text.
        places: P, positions of a text that have thoughts; 0: plain training.
        num_thoughts: K, thoughts of a position.
        thought_length: T, tokens of a thought.
        lookahead: A, true tokens that a thought is scored by.
        trained: Share of the weights that train (less than 1 for LoRA).
        micro_batch: Texts at once; None: all.
        epochs: Updates from the same thoughts.
        reference: Whether other weights score the thoughts too.
        recompute: Whether activations are recomputed (``training.gradient_checkpointing``).
    """

    texts: int
    text_length: int
    places: int
    num_thoughts: int = 1
    thought_length: int = 0
    lookahead: int = 1
    trained: float = 1.0
    micro_batch: int | None = None
    epochs: int = 1
    reference: bool = False
    recompute: bool = False

    @property
    def thoughts(self) -> int:
        """Thoughts of all texts."""
        return self.texts * self.places * self.num_thoughts

    @property
    def passes(self) -> int:
        """Micro-batches of the step."""
        return -(-self.texts // (self.micro_batch or self.texts))


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step's parts, its FLOP, and the share of the GPU's peak that they make."""

    rollout: float
    learning: float
    loss: float
    optimizer: float
    tflop: float
    seconds: float
    mfu: float


def step_cost(shape: Shape, work: Work, gpu: Gpu, chunk_rows: int = 2048) -> StepCost:
    """Count what a step costs.

    Args:
        shape: The model.
        work: Of one process.
        gpu: Where it runs.
        chunk_rows: Rows of the loss whose logits are held at once.
    """
    layer_weights = float(shape.layers * shape.layer_weights)
    text_tokens, thoughts = work.texts * work.text_length, work.thoughts
    half_text = work.text_length / 2

    def longest(flop: float, num_bytes: float, launching: float = 0.0) -> float:
        products = flop / (gpu.tflops * 1e12 * EFFICIENCY)
        return max(products, num_bytes / (gpu.bandwidth * 1e12), launching)

    # Rollout: the text once, then a pass for every token of all thoughts of a micro-batch.
    before = half_text if work.places > 1 else work.text_length
    context = before + work.thought_length / 2
    flop = rollout = 0.0
    if thoughts:
        flop = text_tokens * (2 * layer_weights + shape.attention(half_text))
        rollout = longest(flop, _HALF * layer_weights * work.passes)
        token_flop = thoughts * (2 * shape.weights + shape.attention(context))
        keys = text_tokens + thoughts * work.thought_length / 2
        moved = _HALF * (shape.weights * work.passes + 2 * keys * shape.key_size * shape.layers)
        launches = work.passes * (LAUNCHES_OF_LAYER * shape.layers + LAUNCHES_OF_TOKEN)
        rollout += work.thought_length * longest(token_flop, moved, launches * LAUNCH)
        flop += work.thought_length * token_flop

    # Learning: forward, gradients of activations, and those of the weights that train.
    block = work.thought_length + work.lookahead + MARKERS - 1
    tokens = text_tokens + thoughts * block
    groups = max(work.passes, -(-tokens // GROUP_TOKENS))
    again = 1 if work.recompute else 0
    times = work.epochs * (2 + work.trained + again) + work.reference
    attended = shape.attention(half_text) * text_tokens
    attended += shape.attention(context) * thoughts * block
    learn_flop = times * 2 * layer_weights * tokens
    learn_flop += (work.epochs * (3 + again) + work.reference) * attended
    launches = work.epochs * groups * LEARN_LAUNCHES * shape.layers
    learning = longest(learn_flop, times * _HALF * layer_weights * groups, launches * LAUNCH)

    rows = text_tokens + thoughts * (work.thought_length + work.lookahead)
    times = work.epochs * (2 + work.trained) + work.reference
    loss_flop = times * 2.0 * shape.head_weights * rows
    chunks = -(-rows // chunk_rows)
    loss = longest(loss_flop, work.epochs * chunks * HEAD_PASSES * _HALF * shape.head_weights)

    trained = work.trained * shape.weights
    optimizer = work.epochs * longest(0.0, ADAMW_BYTES * trained)
    total, seconds = flop + learn_flop + loss_flop, rollout + learning + loss + optimizer
    mfu = total / seconds / (gpu.tflops * 1e12)
    return StepCost(rollout, learning, loss, optimizer, total / 1e12, seconds, mfu)
