"""Ways to tune the base model: which of its weights train, and what trains beside frozen ones."""

from __future__ import annotations

import json
import warnings
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.attention.passes import VIRTUAL_TOKENS
from quietstar.backbone.loading import load_tensors
from quietstar.backbone.run import decoder_layers, embedding_weight, find_attention
from quietstar.config import TuningConfig
from quietstar.errors import UserError

WHOLE = ("full", "galore")
"""Methods that train, and save, all weights."""

PEFT_METHODS = ("lora", "rslora", "dora", "qlora", "ia3")
_KEYS_AND_VALUES = ("k_proj", "v_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv")
_MLP_OUTPUT = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "mlp.c_proj", "output.dense")
_MLP_NAMES = ("mlp", "feed_forward", "fc2", "ffn", "block_sparse_moe")


def apply_tuning(model: PreTrainedModel, tuning: TuningConfig) -> nn.Module:
    """The model as it trains: itself with what the method adds, or a PEFT model around it.

    Raises:
        UserError: A name in the settings fits nothing in the model.
    """
    if tuning.method in WHOLE:
        return model
    model.requires_grad_(False)
    tuned: nn.Module = model
    if tuning.method in PEFT_METHODS:
        tuned = _add_peft(model, tuning)
    elif tuning.method in ("houlsby", "mlp_adapter"):
        _add_bottlenecks(model, tuning)
    else:
        _add_virtual_tokens(model, tuning)
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


def _add_peft(model: PreTrainedModel, tuning: TuningConfig) -> nn.Module:
    """The PEFT model of the method around ``model``."""
    peft: Any = import_module("peft")  # which takes seconds
    wanted = tuning.lora_target_modules
    kinds = ("Conv1D", "Linear4bit")  # beside which adapters can sit too
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ in kinds
    ]
    if tuning.method == "ia3":  # keys, values and the MLP's inner activations (Liu et al. 2022)
        ends = [e for e in _MLP_OUTPUT if any(f".{name}".endswith(f".{e}") for name in linear)]
        pairs = [e for e in _KEYS_AND_VALUES if any(f".{n}".endswith(f".{e}") for n in linear)]
        targets = wanted or [*pairs, *ends]
        config = peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=targets,
            feedforward_modules=[name for name in ends if name in targets],
        )
    else:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=tuning.lora_r,
            lora_alpha=tuning.lora_alpha,
            lora_dropout=0.0,
            target_modules=wanted or "all-linear",
            use_rslora=tuning.method == "rslora",
            use_dora=tuning.method == "dora",
        )
    try:
        return peft.get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as problem:
        names = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UserError(
            f"tuning.lora_target_modules: {wanted} fits no layer of {type(model).__name__}; its "
            f"linear layers are {', '.join(names)}"
        ) from problem


_ADAPTER_WORDS = (
    "base_model_name_or_path", "revision", "task_type", "peft_type", "peft_version", "bias",
    "target_modules", "feedforward_modules", "megatron_core",
)  # fmt: skip
"""Settings of adapters that are no numbers, as `_add_peft` leaves them."""


def load_adapters(
    model: PreTrainedModel,
    folder: Path,
    method: str,
    tuning: TuningConfig | None,
    trainable: bool,
) -> nn.Module:
    """Load the adapters that lie in the folder of a saved model, around its base.

    Args:
        model: Base model, without adapters.
        folder: Folder with adapter_config.json and adapter_model.safetensors.
        method: Method of tuning, one of `PEFT_METHODS`.
        tuning: Settings that the adapters were made with; None if they are not known.
        trainable: Whether the adapters can be trained further.

    Raises:
        UserError: Files that are missing, damaged or not ours, or that do not fit the base.
    """
    peft: Any = import_module("peft")
    path = folder / "adapter_config.json"
    weights = load_tensors(folder / "adapter_model.safetensors")
    if not path.is_file():
        raise UserError(f"{path}: is missing, or no regular file. Save the model again.")
    fields = json.loads(path.read_text(encoding="utf-8"))
    rules: dict[str, Any] = {"peft_type": "IA3" if method == "ia3" else "LORA"}
    if tuning is not None and method != "ia3":
        rules |= {
            "r": tuning.lora_r,
            "lora_alpha": tuning.lora_alpha,
            "lora_dropout": 0.0,
            "use_dora": method == "dora",
            "use_rslora": method == "rslora",
        }
    for name, wanted in rules.items():
        if fields.get(name, False) != wanted:
            raise UserError(
                f"{path}: {name} ({fields.get(name)}): must be {wanted}, by the tuning in "
                "quietstar.json. Restore the folder."
            )
    if not isinstance(fields.get("target_modules"), list):
        raise ValueError("adapter_config.json: target_modules is no list")
    for name, value in fields.items():
        # Some are names of modules to import, others are regular expressions that never end.
        if isinstance(value, str | list | dict) and value and name not in _ADAPTER_WORDS:
            raise UserError(
                f"{path}: {name} ({value}): must be left out: quietstar makes no such adapters. "
                "Restore the folder."
            )
    waits = any(p.is_meta for p in model.parameters())  # layers that a device map keeps elsewhere
    if waits and method == "dora":
        raise UserError(
            "device_map: DoRA reads the weights of the layers that wait elsewhere. Merge the "
            "adapters (quietstar export), and load what this writes."
        )
    placed = vars(model).pop("hf_device_map", None)  # PEFT would place what waits elsewhere again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that are missing, which is an error below
        tuned = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    if placed is not None:
        vars(model)["hf_device_map"] = placed
    if waits:  # PEFT put their adapters where the weights are: nowhere
        device = embedding_weight(model).device
        names = {name: name.replace(".default", "") for name in tuned.state_dict()}
        here = {n: weights[saved].to(device) for n, saved in names.items() if saved in weights}
        tuned.load_state_dict(here, strict=False, assign=True)
    expected = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    # PEFT saves an embedding or output layer that has adapters itself too.
    known = peft.get_peft_model_state_dict(tuned, save_embedding_layers=True)
    for rule, names in (
        ("lacks {} tensors, which would be random numbers,", expected.keys() - weights.keys()),
        ("{} of its tensors are no part of the model,", weights.keys() - known.keys()),
    ):
        if names:
            raise UserError(
                f"{folder / 'adapter_model.safetensors'}: {rule.format(len(names))} such as "
                f"{min(names)}. Restore the folder."
            )
    return tuned


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


def _add_bottlenecks(model: PreTrainedModel, tuning: TuningConfig) -> None:
    """Put adapters after the MLP of every layer, and after its attention with ``houlsby``.

    They are children of the sub-layers named ``adapter``, in float32.
    """
    width, device = model.config.get_text_config().hidden_size, embedding_weight(model).device
    for layer in decoder_layers(model):
        children = dict(layer.named_children())
        parts = [next((children[name] for name in _MLP_NAMES if name in children), None)]
        if tuning.method == "houlsby":
            parts.append(find_attention(layer))
        for part in parts:
            if part is None:
                raise UserError(
                    f"tuning.method: {tuning.method} finds no MLP or attention in a layer of "
                    f"{type(model).__name__} (it has {', '.join(children)}); set "
                    "tuning.method: lora"
                )
            part.add_module(
                "adapter", Bottleneck(width, tuning.method_options.adapter_size).to(device)
            )
            part.register_forward_hook(_apply_adapter)


def _apply_adapter(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: the adapter on the sub-layer's hidden states."""
    adapter = module.adapter
    assert isinstance(adapter, Bottleneck)
    if isinstance(output, tuple):  # attention returns its weights too
        return (adapter(output[0]), *output[1:])
    return adapter(output)


def _add_virtual_tokens(model: PreTrainedModel, tuning: TuningConfig) -> None:
    """Give the model learned virtual tokens, as its child ``virtual_tokens``.

    With ``prompt`` their embeddings (n, embedding) train; with ``prefix`` their keys and values
    (Hkv, n, head size) in every layer, as children of the attention, or an MLP that makes them.
    """
    options, weight = tuning.method_options, embedding_weight(model)
    count = options.num_virtual_tokens
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(weight.shape[0], (count,), generator=generator)
    start = weight.detach()[chosen.to(weight.device)]  # as Lester et al.: of real tokens
    virtual = nn.Module()
    model.add_module(VIRTUAL_TOKENS, virtual)
    if tuning.method == "prompt":
        virtual.register_parameter("embeddings", nn.Parameter(start.float()))
        return
    # Nothing reads what comes of these.
    virtual.register_buffer("embeddings", torch.zeros_like(start), persistent=False)
    config = model.config.get_text_config()
    if getattr(config, "qk_rope_head_dim", None):
        raise UserError(
            f"tuning.method: prefix does not fit {type(model).__name__}, whose keys and values are "
            "made from a latent; set tuning.method: prompt or lora"
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    encoder, width = None, options.encoder_hidden_size
    if width is not None:
        encoder = PrefixEncoder(count, start.shape[1], width).to(weight.device)
        virtual.add_module("encoder", encoder)
    for layer in decoder_layers(model):
        attention = find_attention(layer)
        assert attention is not None, "all layers attend"
        size = getattr(attention, "head_dim", None)
        shape = (heads, count, size or config.hidden_size // config.num_attention_heads)
        prefix = LearnedPrefix(shape) if encoder is None else EncodedPrefix(shape, encoder)
        attention.add_module(VIRTUAL_TOKENS, prefix.to(weight.device))


_PREFIX_STD = 0.02
"""Standard deviation of the keys and values that a prefix begins with."""


class LearnedPrefix(nn.Module):
    """Learned keys and values of the virtual tokens in one layer.

    Args:
        shape: (Hkv, n, head size).
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(shape) * _PREFIX_STD)
        self.values = nn.Parameter(torch.randn(shape) * _PREFIX_STD)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (Hkv, n, head size) each."""
        return self.keys, self.values


class PrefixEncoder(nn.Module):
    """What the layers share of the MLP that makes a prefix (Li & Liang 2021, section 4.3).

    Its output layer lies in pieces in the layers of the model (`EncodedPrefix`).

    Args:
        count: Number of virtual tokens, n.
        embedding: Width of their embeddings.
        width: Width of the MLP, w.
    """

    def __init__(self, count: int, embedding: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(count, embedding))
        self.hidden = nn.Linear(embedding, width)

    def forward(self) -> Float[Tensor, "virtual width"]:
        """Hidden states of the virtual tokens, (n, w)."""
        return torch.tanh(self.hidden(self.embeddings))


class EncodedPrefix(nn.Module):
    """Keys and values of the virtual tokens in one layer, made by an MLP.

    Args:
        shape: (Hkv, n, head size).
        encoder: What the layers share; it is no child of this one.
    """

    def __init__(self, shape: tuple[int, int, int], encoder: PrefixEncoder) -> None:
        super().__init__()
        self.shape, self._encoder = shape, (encoder,)
        width = encoder.hidden.out_features
        self.output = nn.Linear(width, 2 * shape[0] * shape[2])
        # The hidden states' root mean square is about one half at the start.
        nn.init.normal_(self.output.weight, std=2 * _PREFIX_STD / width**0.5)
        nn.init.zeros_(self.output.bias)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (Hkv, n, head size) each."""
        return self.split(self.output(self._encoder[0]()))

    def split(self, made: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values from the output of the MLP, (n, 2 * Hkv * head size)."""
        heads, count, size = self.shape
        keys, values = made.view(count, 2, heads, size).permute(1, 2, 0, 3)
        return keys.contiguous(), values.contiguous()


def fold_prefix(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the keys and values of a prefix in the place of the MLP that makes them.

    Args:
        model: Model with an `EncodedPrefix` in every layer; its own weights may be sharded.
        tensors: Whole weights by their names in the model.
    """
    modules = dict(model.named_modules())
    encoder = next(name for name, m in modules.items() if isinstance(m, PrefixEncoder))
    made = {name: x for name, x in tensors.items() if f"{VIRTUAL_TOKENS}." not in name}
    embeddings, *hidden = (
        tensors[f"{encoder}.{part}"] for part in ("embeddings", "hidden.weight", "hidden.bias")
    )
    states = torch.tanh(nn.functional.linear(embeddings, *hidden))
    for name, module in modules.items():
        if isinstance(module, EncodedPrefix):
            output = (tensors[f"{name}.output.{part}"] for part in ("weight", "bias"))
            both = module.split(nn.functional.linear(states, *output))
            made[f"{name}.keys"], made[f"{name}.values"] = both
    return made
