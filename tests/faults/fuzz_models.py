"""Malformed model folders and adapters."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from cases import Case
from material import command
from spoiling import (
    ESCAPES,
    generator,
    odd_json,
    replace_entry,
    spoil_bytes,
    spoil_json,
    spoil_tensors,
)

READERS = ("generate", "chat", "eval", "inspect", "export", "lm-eval", "train", "plan")
MODEL_COMMANDS = tuple(f"{name}/model" for name in READERS)


def with_model(run: str, name: str) -> tuple[list[str], bytes]:
    """Return the command line that reads a model folder, and its input."""
    stdin = b"hello\n" if run == "chat" else b""
    if run in ("train", "plan"):
        more = ["--model.config", "null", "--model.name_or_path", name, "--model.tokenizer", "null"]
        return command(run, *more), stdin
    if run == "lm-eval":
        return command(run, model_args=f"pretrained={name}"), stdin
    return command(run, model=name), stdin


def folder_for(rng: random.Random, run: str) -> str:
    if run == "export":
        return "lora"
    return rng.choice(("full", "full", "lora")) if run not in ("train", "plan") else "plain"


VITAL = ("config.json", "model.safetensors", "quietstar.json", "quietstar.safetensors",
         "adapter_config.json", "adapter_model.safetensors", "tokenizer.json")  # fmt: skip


def place_of(folder: Path, file: str) -> Path:
    """Return where a file lies that decides what the model of a folder is."""
    within = folder / "language_model"
    is_of_model = file in ("config.json", "generation_config.json") or file.startswith("adapter_")
    return within / file if within.is_dir() and is_of_model else folder / file


def is_for_others(path: Path) -> bool:
    """Say whether a file of a model that thinks is there for transformers alone."""
    is_within = path.parent.name == "language_model"
    if path.name.startswith("tokenizer"):
        return is_within
    return path.name == "config.json" and (path.parent / "language_model").is_dir()


@generator(*(f"{name}/model-files" for name in READERS))
def _model_files(rng: random.Random, work: Path, run: str) -> Case:
    """Files of a model folder that are missing, cut or something else."""
    name = folder_for(rng, run)
    files = (p for p in (work / name).rglob("*") if p.is_file() and p.name != "README.md")
    path = rng.choice(sorted(files))
    vital = (
        path.name in VITAL
        and not is_for_others(path)
        and not (run in ("plan", "export") and "tokenizer" in path.name)
    )
    kind = rng.random()
    refuse: bool | None = None
    if kind < 0.3:
        what = replace_entry(rng, path)
        refuse = True if vital else None
    elif kind < 0.6 or path.suffix not in (".json", ".safetensors"):
        what = spoil_bytes(rng, path)
        refuse = True if vital and what.endswith(("empty", "random")) else None
        if "cut" in what and path.suffix == ".safetensors":
            refuse = True
    elif path.suffix == ".safetensors":
        what, refuse = spoil_tensors(rng, path)
    elif path.name == "tokenizer.json" and rng.random() < 0.5:
        what = odd_json(rng, path)
        refuse = True if vital else None
    else:
        what = odd_json(rng, path)
        refuse = True if vital and not what.endswith(("digits",)) else None
    if run == "plan" and path.suffix == ".safetensors":
        refuse = None  # shapes come from config.json
    line, stdin = with_model(run, name)
    return Case(f"{name}/{what}", line, refuse, stdin, several=run in ("train", "plan"),
                codes=(1,) if run == "plan" else ())  # fmt: skip


@generator(*(f"{name}/model-entries" for name in READERS))
def _model_entries(rng: random.Random, work: Path, run: str) -> Case:
    """Entries of a model folder's JSON that make no sense."""
    name = folder_for(rng, run)
    refuse: bool | None = None
    if rng.random() < 0.6:
        curated = [e for e in ENTRIES if place_of(work / name, e[0]).exists()]
        file, key, value, refuse = rng.choice(curated)
        path = place_of(work / name, file)
        tree = json.loads(path.read_text())
        node = tree
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        if value == "DELETE":
            node.pop(last, None)
        else:
            node[last] = value
        path.write_text(json.dumps(tree))
        what = f"{file}: {key} {value!r}"
        if file == "adapter_config.json" and name == "full":
            refuse = None
    else:
        names = sorted(p for p in (work / name).rglob("*.json"))
        path = rng.choice(names)
        what = spoil_json(rng, path)
    line, stdin = with_model(run, name)
    if run in ("train", "plan") and path.name in ("quietstar.json",):
        refuse = None
    return Case(f"{name}/{what}", line, refuse, stdin, several=run in ("train", "plan"),
                codes=(1,) if run == "plan" else ())  # fmt: skip


def _entries(file: str, key: str, values: tuple[Any, ...], refuse: bool | None) -> list[Any]:
    return [(file, key, value, refuse) for value in values]


QS = "quietstar.json"
ENTRIES: list[tuple[str, str, Any, bool | None]] = [
    *_entries("config.json", "vocab_size", (0, -5, 10**6, "x", None, 1.5), True),
    *_entries("config.json", "hidden_size", (0, 17, -16, "x", 32, None), True),
    *_entries("config.json", "num_hidden_layers", (-1, 3, 10**6, "x"), True),
    *_entries("config.json", "num_hidden_layers", (0, 1), True),
    *_entries("config.json", "num_attention_heads", (0, 3, -2, "x"), True),
    *_entries("config.json", "num_key_value_heads", (0, 3, -1, "x"), True),
    *_entries("config.json", "intermediate_size", (0, 23, "x"), True),
    *_entries("config.json", "max_position_embeddings", (0, -1, "x"), True),
    *_entries("config.json", "hidden_act", ("nosuch", 3, None), True),
    *_entries("config.json", "model_type", ("t5", "bert", "nosuch", 3, None, "DELETE"), True),
    *_entries("config.json", "head_dim", (-8, 0, "x", 7), True),
    *_entries("config.json", "quantization_config", ({"quant_method": "x"}, 3, []), True),
    *_entries("config.json", "architectures", (["T5Model"], 3, [], None), None),
    *_entries("config.json", "eos_token_id", (-1, 10**9, "x", [], None), None),
    *_entries("config.json", "dtype", ("nosuch", 3, "int8"), None),
    *_entries("config.json", "rope_parameters", ("x", {"rope_type": "nosuch"}, []), None),
    *_entries("generation_config.json", "max_length", (0, -1, "x"), None),
    *_entries("generation_config.json", "temperature", (-1, "x", 0), None),
    *_entries(QS, "format_version", (99, "x", None, 1.5, [], "DELETE"), True),
    *_entries(QS, "vocab_size", (0, -5, 10**6, None, "258", math.nan, "DELETE", 259, True), True),
    *_entries(QS, "pause_token_id", (-1, 10**6, "x", None, 258, "DELETE"), True),
    *_entries(QS, "texts_seen", (-1, "x", [], math.nan), True),
    *_entries(QS, "texts_seen", (None, 10**30), None),
    *_entries(QS, "dtype", ("nosuch", "int8", "__class__", None, 3, "nn", "float64x"), True),
    *_entries(QS, "thoughts", (None, [], "x", 3, "DELETE"), True),
    *_entries(QS, "thoughts.length", (0, -1, "x", 10**9, None, 1.5, math.nan), True),
    *_entries(QS, "thoughts.lookahead", (0, "x", -1), True),
    *_entries(QS, "thoughts.sampler", ("nosuch", 3, "os:system", ""), True),
    *_entries(QS, "thoughts.nosuch", (1,), True),
    *_entries(QS, "thoughts.temperature", (0, -1, "x", math.nan, math.inf), True),
    *_entries(QS, "mixing_head", (None, [], "DELETE"), True),
    *_entries(QS, "mixing_head.initial_weight", (-1, "x", 1, None, math.nan), True),
    *_entries(QS, "mixing_head.hidden_size", (0, -1, "x", 3, 10**9), None),  # the weights tell it
    *_entries(QS, "mixing_head.activation", ("nosuch", 3), True),
    *_entries(QS, "tuning.options", (None, [], "x", {"a": 1}, {"adapter_size": 10**9}), True),
    *_entries(QS, "tuning", (None, [], "DELETE"), True),
    *_entries(QS, "tuning.method", ("nosuch", 3, None, "prompt", "houlsby"), True),
    *_entries("adapter_config.json", "r", (0, -1, "x", 3, 10**9), True),
    *_entries("adapter_config.json", "target_modules", (3, "nosuch", []), True),
    *_entries("adapter_config.json", "peft_type", ("nosuch", 3, None, "PREFIX_TUNING"), True),
    *_entries("adapter_config.json", "lora_alpha", ("x", None, math.nan), True),
    *_entries("adapter_config.json", "megatron_core", ("os", 3), None),
    *_entries("adapter_config.json", "base_model_name_or_path", ("nosuch", 3, None), None),
    *_entries("tokenizer_config.json", "tokenizer_class", ("nosuch", 3), None),
    *_entries("tokenizer_config.json", "eos_token", (3, [], ESCAPES[0]), None),
    *_entries("tokenizer_config.json", "model_max_length", (0, -1, "x"), None),
    *_entries("tokenizer.json", "model", (None, 3, {}, {"type": "nosuch"}), True),
    *_entries("tokenizer.json", "added_tokens", (3, [{}], None), None),
]  # fmt: skip
LORA_ENTRIES = [
    *_entries(QS, "base_model_name_or_path", ("nosuch", 3, None, "", ESCAPES[0], "owner/nosuch",
                                              "../../../etc", "texts.jsonl", "DELETE"), True),
    *_entries(QS, "base_revision", (3, [], ESCAPES[0]), None),
]  # fmt: skip


@generator(*(f"{n}/base-model" for n in ("generate", "eval", "export", "inspect")))
def _base_model(rng: random.Random, work: Path, run: str) -> Case:
    """Adapters whose base is wrong, gone or another one."""
    path = work / "lora" / QS
    tree = json.loads(path.read_text())
    _, key, value, refuse = rng.choice(LORA_ENTRIES)
    if rng.random() < 0.3:
        base = rng.choice(("full", "lora", "run"))
        tree["base_model_name_or_path"], what, refuse = (
            base,
            f"base {base}",
            None if base == "full" else True,
        )
    else:
        what = f"{key} {value!r}"
        if value == "DELETE":
            tree.pop(key)
        else:
            tree[key] = value
    path.write_text(json.dumps(tree))
    line, stdin = with_model(run, "lora")
    return Case(f"lora/{QS}: {what}", line, refuse, stdin)
