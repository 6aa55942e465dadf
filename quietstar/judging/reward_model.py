"""A reward model: a sequence classifier with one logit, as transformers loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from quietstar.backbone.devices import find_device
from quietstar.backbone.loading import quiet_transformers
from quietstar.data.tokenizer import load_tokenizer, padding_id
from quietstar.errors import UserError, reading, reason_of
from quietstar.evaluation.scoring import not_finite
from quietstar.evaluation.tasks import MAX_BYTES, parse_object
from quietstar.system.inputs import check_folder, open_input


class RewardModel:
    """Scores candidates by the only logit of a sequence classifier.

    It reads prompt and candidate as one text, without its beginning where that is too long.

    Args:
        model: A sequence classifier with one label.
        tokenizer: The tokenizer that the classifier was trained with.
        batch_size: Texts that are run at once.

    Raises:
        UserError: A classifier with several labels.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16
    ) -> None:
        if model.config.num_labels != 1:
            raise UserError(
                f"--model: this classifier has {model.config.num_labels} labels, and a reward model"
                " has one. Train one by quietstar reward-model."
            )
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.tokens_run = 0
        if model.config.pad_token_id is None:  # by which transformers finds the last token
            model.config.pad_token_id = padding_id(tokenizer)

    @classmethod
    def load(
        cls, name: str, *, dtype: str = "auto", device: str | None = None, batch_size: int = 16
    ) -> RewardModel:
        """Load one from a folder or the hub; code that comes with a model never runs.

        Raises:
            UserError: There is no such classifier, or one without the layer that scores.
        """
        check_folder(name)
        try:
            with quiet_transformers():  # what is missing is an error below
                loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                    name, dtype=dtype, trust_remote_code=False, output_loading_info=True
                )
        except Exception as problem:  # whatever files, formats and the hub may raise
            raise UserError(
                f"--model ({name}): is no sequence classifier ({reason_of(problem)}). Train one by "
                "quietstar reward-model."
            ) from problem
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"--model ({name}): has no weights of a reward model ({missing[0]} is missing). "
                "Train one by quietstar reward-model."
            )
        tokenizer = load_tokenizer(name, trust_remote_code=None)
        return cls(model.to(find_device(device)).eval(), tokenizer, batch_size=batch_size)

    @torch.no_grad()
    def score(self, prompts: Sequence[str], candidates: Sequence[str]) -> list[float]:
        """Score a candidate for every prompt; more is better.

        Raises:
            UserError: The model's logits are not finite.
        """
        rows = [
            encode_scored(self.tokenizer, prompt, candidate, self.context)
            for prompt, candidate in zip(prompts, candidates, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))
        scores = [0.0] * len(rows)
        pad = self.model.config.pad_token_id
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids = pad_sequence([torch.tensor(rows[n]) for n in batch], True, pad)
            mask = pad_sequence([torch.ones(len(rows[n]), dtype=torch.long) for n in batch], True)
            self.tokens_run += ids.numel()
            output: Any = self.model(
                input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device)
            )
            logits = output.logits[:, 0].float()
            if not (finite := logits.isfinite()).all():
                raise not_finite("reward model", "its logit", logits[~finite][0].item())
            for n, score in zip(batch, logits.tolist(), strict=True):
                scores[n] = score
        return scores

    @property
    def context(self) -> int | None:
        """Most tokens of a text; None if the model has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def is_classifier(name: str) -> bool:
    """Say whether a folder holds a sequence classifier, by its config."""
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        return False
    with reading(f"--model ({name})", "Give a folder that can be read."), open_input(path) as file:
        kinds = parse_object(file.read(MAX_BYTES)).get("architectures") or []
    return any(str(kind).endswith("ForSequenceClassification") for kind in kinds)


def encode_scored(
    tokenizer: PreTrainedTokenizerBase, prompt: str, candidate: str, most: int | None
) -> list[int]:
    """Encode prompt and candidate as one text that ends, without its beginning if it is too long.

    A text without tokens would have no last one to score.
    """
    ids: Any = tokenizer(prompt + candidate, verbose=False)["input_ids"]
    if isinstance(tokenizer.eos_token_id, int) and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    ids = ids or [padding_id(tokenizer)]
    return ids if most is None else ids[-most:]
