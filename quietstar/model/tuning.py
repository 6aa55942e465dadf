"""Ways to tune the base model: which of its weights train, and what trains beside frozen ones."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.attention.passes import VIRTUAL_TOKENS
from quietstar.config import TuningConfig
from quietstar.errors import UserError

WHOLE = ("full", "galore")
"""Methods that train, and save, all weights."""

__all__ = ["PEFT_METHODS", "WHOLE", "apply_tuning", "beside_peft"]


def apply_tuning(model: PreTrainedModel, tuning: TuningConfig) -> nn.Module:
    """The model as it trains: itself with what the method adds, or a PEFT model around it.

    Raises:
        UserError: A name in the settings fits nothing in the model.
    """
    if tuning.method in WHOLE:
        return model
    model.requires_grad_(False)
    if tuning.method in PEFT_METHODS:
        tuned: nn.Module = add_peft(model, tuning)
    else:
        tuned = model
        if tuning.method in ("houlsby", "mlp_adapter"):
            add_bottlenecks(model, tuning)
        else:
            add_virtual_tokens(model, tuning)
    unfreeze(tuned, tuning.unfreeze)
    return tuned


def unfreeze(model: nn.Module, patterns: list[str]) -> None:
    """Let parameters train whose name ends in one of the patterns (``*`` stands for anything).

    Raises:
        UserError: A pattern fits no parameter.
    """
    for pattern in patterns:
        fitting = [p for n, p in model.named_parameters() if fnmatchcase(n, f"*{pattern}")]
        if not fitting:
            example = next(name for name, _ in model.named_parameters())
            example = example.removeprefix("base_model.model.")  # PEFT's own
            raise UserError(
                f"tuning.unfreeze: {pattern!r} fits no parameter; names are like {example!r}. "
                "Write for instance [layers.0.*] or [embed_tokens.weight]."
            )
        for parameter in fitting:
            parameter.requires_grad_(True)


def beside_peft(name: str) -> bool:
    """Whether a trained parameter of the language model is one that PEFT does not save."""
    return not any(mark in name for mark in ("lora_", "ia3_"))


PEFT_METHODS = ("lora", "rslora", "dora", "qlora", "ia3")

_KEYS_AND_VALUES = ("k_proj", "v_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv")
_MLP_OUTPUT = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "mlp.c_proj", "output.dense")


def require_peft() -> Any:
    """Import PEFT, which is an extra.

    Raises:
        UserError: It is not installed.
    """
    try:
        import peft
    except ImportError as problem:
        raise UserError(
            f"tuning.method: adapters need PEFT ({problem}): pip install 'quietstar[peft]', or set "
            "another method"
        ) from problem
    return peft


def add_peft(model: PreTrainedModel, tuning: TuningConfig) -> nn.Module:
    """The PEFT model of the method around ``model``.

    Raises:
        UserError: The targets fit no layer.
    """
    config = _ia3(model, tuning) if tuning.method == "ia3" else _lora(tuning)
    try:
        return require_peft().get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as problem:
        raise UserError(
            f"tuning.lora_target_modules: {tuning.lora_target_modules} fits no layer of "
            f"{type(model).__name__}; its linear layers are {', '.join(linear_names(model))}"
        ) from problem


def _lora(tuning: TuningConfig) -> Any:
    return require_peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.lora_r,
        lora_alpha=tuning.lora_alpha,  # pyright: ignore[reportArgumentType]  (floats work)
        lora_dropout=0.0,
        target_modules=tuning.lora_target_modules or "all-linear",
        use_rslora=tuning.method == "rslora",
        use_dora=tuning.method == "dora",
    )


def _ia3(model: PreTrainedModel, tuning: TuningConfig) -> Any:
    """Scales of keys, values and the MLP's inner activations (Liu et al. 2022)."""
    names = [name for name, module in model.named_modules() if is_linear(module)]
    inner = _ending(names, _MLP_OUTPUT)
    targets = tuning.lora_target_modules or [*_ending(names, _KEYS_AND_VALUES), *inner]
    return require_peft().IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=[name for name in inner if name in targets],
    )


def _ending(names: list[str], endings: tuple[str, ...]) -> list[str]:
    """Of the endings those that some module has."""
    return [end for end in endings if any(n == end or n.endswith(f".{end}") for n in names)]


def is_linear(module: nn.Module) -> bool:
    """Whether adapters can sit beside this layer."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit")


def linear_names(model: nn.Module) -> list[str]:
    """Last names of all linear layers."""
    return sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if is_linear(m)})


def keep_gradients_of_4bit(model: nn.Module) -> None:
    """Keep 4-bit layers trainable after a forward pass in eval mode, as a rollout may be.

    On a CPU bitsandbytes repacks them for inference there, and from then on no gradient flows.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # pyright: ignore


def quantization(tuning: TuningConfig):
    """How to load the frozen weights: None, or 4-bit NormalFloat for ``qlora``.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if tuning.method != "qlora":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as problem:
        raise UserError(
            "tuning.method: qlora needs bitsandbytes: pip install 'quietstar[qlora]', or set "
            "tuning.method: lora"
        ) from problem
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


_MLP_NAMES = ("mlp", "feed_forward", "fc2", "ffn", "block_sparse_moe")


class Bottleneck(nn.Module):
    """The adapter of one sub-layer; adds nothing at the start.

    Args:
        width: Width of the model.
        size: Width of the bottleneck.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.normal_(self.down.weight, std=1e-2)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        inner = x.to(self.down.weight.dtype)
        return x + self.up(torch.relu(self.down(inner))).to(x.dtype)


def add_bottlenecks(model: PreTrainedModel, tuning: TuningConfig) -> None:
    """Put adapters behind the MLP of every layer, and behind its attention with ``houlsby``.

    They are children of the sub-layers named ``adapter``, in float32.

    Raises:
        UserError: The layers are built in another way.
    """
    width = model.config.get_text_config().hidden_size
    for layer in decoder_layers(model):
        parts = [_mlp(layer)]
        if tuning.method == "houlsby":
            parts.append(_attention(layer))
        if None in parts:
            raise UserError(
                f"tuning.method: {tuning.method} finds no MLP or attention in a layer of "
                f"{type(model).__name__} (it has {', '.join(n for n, _ in layer.named_children())}"
                "); set tuning.method: lora"
            )
        for part in parts:
            assert part is not None
            device = next(part.parameters()).device
            part.add_module("adapter", Bottleneck(width, tuning.adapter_size).to(device))
            part.register_forward_hook(_apply)


def _apply(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: the adapter on the sub-layer's hidden states."""
    adapter = module.adapter
    assert isinstance(adapter, Bottleneck)
    if isinstance(output, tuple):  # attention returns its weights too
        return (adapter(output[0]), *output[1:])
    return adapter(output)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers.

    Raises:
        UserError: There is no list as long as the config says.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    lists = [m for m in lists if _attention(m[0]) is not None]
    if not lists:
        raise UserError(
            f"the decoder layers of {type(model).__name__} are not to be found; set "
            "tuning.method: lora or full"
        )
    return lists[0]


def _attention(layer: nn.Module) -> nn.Module | None:
    parts = (m for _, m in layer.named_children() if "attention" in type(m).__name__.lower())
    return next(parts, None)


def _mlp(layer: nn.Module) -> nn.Module | None:
    children = dict(layer.named_children())
    return next((children[name] for name in _MLP_NAMES if name in children), None)


class VirtualTokens(nn.Module):
    """Input embeddings of the virtual tokens.

    Args:
        embeddings: (n, embedding), where they start.
        learned: Whether they train; with ``prefix`` nothing reads what comes of them.
    """

    embeddings: Tensor

    def __init__(self, embeddings: Tensor, learned: bool) -> None:
        super().__init__()
        if learned:
            self.embeddings = nn.Parameter(embeddings.float())
        else:
            self.register_buffer("embeddings", torch.zeros_like(embeddings), persistent=False)


class VirtualKeyValues(nn.Module):
    """Keys and values of the virtual tokens in one layer, (Hkv, n, head size) each.

    Args:
        shape: Shape of the keys.
        device: Device of the layer.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(shape, device=device) * 0.02)
        self.values = nn.Parameter(torch.randn(shape, device=device) * 0.02)


def add_virtual_tokens(model: PreTrainedModel, tuning: TuningConfig) -> None:
    """Give the model learned virtual tokens, as its child ``virtual_tokens``.

    Raises:
        UserError: With ``prefix``, keys and values whose sizes the config does not tell.
    """
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor), type(model).__name__
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(weight.shape[0], (tuning.num_virtual_tokens,), generator=generator)
    start = weight.detach()[chosen.to(weight.device)]  # as Lester et al.: of real tokens
    learned = tuning.method == "prompt"
    model.add_module(VIRTUAL_TOKENS, VirtualTokens(start, learned))
    if not learned:
        for layer in decoder_layers(model):
            _add_key_values(model, layer, tuning.num_virtual_tokens)


def _add_key_values(model: PreTrainedModel, layer: nn.Module, count: int) -> None:
    config = model.config.get_text_config()
    attention = next(
        m for _, m in layer.named_children() if "attention" in type(m).__name__.lower()
    )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "qk_rope_head_dim", None):
        raise UserError(
            f"tuning.method: prefix does not fit {type(model).__name__}, whose keys and values are "
            "made from a latent; set tuning.method: prompt or lora"
        )
    device = next(attention.parameters()).device
    attention.add_module(VIRTUAL_TOKENS, VirtualKeyValues((heads, count, size), device))
