"""Keys of earlier versions and of other libraries: what to write, and how an old run is read."""

from collections.abc import Container, Iterable
from typing import Any

from quietstar.config.effects import is_on_hub
from quietstar.config.messages import shown_value
from quietstar.config.schema import GYM, SYNTHETIC, TUNING_OPTIONS

# fmt: off
_RENAMED = {
    "tuning": {"lora_rank": "lora_r", "lora_targets": "lora_target_modules"},
    "thoughts": {"source": "sampler", "share": "position_fraction"},
    "data": {"steps_field": "rationale_field"},
    "optim": {"lr": "learning_rate", "mixing_head_lr": "mixing_head_learning_rate",
              "embedding_lr": "embedding_learning_rate", "schedule": "lr_scheduler_type",
              "clip_norm": "max_grad_norm"},
    "training": {"steps": "max_steps", "batch_size": "global_batch_size",
                 "precision": "mixed_precision", "block_tokens": "learn_chunk_tokens",
                 "activation_checkpointing": "gradient_checkpointing", "compile": "torch_compile",
                 "eval_every": "eval_steps", "save_every": "save_steps",
                 "keep_checkpoints": "save_total_limit"},
    "logging": {"trackers": "report_to", "log_every": "logging_steps",
                "thought_every": "thought_steps"},
}
# fmt: on
RENAMED = {"training.objective": "loss.objective"} | {
    f"{section}.{old}": f"{section}.{new}"
    for section, names in _RENAMED.items()
    for old, new in names.items()
}
"""Keys of earlier versions, and their names of today."""

_OPTIONS = {
    "adapter_size": "adapter_size", "num_virtual_tokens": "num_virtual_tokens",
    "virtual_tokens": "num_virtual_tokens", "encoder_hidden_size": "encoder_hidden_size",
    "galore_rank": "rank", "galore_scale": "scale", "galore_update_proj_gap": "update_proj_gap",
    "galore_update_every": "update_proj_gap",
}  # fmt: skip
_BETAS = {"adam_beta1": 0, "adam_beta2": 1, "beta1": 0, "beta2": 1}
_TASK_SIZE = 10_000

REPLACED = (
    {f"tuning.{old}": f"tuning.options: {{{new}: VALUE}}" for old, new in _OPTIONS.items()}
    | {f"optim.{old}": "optim.betas: [0.9, 0.999]" for old in _BETAS}
    | {
        "data.size": "data.task_options: {size: NUMBER}",
        "data.split": "data.train: owner/name:SPLIT",
        "data.subset": "data.train: owner/name:SUBSET:train",
        "loss.length_weight": "loss.reward: thought + WEIGHT*length",
        "thoughts.position_count": "thoughts.position_fraction: NUMBER",
        "model.revision": "model.name_or_path: owner/name@REVISION",
    }
)
"""Keys of earlier versions, and what to write in their place."""

DROPPED: dict[str, tuple[Any, str]] = {
    "thoughts.scoring_model": (None, "entropy rules read the model's own predictions"),
    "mixing_head.activation": ("sigmoid", "mixing_head.initial_weight: 0 has no sigmoid"),
    "mixing_head.hidden_size": (None, "its layers are as wide as the model"),
    "thoughts.schedule_type": ("stepped", "write the steps into thoughts.schedule"),
    "thoughts.schedule_min_gain": (None, "a schedule goes by steps"),
    "loss.length_weight": (0.0, REPLACED["loss.length_weight"]),
    "loss.policy_temperature": (None, "it is 3.0 with loss.estimator: paper, else"
                                " thoughts.temperature"),
    "loss.top_tokens": (64, "64 are learned; quietstar teach --top keeps others"),
    "loss.form": ("paper", "the published form is left"),
    "data.messages_field": ("messages", "name the field messages"),
    "data.short_texts": ("pad", "short texts are padded"),
    "optim.adam_epsilon": (1e-8, "it is 1e-8"),
    "optim.eps": (1e-8, "it is 1e-8"),
    "loss.draft_weight": (0.0, "the first thought token is not trained toward the next one"),
    "training.overwrite": (False, "give --overwrite"),
    "training.overwrite_output_dir": (False, "give --overwrite"),
    "judge.stop": ([], "a continuation has judge.continuation tokens"),
    "judge.device": (None, "the judge is where the model trains"),
    "judge.cache": (None, "verdicts are not kept for other runs"),
    "judge.chat": ("auto", "a judge with a chat template is asked through it"),
    "judge.batch_size": (16, "it is 16"),
    "judge.dtype": ("auto", "it is that of the judge's files"),
    "judge.temperature": (1.0, "it is 1"),
    "logging.run_name": (None, "the run has the name of its folder"),
}  # fmt: skip
"""Keys of earlier versions that are gone, with the value that runs now have, and why."""


_FOREIGN = {
    "training.max_steps": "num_train_epochs num_epochs epochs",
    "training.global_batch_size": "gradient_accumulation_steps generation_batch_size"
    " steps_per_generation train_batch_size per_gpu_batch_size",
    "training.micro_batch_size": "per_device_train_batch_size per_device_eval_batch_size",
    "training.mixed_precision": "bf16 fp16",
    "training.inner_epochs": "num_iterations num_ppo_epochs",
    "training.eval_steps": "eval_strategy evaluation_strategy",
    "training.save_steps": "save_strategy",
    "optim.warmup_steps": "warmup_ratio",
    "thoughts.num_thoughts": "num_generations",
    "thoughts.length": "max_completion_length max_new_tokens",
    "data.seq_len": "max_seq_length max_length max_prompt_length block_size",
    "data.train": "train_file train_dataset dataset dataset_name",
    "data.eval": "validation_file eval_dataset",
    "loss.reward": "reward_func reward_funcs",
    "loss.kl_weight": "beta kl_coef",
    "loss.clip_low": "epsilon cliprange",
    "loss.clip_high": "epsilon_high",
    "loss.scaling": "scale_rewards",
    "loss.token_weighting": "loss_type",
    "tuning.method": "use_peft load_in_4bit",
    "tuning.lora_target_modules": "target_modules",
    "model.dtype": "torch_dtype",
    "resume": "resume_from_checkpoint",
}
FOREIGN = {name: key for key, names in _FOREIGN.items() for name in names.split()}
"""Names of transformers, TRL and PEFT, and the key that decides the same here."""
_UNLIKE = {
    "training.max_steps": "runs are counted in steps of training.global_batch_size texts",
    "training.global_batch_size": "all texts of a step, in as many passes of at most"
    " training.micro_batch_size as it takes",
    "training.mixed_precision": "bf16 or no; there is no fp16",
    "optim.warmup_steps": "a number of steps",
    "training.eval_steps": "0 evaluates only at start and end",
    "training.save_steps": "0 saves only the final model",
}
"""What a foreign name's key means, where its name alone does not tell."""


def explained(name: str, known: Container[str], dashes: str, kind: str) -> str | None:
    """Say what to write in place of a key of an earlier version or of another library, if it is."""
    if name in RENAMED:
        return f"renamed; write {dashes}{RENAMED[name]}"
    if name in REPLACED:
        return f"is gone; write {REPLACED[name]}"
    if name in DROPPED:
        return f"is gone: {DROPPED[name][1]}; leave it out"
    key = FOREIGN.get(name.rpartition(".")[2])
    if key is not None and key in known:
        note = f" ({_UNLIKE[key]})" if key in _UNLIKE else ""
        return f"unknown {kind}; here it is {dashes}{key}{note}"
    return None


def migrate(trees: Iterable[Any]) -> tuple[dict[str, str], list[str]]:
    """Give the sections of an earlier version today's keys, in place.

    Args:
        trees: Sections by name: of a run, and of each of its stages; or of a saved model.

    Returns:
        Old and new names; and what cannot be kept, a line each.
    """
    renamed: dict[str, str] = {}
    lost: list[str] = []
    trees = [tree for tree in trees if isinstance(tree, dict)]
    for tree in trees:
        for section, body in [*tree.items()]:
            for name in [*body] if isinstance(body, dict) else []:
                key = f"{section}.{name}"
                if key in RENAMED:
                    renamed[key] = RENAMED[key]
                    new_section, _, new_name = RENAMED[key].partition(".")
                    target = tree[new_section] = tree.get(new_section) or {}
                    if isinstance(target, dict):
                        target[new_name] = body.pop(name)
                elif key in DROPPED:
                    value, (now, reason) = body.pop(name), DROPPED[key]
                    if value != now and not _is_implied(key, value, body):
                        lost.append(f"{key} ({shown_value(value)}): is gone; {reason}")
        model = tree.get("model")
        if isinstance(model, dict) and (revision := model.pop("revision", None)):
            renamed["model.revision"] = "model.name_or_path"
            for name in ("name_or_path", "tokenizer"):
                value = model.get(name)
                if isinstance(value, str) and value != "bytes" and is_on_hub(value):
                    model[name] = f"{value}@{revision}"
        _move_options(tree.get("tuning"), renamed)
        _move_betas(tree.get("optim"), renamed)
        thoughts = tree.get("thoughts")
        if isinstance(thoughts, dict):
            if thoughts.get("sampler") in ("sampled", "generate"):  # which drew the same thoughts
                thoughts["sampler"] = "rollout"
            if (count := thoughts.pop("position_count", None)) is not None:
                renamed["thoughts.position_count"] = "thoughts.position_fraction"
                # The smallest share is one position.
                thoughts["position_fraction"] = 1e-4 if count == 1 else count
    parts = [tree.get("data") for tree in trees]
    _move_sources([part if isinstance(part, dict) else {} for part in parts], renamed)
    return renamed, [*dict.fromkeys(lost)]


def _is_implied(key: str, value: Any, body: dict[str, Any]) -> bool:
    """Tell whether other keys, or the weights, say what a key that is gone said."""
    if key == "mixing_head.activation":
        return value == "none"
    if key == "loss.policy_temperature":
        is_read = body.get("estimator") == "paper"
        return value == 3 and (is_read or body.get("objective") == "fast_rl")
    return key == "mixing_head.hidden_size" or key.startswith("training.overwrite")


def _move_options(tuning: Any, renamed: dict[str, str]) -> None:
    if not isinstance(tuning, dict):
        return
    old = {name: tuning.pop(name) for name in _OPTIONS if name in tuning}
    if not old:
        return
    kind = TUNING_OPTIONS.get(str(tuning.get("method")))
    known = {} if kind is None else kind.model_fields
    tuning["options"] = {_OPTIONS[k]: v for k, v in old.items() if _OPTIONS[k] in known}
    renamed |= {f"tuning.{k}": "tuning.options" for k in old if _OPTIONS[k] in known}


def _move_betas(optim: Any, renamed: dict[str, str]) -> None:
    if not isinstance(optim, dict):
        return
    old = {name: optim.pop(name) for name in _BETAS if name in optim}
    if old:
        optim["betas"] = [0.9, 0.999]
    for name, value in old.items():
        optim["betas"][_BETAS[name]] = value
        renamed[f"optim.{name}"] = "optim.betas"


def _move_sources(parts: list[dict[str, Any]], renamed: dict[str, str]) -> None:
    """Move split and subset into the names of data, and the size of a task to its options."""
    base = dict(parts[0]) if parts else {}
    for part in parts:
        merged = base | part
        generated = str(merged.get("train")).startswith((GYM, SYNTHETIC))
        options = merged.get("task_options") or {}
        is_mapping = isinstance(options, dict)
        if generated and is_mapping and merged.get("size", _TASK_SIZE) != _TASK_SIZE:
            part["task_options"] = {"size": merged["size"]} | options
            renamed["data.size"] = "data.task_options"
        subset, split = merged.get("subset"), merged.get("split") or "train"
        for name in ("train", "eval"):
            value = part.get(name)
            if (subset or split != "train") and isinstance(value, str) and _is_hub_set(value):
                hub_id, _, own_split = value.partition(":")
                where = [str(subset)] if subset else []
                part[name] = ":".join([hub_id, *where, own_split or str(split)])
                renamed["data.split"] = "data.train"
        if generated and part.get("rationale_field") == "steps":
            part["rationale_field"] = "rationale"  # generated problems called their reasoning so
    for part in parts:
        for name in ("size", "split", "subset"):
            part.pop(name, None)


def _is_hub_set(name: str) -> bool:
    return is_on_hub(name) and not name.startswith((GYM, SYNTHETIC)) and name.count(":") < 2
