"""The keys of the config by dotted name, and which one a misspelt name probably means."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rapidfuzz import fuzz

from quietstar.config.schema import SECTIONS, Config

_TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    list: "list of texts",
    dict: "mapping",
    type(None): "null",
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

SIMILAR = 75  # least similarity, of 100, of a "did you mean": lets through one or two typos


TRAINER_NAMES = {
    "model_name_or_path": "model.name_or_path",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "dataset_text_field": "data.text_field",
    "learning_rate": "optim.learning_rate",
    "lr_scheduler_type": "optim.lr_scheduler_type",
    "max_grad_norm": "optim.max_grad_norm",
    "adam_beta1": "optim.adam_beta1",
    "adam_beta2": "optim.adam_beta2",
    "adam_epsilon": "optim.adam_epsilon",
    "max_steps": "training.max_steps",
    "per_device_train_batch_size": "training.micro_batch_size",
    "bf16": "training.mixed_precision",
    "fp16": "training.mixed_precision",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "torch_compile": "training.torch_compile",
    "eval_steps": "training.eval_steps",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.save_total_limit",
}
"""Keys by the names that the trainers of transformers and TRL give them."""


def _config_fields() -> dict[str, FieldInfo]:
    fields = {}
    for section in SECTIONS:
        kind = Config.model_fields[section].annotation
        assert isinstance(kind, type), section
        assert issubclass(kind, BaseModel), section
        for name, field in kind.model_fields.items():
            fields[f"{section}.{name}"] = field
    return fields


FIELDS: Mapping[str, FieldInfo] = _config_fields()
"""Every key of the config, such as ``thoughts.length``, with its field."""


def keys_of(section: str) -> list[str]:
    """The keys of a section, with its name before them."""
    return [key for key in FIELDS if key.startswith(f"{section}.")]


def field_types(key: str) -> set[Any]:
    """The types that a key takes: ``int | None`` gives int and NoneType, ``list[str]`` list."""
    return {get_origin(member) or member for member in _members(key)}


def choices(key: str) -> list[str]:
    """The words that a key takes, if it takes certain ones."""
    literals = [member for member in _members(key) if get_origin(member) is Literal]
    return [str(choice) for literal in literals for choice in get_args(literal)]


def type_text(key: str) -> str:
    """Type and bounds of a key in words: ``integer >= 1 or null``."""
    types = field_types(key)
    words = choices(key)
    null = ["null"] if type(None) in types else []
    if types <= {Literal, type(None)}:
        return " | ".join([*words, *null])
    limits = [
        f"{sign} {limit:g}"
        for rule in (*FIELDS[key].metadata, *_rules_in_union(key))
        for name, sign in _BOUNDS.items()
        if (limit := getattr(rule, name, None)) is not None
    ]
    name = next(_TYPE_NAMES[kind] for kind in _TYPE_NAMES if kind in types)
    bounded = " ".join([name, " and ".join(limits)]).rstrip()
    return " or ".join([bounded, *words, *null])


def _members(key: str) -> list[Any]:
    annotation = FIELDS[key].annotation
    members = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    return [get_args(m)[0] if get_origin(m) is Annotated else m for m in members]


def _rules_in_union(key: str) -> list[Any]:
    found = [m for m in get_args(FIELDS[key].annotation) if get_origin(m) is Annotated]
    return [rule for member in found for info in get_args(member)[1:] for rule in info.metadata]


def closest(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate that was probably meant: by another trainer's name, or a similar one."""
    elsewhere = TRAINER_NAMES.get(name.rpartition(".")[2])
    if elsewhere in candidates:
        return elsewhere

    def similarity(candidate: str) -> float:
        # `--lenght` and `training.lr` name a key without its section, or with another one
        leaf = fuzz.ratio(name.rpartition(".")[2], candidate.rpartition(".")[2])
        return max(fuzz.ratio(name, candidate), leaf)

    best = max(candidates, key=similarity, default=None)
    return best if best is not None and similarity(best) >= SIMILAR else None


def did_you_mean(meant: str | None) -> str:
    """The end of an error message; empty without a candidate."""
    return "" if meant is None else f"; did you mean {meant}?"
