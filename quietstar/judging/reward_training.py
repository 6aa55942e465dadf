"""Training a reward model on preferences with soft labels, by transformers' own trainer."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from quietstar.backbone.loading import quiet_transformers
from quietstar.data.tokenizer import check_unicode, load_tokenizer, padding_id
from quietstar.errors import UserError, reading, reason_of
from quietstar.evaluation.runner import settings_changes
from quietstar.evaluation.statistics import interval
from quietstar.evaluation.tasks import MAX_BYTES, parse_object, read_objects
from quietstar.judging.reward_model import RewardModel, encode_scored
from quietstar.system.files import file_kind, remove, whole_folder, write_json
from quietstar.system.inputs import open_input

RESULTS_FILE = "reward_model.json"
"""Settings and figures, next to the weights of a reward model."""


@dataclass(frozen=True)
class Preference:
    """Two candidates for a prompt, and how sure it is that the first is better.

    Attributes:
        prompt: What the candidates answer or continue.
        chosen: Candidate that is preferred.
        rejected: The other one.
        soft_label: Probability that ``chosen`` is preferred.
    """

    prompt: str
    chosen: str
    rejected: str
    soft_label: float


@dataclass(frozen=True)
class RewardTraining:
    """How a reward model is trained.

    Attributes:
        labels: Whether to learn the soft labels, or that whatever was chosen is better.
        epochs: Passes over the preferences.
        batch_size: Pairs of a step, over all processes.
        learning_rate: Highest learning rate; it falls to zero along a cosine.
        lora_r: Rank of LoRA on all linear layers; 0 trains all weights.
        max_length: Most tokens of a text, whose beginning is left out beyond.
        save_steps: Steps between checkpoints.
        seed: Seed of the order, of the new layer and of the adapters.
    """

    labels: Literal["soft", "hard"] = "soft"
    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 1e-4
    lora_r: int = 16
    max_length: int = 1024
    save_steps: int = 100
    seed: int = 0


def read_preferences(path: Path, option: str) -> list[Preference]:
    """Read preferences as ``quietstar judge`` writes them, one on each line.

    A line has ``prompt``, ``chosen``, ``rejected`` and perhaps ``soft_label`` (default 1); other
    fields are not read. Pairs of equal candidates teach nothing, and are left out.

    Raises:
        UserError: The file cannot be read, has no pairs, or a line is none.
    """
    preferences = []
    for record, _, where in read_objects(path, f"{option} ({path})"):
        preference = _preference(record, where)
        if preference.chosen != preference.rejected:
            preferences.append(preference)
    if not preferences:
        raise UserError(
            f"{option} ({path}): has no pair of different texts. Give a file of quietstar judge."
        )
    return preferences


def _preference(record: Mapping[str, Any], where: str) -> Preference:
    texts = [record.get(name) for name in ("prompt", "chosen", "rejected")]
    label = record.get("soft_label", 1.0)
    for name, text in zip(("prompt", "chosen", "rejected"), texts, strict=True):
        if name not in record:
            raise UserError(
                f"{where}: must have the texts prompt, chosen and rejected; it has "
                f"{', '.join(record)[:200] or 'nothing'}. Mend the line."
            )
        if not isinstance(text, str):
            raise UserError(
                f"{where}: {name} holds {type(text).__name__}, and must be plain text. Mend the "
                "line; of a conversation give the texts."
            )
    if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
        raise UserError(
            f"{where}: soft_label ({label!r}) must be a probability, from 0 to 1. Mend the line."
        )
    prompt, chosen, rejected = (check_unicode(str(text), where) for text in texts)
    return Preference(prompt, chosen, rejected, float(label))


def digest_of(preferences: Sequence[Preference]) -> str:
    """Hash preferences, so that others are known to be others."""
    rows = json.dumps([[x.prompt, x.chosen, x.rejected, x.soft_label] for x in preferences])
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def train_reward_model(
    base: str,
    out: Path,
    train: Sequence[Preference],
    held_out: Sequence[Preference],
    settings: RewardTraining,
    given: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Train a classifier with one logit on preferences, save and measure it.

    The loss is the cross-entropy of the soft label with the softmax of both scores (RLAIF, arXiv
    2309.00267, section 2.2.1). It goes on from the checkpoints next to ``out``, if there are any.

    Args:
        base: Folder or hub id of a causal LM, or of a classifier to go on with.
        out: Folder to write; transformers loads it as a sequence classifier.
        train: Preferences to learn.
        held_out: Preferences to measure by.
        settings: How to train.
        given: What else is written next to the settings.

    Returns:
        The figures of the preferences held out; None on other processes than the first.

    Raises:
        UserError: The base cannot be loaded, or training does not end in finite weights.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            raise UserError(
                "quietstar reward-model: trains on one process or by DDP, not under "
                f"{name.title()}. Launch it with accelerate launch --multi_gpu."
            )
    checkpoints = out.with_name(f"{out.name}.checkpoints")
    decisive = {**given, **vars(settings), "base": base}
    _check_same(checkpoints, decisive, out)
    tokenizer = load_tokenizer(base, trust_remote_code=None)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(len(train) / settings.batch_size) * settings.epochs // 10,
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        seed=settings.seed,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=False,
    )
    processes = arguments.world_size * max(1, arguments.n_gpu)
    if settings.batch_size % processes:
        raise UserError(
            f"--batch-size ({settings.batch_size}): must be a multiple of the {processes} "
            "processes. Set it so."
        )
    arguments.per_device_train_batch_size = settings.batch_size // processes
    model = _load(base, tokenizer, settings)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = min(settings.max_length, context or settings.max_length)
    rows: Any = [_encode(x, tokenizer, settings.labels, most) for x in train]
    collate: Any = _Collate(padding_id(tokenizer))
    trainer = _PreferenceTrainer(model, arguments, collate, rows)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar)
    trainer.accelerator.wait_for_everyone()  # all have looked at what was there
    if trainer.is_world_process_zero():
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(checkpoints / RESULTS_FILE, decisive)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)))
    if not trainer.is_world_process_zero():
        return None
    merged: Any = trainer.accelerator.unwrap_model(trainer.model)
    merged = merged.merge_and_unload() if settings.lora_r else merged
    if not all(p.isfinite().all() for p in merged.parameters()):
        raise UserError(
            f"--learning-rate ({settings.learning_rate}): the weights are not finite after "
            "training. Lower it."
        )
    figures = measure_agreement(RewardModel(merged.eval(), tokenizer), held_out)
    with whole_folder(out) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / RESULTS_FILE, {**decisive, **figures})
    remove(checkpoints)
    return figures


def _check_same(checkpoints: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Refuse checkpoints of other data, models or settings.

    Raises:
        UserError: They are, or the folder holds something else.
    """
    if file_kind(checkpoints) == "none":
        return
    remedy = f"Delete {checkpoints}, or give another --out."
    where = f"--out ({out}): its checkpoints"
    with reading(where, remedy), open_input(checkpoints / RESULTS_FILE) as file:
        previous = parse_object(file.read(MAX_BYTES))
    if changes := settings_changes(previous, settings):
        raise UserError(f"{where} are of another {changes}. {remedy}")


def _load(base: str, tokenizer: PreTrainedTokenizerBase, settings: RewardTraining) -> Any:
    torch.manual_seed(settings.seed)  # of the new layer
    try:
        with quiet_transformers():  # that the layer which scores is new
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                base, num_labels=1, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as problem:  # whatever files, formats and the hub may raise
        raise UserError(
            f"--model ({base}): cannot be loaded as a sequence classifier "
            f"({reason_of(problem)}). Give a model that transformers has a classifier for."
        ) from problem
    model.config.pad_token_id = padding_id(tokenizer)  # by which it finds the last token
    model.config.use_cache = False
    if not settings.lora_r:
        return model
    adapters = LoraConfig(
        r=settings.lora_r, lora_alpha=2 * settings.lora_r, target_modules="all-linear",
        task_type="SEQ_CLS",
    )  # fmt: skip
    return get_peft_model(model, adapters)


def measure_agreement(model: RewardModel, preferences: Sequence[Preference]) -> dict[str, Any]:
    """Measure a reward model on preferences.

    Returns:
        ``n``, ``n_clear`` (pairs with a preference), ``agreement`` (the share of these whose
        preferred candidate has the higher score) with ``agreement_ci95``, and ``cross_entropy``
        with the soft labels, nats.
    """
    prompts = [x.prompt for x in preferences]
    chosen = np.array(model.score(prompts, [x.chosen for x in preferences]))
    rejected = np.array(model.score(prompts, [x.rejected for x in preferences]))
    margin, label = (
        torch.tensor(chosen - rejected),
        torch.tensor([x.soft_label for x in preferences]),
    )
    is_clear = label != 0.5
    agrees = ((margin > 0) == (label > 0.5)).double().where(margin != 0, 0.5)[is_clear].numpy()
    return {
        "n": len(preferences),
        "n_clear": len(agrees),
        "agreement": float(agrees.mean()) if len(agrees) else None,
        "agreement_ci95": interval(agrees, 0) if len(agrees) else None,
        "cross_entropy": float(F.binary_cross_entropy_with_logits(margin, label.to(margin.dtype))),
    }


def _encode(
    preference: Preference,
    tokenizer: PreTrainedTokenizerBase,
    labels: Literal["soft", "hard"],
    most: int,
) -> dict[str, Any]:
    """Encode both texts of at most so many tokens, and the label to learn."""
    label = preference.soft_label
    return {
        "rows": [
            encode_scored(tokenizer, preference.prompt, text, most)
            for text in (preference.chosen, preference.rejected)
        ],
        "label": label if labels == "soft" else float(label >= 0.5),
    }


@dataclass(frozen=True)
class _Collate:
    """Puts pairs together: first all chosen texts, then all rejected ones, padded on the right."""

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [torch.tensor(row["rows"][n]) for n in (0, 1) for row in rows]
        ones = [torch.ones_like(text) for text in texts]
        return {
            "input_ids": pad_sequence(texts, True, self.pad),
            "attention_mask": pad_sequence(ones, True, 0),
            "soft_labels": torch.tensor([row["label"] for row in rows]),
        }


class _Bar(ProgressCallback):
    """A progress bar with the newest loss, in place of transformers' lines of figures."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Show the loss in the bar."""
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=logs["loss"])


class _PreferenceTrainer(Trainer):
    """transformers' trainer with the loss of soft labels."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Cross-entropy of the soft labels with the softmax of both scores."""
        label = inputs.pop("soft_labels")
        output = model(**inputs)
        chosen, rejected = output.logits[:, 0].float().chunk(2)
        loss = F.binary_cross_entropy_with_logits(chosen - rejected, label)
        return (loss, output) if return_outputs else loss
