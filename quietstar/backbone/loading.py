"""From names to models: base weights, adapters, and the vectors that open and close a thought."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from quietstar.backbone.devices import free_memory
from quietstar.backbone.run import decoder_layers, embedding_weight
from quietstar.config.schema import THINKING_TYPE
from quietstar.errors import UserError, reading, reason_of
from quietstar.registry import NEVER_TRUSTED, TRUST_REMEDY
from quietstar.system.inputs import check_folder

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""Name of a model or a data set on the hub."""
LANGUAGE_MODEL_FOLDER = "language_model"
"""Where the language model lies in the folder of one that thinks."""


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``owner/name@revision`` of the hub; a folder's name stays whole."""
    hub_id, _, revision = name.rpartition("@")
    is_id = HUB_ID.fullmatch(hub_id) or re.fullmatch(r"[\w.-]+", hub_id)  # gpt2 has no owner
    return (hub_id, revision) if is_id and revision and not Path(name).exists() else (name, None)


_REMEDY = "Give a folder with config.json and safetensors weights, or a hub id you can reach."
_CODE_OR_WEIGHTS = (
    "auto_map", "quantization_config", "attn_implementation", "experts_implementation",
    "fusion_config", "transformers_weights", "configuration_files", "name_or_path",
)  # fmt: skip
"""Fields of a config.json that name code, kernels or files; a model with random weights has none of
them."""
_SIZES = {
    "num_hidden_layers": (1, 1000),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "head_dim": (1, 2**12),
    "vocab_size": (1, 2**22),
    "max_position_embeddings": (1, 2**24),
    "num_experts": (0, 2**12),
    "num_local_experts": (0, 2**12),
    "n_routed_experts": (0, 2**12),
}
"""Least and largest sizes. The upper bounds are several times those of the largest models."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
           "BF16": torch.bfloat16}  # fmt: skip
"""Types of weights by their names in safetensors files."""


def load_base(
    name_or_path: str | None,
    config: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype | str = torch.float32,
    vocab_size: int | None = None,
    seed: int = 0,
    quantization: Any = None,
    is_exact: bool = False,
    trust_remote_code: bool | None = False,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    **hub: Any,
) -> PreTrainedModel:
    """Load a causal LM with dropout off, or build one with random weights.

    Args:
        name_or_path: Hub id or folder, also of a saved model that thinks, of which the language
            model is taken; None builds the model of ``config``.
        config: ``model_type`` and fields of its transformers config.
        dtype: Of the weights; "stored" keeps the dtype of the files, whose weights are then mapped
            into memory, not copied, and not looked at: whoever reads them checks them
            (`require_finite`).
        vocab_size: Of the built model where ``config`` names none.
        seed: Seed of the random weights.
        quantization: How transformers shall quantize the weights, None for not at all.
        is_exact: Whether tensors that are no part of the model are an error, not a warning.
        trust_remote_code: Whether code that comes with the model may run; None: it never may.
        device_map: Where the weights go, as in transformers; None for memory; "auto" fills one
            device, and leaves the other layers in memory or on disk until it needs them.
        max_memory: With "auto", bytes that weights may take on the device ("cuda:0", 0), in memory
            ("cpu"); None for most of what is free.
        **hub: ``revision``.

    Raises:
        UserError: No such model, no causal LM, a config that cannot be built, weights that are
            missing, do not fit or are not finite.
    """
    key = "model.config" if name_or_path is None else f"model.name_or_path ({name_or_path})"
    with reading(key, _REMEDY):
        if name_or_path is None:
            settings = build_config(dict(config or {}), vocab_size)
            dropped = drop_dropout(settings)
            _check_memory(settings, dtype)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(
                    settings, dtype=dtype, trust_remote_code=False
                )
        else:
            name_or_path = within(name_or_path)
            settings = read_config(name_or_path, trust_remote_code=trust_remote_code, **hub)
            dropped = drop_dropout(settings)
            stored = getattr(settings, "quantization_config", None)
            stored = stored if isinstance(stored, dict) else {}
            if any("load_in_" in name for name in stored) or "bitsandbytes" in stored.values():
                raise UserError(
                    f"{key}: its weights are quantized by bitsandbytes, which loses what training "
                    "needs. Give the original weights; tuning.method: qlora quantizes them."
                )
            if Path(name_or_path).is_dir():
                _check_files(Path(name_or_path), settings, key)
                if Path(name_or_path, GENERATION_CONFIG_NAME).exists():
                    # A damaged one would count as missing.
                    GenerationConfig.from_pretrained(name_or_path)
            if quantization is not None:
                hub["quantization_config"] = quantization
            if device_map == "auto":
                device_map = fill_device(settings, dtype, max_memory)
            if device_map is not None:
                hub["device_map"] = device_map
            if is_stored := dtype == "stored":
                settings.dtype, dtype = None, "auto"  # else transformers would believe the config
            with quiet_transformers():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    name_or_path, config=settings, dtype=dtype, weights_only=True,
                    output_loading_info=True, ignore_mismatched_sizes=True,
                    trust_remote_code=bool(trust_remote_code), **hub,
                )  # fmt: skip
                model, report = loaded
                _check_report(report, key, is_exact)
                _check_generation(model, key)
            if not is_stored:
                here = [(n, p) for n, p in model.named_parameters() if p.device.type != "meta"]
                require_finite(here, key)
    _say_dropped(dropped)
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from reporting which tensors files have or lack, which errors say here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def within(name_or_path: str) -> str:
    """Return the folder of the language model in that of a model that thinks; else the name."""
    folder = Path(name_or_path).expanduser()
    check_folder(folder)
    with suppress(OSError, ValueError):  # which are refused where the folder is read
        fields = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if isinstance(fields, dict) and fields.get("model_type") == THINKING_TYPE:
            return str(folder / LANGUAGE_MODEL_FOLDER)
    return name_or_path


def read_config(
    name_or_path: str, *, trust_remote_code: bool | None = False, **hub: Any
) -> PreTrainedConfig:
    """Read the config of a model, and refuse one that names code or sizes that cannot be.

    Raises:
        UserError: It is damaged, wants code of its own to run, or is an adapter's.
    """
    key = f"model.name_or_path ({name_or_path})"
    with reading(key, _REMEDY):
        if not name_or_path:
            raise UserError(f"{key}: names no model. {_REMEDY}")
        name_or_path = within(name_or_path)
        fields, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
        is_known = fields.get("model_type") in CONFIG_MAPPING
        if "auto_map" in fields and not is_known and not trust_remote_code:
            raise UserError(
                f"{key}: needs Python code of its own (auto_map in config.json), which is not run. "
                f"{NEVER_TRUSTED if trust_remote_code is None else TRUST_REMEDY}"
            )
        # transformers would load an adapter's base, and whatever file the adapter names.
        if find_adapter_config_file(name_or_path, **hub) is not None:
            raise UserError(
                f"{key}: holds a PEFT adapter (adapter_config.json), no whole model. Give its base,"
                " or merge it into its base first."
            )
        settings = AutoConfig.from_pretrained(
            name_or_path, trust_remote_code=bool(trust_remote_code), **hub
        )
        check_sizes(settings)
    # A config may ask for kernels from the hub, which are programs.
    settings._attn_implementation = settings._experts_implementation = None
    return settings


def build_config(fields: dict[str, Any], vocab_size: int | None) -> PreTrainedConfig:
    """The transformers config of ``model_type`` and its fields.

    Raises:
        UserError: No model_type or one unknown to transformers, a field that the config of this
            type lacks, or a size that cannot be.
    """
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        near = get_close_matches(str(model_type), CONFIG_MAPPING.keys(), 1)
        hint = f" Did you mean {near[0]}?" if near else " Write for instance model_type: llama."
        raise UserError(
            f"model.config: model_type ({model_type}): must be one that transformers knows.{hint}"
        )
    if vocab_size is not None:
        fields.setdefault("vocab_size", vocab_size)
    what = f"model.config (model_type: {model_type})"
    with reading(what, "Correct its fields."), quiet_transformers():
        settings = AutoConfig.for_model(model_type, **fields)
        _check_fields(fields, settings, "model.config")
        check_sizes(settings)
    return settings


def _check_fields(fields: dict[str, Any], settings: PreTrainedConfig, key: str) -> None:
    """Refuse fields that the class of ``settings``, which was built from them, does not know.

    Fields that it does not know become attributes that only this object has.
    """
    default = type(settings)()
    known = {*vars(default), *settings.attribute_map, *type(settings).__dataclass_fields__}
    for name, value in fields.items():
        if name in _CODE_OR_WEIGHTS or name.startswith("_"):
            raise UserError(
                f"{key}: {name}: must be left out: the weights are new, and no code or file of a "
                "model is read. Remove it."
            )
        if name in vars(settings) and name not in known and not hasattr(default, name):
            near = get_close_matches(name, sorted(known), 1, 0.7)
            hint = f" Did you mean {near[0]}?" if near else " Remove it."
            raise UserError(
                f"{key}: {name} ({value}): is no field of {type(settings).__name__}.{hint}"
            )
        inner = getattr(settings, name, None)
        if isinstance(value, dict) and isinstance(inner, PreTrainedConfig):
            _check_fields(value, inner, f"{key}: {name}")


def check_sizes(settings: PreTrainedConfig) -> None:
    """Refuse sizes with which no model can be, before anything is allocated for them.

    Raises:
        ValueError: A size that is not positive, absurd, or does not fit another one; a number that
            is not finite.
    """
    text = settings.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, but must be finite")
    for name, (least, most) in _SIZES.items():
        value = getattr(text, name, None)
        if isinstance(value, bool) or (isinstance(value, int) and not least <= value <= most):
            raise ValueError(
                f"{name} is {value}, but must be from {least} to {most}: beyond lies no model that "
                "a machine could hold"
            )
    width, heads, kv_heads, head_dim = (
        getattr(text, name, None)
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if not isinstance(heads, int):  # some architectures have several kinds of layers
        return
    if isinstance(kv_heads, int) and heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads is {kv_heads}, but must divide num_attention_heads ({heads})"
        )
    if not isinstance(head_dim, int) and isinstance(width, int) and width % heads:
        raise ValueError(f"hidden_size is {width}, but must be a multiple of the {heads} heads")


def _meta_model(settings: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)


def fill_device(
    settings: PreTrainedConfig,
    dtype: torch.dtype | str,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> dict[str, int | str]:
    """Map a model onto one device: all but its layers, and as many of these as fit.

    The other layers go to memory, and what that cannot hold to disk. (transformers' own map may
    move embeddings or output layer away, which thoughts read themselves.)

    Args:
        settings: Config of the model.
        dtype: Of its weights; "auto" and "stored" for that of the config.
        max_memory: Bytes for weights on the device and in memory ("cpu"), as numbers or as in
            "10GiB"; None for most of what is free.
    """
    free = {
        place: size if isinstance(size, int) else convert_file_size_to_int(size)
        for place, size in (max_memory or free_memory()).items()
    }
    device = next((place for place in free if place != "cpu"), "cpu")
    stored = dtype if isinstance(dtype, torch.dtype) else settings.dtype or torch.float32
    size_of_one = (getattr(torch, stored) if isinstance(stored, str) else stored).itemsize
    model = _meta_model(settings)
    layers = decoder_layers(model, remedy="device_map: cpu")
    sizes = [sum(p.numel() for p in layer.parameters()) * size_of_one for layer in layers]
    room = free[device] - (sum(p.numel() for p in model.parameters()) * size_of_one - sum(sizes))
    if sum(sizes) <= room:
        return {"": device}
    root = next(name for name, module in model.named_modules() if module is layers)
    places = {}
    tensors = (model.named_parameters, model.named_buffers)
    for name in (name for named in tensors for name, _ in named(remove_duplicate=False)):
        module = name.rpartition(".")[0]
        if not name.startswith(f"{root}."):
            places[name if f"{root}.".startswith(f"{module}.") else module] = device
    room -= max(sizes)  # for the layer that computes, if it waits elsewhere
    memory = 0 if device == "cpu" else free.get("cpu", 0)
    for index, size in enumerate(sizes):
        if size <= room:
            place, room = device, room - size
        elif size <= memory:
            place, memory = "cpu", memory - size
        else:
            place = "disk"
        places[f"{root}.{index}"] = place
    return places


def _check_memory(settings: PreTrainedConfig, dtype: torch.dtype | str) -> None:
    """Refuse a model with random weights that this machine's memory cannot hold."""
    count = sum(p.numel() for p in _meta_model(settings).parameters())
    size = count * (dtype.itemsize if isinstance(dtype, torch.dtype) else 4)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise UserError(
            f"model.config: {count:,} parameters take {size / 2**30:,.0f} GiB, and this machine "
            f"has {memory / 2**30:,.0f} GiB of memory. Make the model smaller."
        )


def _check_files(folder: Path, settings: PreTrainedConfig, key: str) -> None:
    """Refuse weights that lie outside their folder, or that are no weights of this config.

    transformers allocates what the config says, also where the files hold something else.
    """
    files = [folder / SAFE_WEIGHTS_NAME] if (folder / SAFE_WEIGHTS_NAME).is_file() else []
    for index in folder.glob("*.index.json"):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(
                    f"{key}: {index.name} names {name!r}, which is no file of its folder. Download "
                    "the model again."
                )
        if index.name == SAFE_WEIGHTS_INDEX_NAME and not files:
            files = sorted(folder / name for name in names)
    is_known = type(settings).__module__.startswith("transformers.")
    if not files or not is_known or getattr(settings, "quantization_config", None) is not None:
        return
    model = _meta_model(settings)
    expected = model.state_dict()
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                kind = tensors.get_slice(name).get_dtype()
                if name in expected and expected[name].is_floating_point() and "F" not in kind:
                    raise UserError(
                        f"{key}: {path.name}: the tensor {name} is of type {kind}, but must hold "
                        "floating-point numbers. Download or save the model again."
                    )
    count, size = sum(p.numel() for p in model.parameters()), sum(f.stat().st_size for f in files)
    if count > size:
        raise UserError(
            f"{key}: config.json describes {count:,} parameters, more than its safetensors files "
            f"can hold ({size:,} bytes). Give the config.json that belongs to them."
        )


def _check_report(report: dict[str, Any], key: str, is_exact: bool) -> None:
    """Refuse a model some of whose weights transformers has filled at random."""
    if mismatched := sorted(report["mismatched_keys"], key=str):
        name, stored, wanted = mismatched[0]
        raise UserError(
            f"{key}: the tensor {name} has shape {tuple(stored)} in the file and {tuple(wanted)} "
            f"by config.json ({len(mismatched)} such). Give the config.json that belongs to it."
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{key}: its files lack {len(missing)} of the model's tensors, such as {missing[0]}. "
            "They would be random numbers. Download or save the model again."
        )
    if unknown := sorted(report["unexpected_keys"]):
        if is_exact:
            raise UserError(
                f"{key}: {len(unknown)} tensors in its files are no part of the model by "
                f"config.json, such as {unknown[0]}. Give the config.json that belongs to it."
            )
        logger.warning(
            "%s: %d tensors in its files are no part of the model and are not used, such as %s",
            key, len(unknown), unknown[0],
        )  # fmt: skip


def _check_generation(model: PreTrainedModel, key: str) -> None:
    """Refuse a generation_config.json with which generation could not begin."""
    vocab_size = embedding_weight(model).shape[0]

    def begin(
        _: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **__: Any
    ) -> Tensor:
        scores = torch.zeros(1, vocab_size, device=input_ids.device)
        if not logits_processor(input_ids, scores).isfinite().any():
            raise ValueError("it suppresses all tokens")
        stopping_criteria(input_ids, None)
        return input_ids

    given: Any = model.generation_config
    try:
        given.validate(strict=True)
    except ValueError as problem:  # for which transformers would refuse to save the trained model
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(given, name) for name in names})
        logger.warning(
            "%s: of generation_config.json only the token ids are kept, as it contradicts itself "
            "(%s)", key, reason_of(problem),
        )  # fmt: skip
    with reading(f"{key}: its generation_config.json", "Correct or remove that file."):
        model.generate(  # pyright: ignore[reportCallIssue]
            torch.zeros(1, 1, dtype=torch.long, device=model.device),
            attention_mask=torch.ones(1, 1, dtype=torch.long, device=model.device),
            custom_generate=begin, max_new_tokens=1, do_sample=False, num_beams=1,
            num_return_sequences=1,
        )  # fmt: skip


def require_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Refuse weights that are NaN or infinite; each tensor is read once, and nothing is allocated.

    Raises:
        UserError: Some are; the message names the tensor.
    """
    for name, tensor in tensors:
        # torch cannot compare 8-bit numbers.
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            continue
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        low, high = tensor.detach().aminmax()  # both NaN if any is
        if not math.isfinite(low) or not math.isfinite(high):
            raise UserError(
                f"{what}: the tensor {name} holds numbers that are not finite (NaN or infinite). "
                "Go back to an earlier checkpoint, or download it again."
            )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of weights, all of them floating-point numbers and finite.

    Raises:
        UserError: It is missing, damaged, or holds something else.
    """
    with reading(str(path), "Save it again, or restore it."):
        if not path.is_file():
            raise UserError(f"{path}: is missing, or no regular file. Save the model again.")
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(f"the tensor {name} is of type {tensor.dtype}")
        require_finite(tensors.items(), str(path))
    return tensors


def drop_dropout(config: PreTrainedConfig) -> list[str]:
    """Set every dropout of a model config to 0; returns the names that were not."""
    names = [name for name, value in vars(config).items() if _is_dropout(name, value)]
    for name in names:
        setattr(config, name, 0.0)
    return names


def drop_dropout_layers(model: PreTrainedModel) -> None:
    """Set every dropout of a model that is already built to 0, and say so."""
    _say_dropped(drop_dropout(model.config))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # OPT and Llama keep plain numbers
            if _is_dropout(name, value):
                setattr(module, name, 0.0)


def _is_dropout(name: str, value: Any) -> bool:
    """Say whether a field is a dropout that is not 0; an absurd one such as 7 is one, too."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "drop" in name and is_number and value != 0


def _say_dropped(names: list[str]) -> None:
    if names:
        logger.warning(
            "dropout is set to 0 (%s): with it the loss would not score the sampled thoughts",
            ", ".join(names),
        )


def stored_dtypes(model: PreTrainedModel) -> set[torch.dtype]:
    """Returns the floating-point dtypes in the safetensors files that a model was loaded from."""
    name = str(model.config.name_or_path)
    revision, folder = vars(model.config).get("_commit_hash"), Path(name)
    if not folder.is_dir():
        folder = Path(str(cached_file(name, "config.json", revision=revision))).parent
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            dtypes |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    return {_FLOATS[name] for name in dtypes if name in _FLOATS}
