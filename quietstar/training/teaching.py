"""A teacher's predictions on disk: written once by `quietstar teach`, read by many students.

A folder has ``teacher.json`` (what taught, and how) and parts, Arrow tables with a row for every
text: its key (a digest of its tokens), where the teacher thought, and its predictions as
`TeacherTargets` has them. Parts are whole or not there, so that an interrupted call goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, Sequence, Value
from pydantic import BaseModel
from torch import Tensor

from quietstar.attention.layout import NO_POSITION
from quietstar.data import Batch, TrainData
from quietstar.errors import UserError, reading
from quietstar.losses.distillation import TeacherTargets
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.system.files import file_kind, whole_folder, write_json

SETTINGS_FILE, PART, PARTS = "teacher.json", "part-{:06d}", "part-" + 6 * "[0-9]"
FORMAT_VERSION = 1
TEXTS_OF_A_PART = 1024
_CHECKED_STEPS = 32
_ARRAYS = {"positions": "int32", "tokens": "int32", "logprobs": "float32", "rest": "float32",
           "true_logprobs": "float32"}  # fmt: skip
_FEATURES = Features(
    {"key": Value("string")} | {name: Sequence(Value(kind)) for name, kind in _ARRAYS.items()}
)
_DAMAGED = "Write a new one by quietstar teach."


class _Settings(BaseModel):
    """What a student reads of ``teacher.json``."""

    format_version: int
    vocab_size: int
    top_tokens: int
    lookahead: int
    positions: str


def text_key(tokens: Tensor) -> str:
    """Return the digest of a text's tokens, by which its predictions are found."""
    content = np.ascontiguousarray(tokens.numpy(), dtype="<i4").tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


class TeacherFolder:
    """Reads predictions of a teacher by text.

    Args:
        folder: What `quietstar teach` wrote.
        name: Key or option that named it, to begin messages with.

    Attributes:
        settings: Content of ``teacher.json``.

    Raises:
        UserError: There is no such folder, or a damaged one.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._where, self._folder = f"{name} ({folder})", folder
        path = folder / SETTINGS_FILE
        if not path.is_file():
            raise UserError(
                f"{self._where}: holds no predictions of a teacher ({SETTINGS_FILE} is missing)."
                " Write them by quietstar teach --model DIR --out FOLDER."
            )
        with reading(self._where, _DAMAGED):
            self.settings = json.loads(path.read_text(encoding="utf-8"))
            version = _Settings.model_validate(self.settings).format_version
            if version > FORMAT_VERSION:
                raise UserError(
                    f"{self._where}: is of a newer format ({version}) than this quietstar reads "
                    f"({FORMAT_VERSION}). Upgrade quietstar."
                )
            datasets.disable_progress_bars()
            parts = sorted(folder.glob(PARTS))
            self.num_parts = len(parts)
            tables = [datasets.load_from_disk(str(part)) for part in parts]
            self._table = datasets.concatenate_datasets(tables) if tables else None  # pyright: ignore
            keys = [] if self._table is None else self._table["key"]
            self.rows = {key: index for index, key in enumerate(keys)}

    def check(self, data: TrainData, steps: range, batch_size: int) -> None:
        """Refuse a run before its first step if texts of these steps were not taught.

        It looks at up to `_CHECKED_STEPS` of them, evenly spaced back from the last: an interrupted
        teacher lacks the texts from some step on, and one of other texts lacks all.
        """
        apart = -(-len(steps) // _CHECKED_STEPS)
        for step in reversed(steps[::-1][::apart]):
            self._keys(data.batch(step, batch_size, range(batch_size)), step)

    def _keys(self, batch: Batch, step: int | None = None) -> list[str]:
        """Return the keys of a batch's texts, all of which the teacher has read."""
        texts = zip(batch.input_ids, batch.attention_mask, strict=True)
        keys = [text_key(ids[mask]) for ids, mask in texts]
        if missing := [n for n, key in enumerate(keys) if key not in self.rows]:
            where = "this step" if step is None else f"step {step + 1}"
            raise UserError(
                f"{self._where}: has predictions for {len(self.rows):,} texts, but for "
                f"{len(missing)} of the {len(keys)} of {where} there are none. Write them by "
                f"quietstar teach --out {self._folder} with the data section, seed and steps of "
                "this run; what is there already is kept."
            )
        return keys

    def find(self, batch: Batch) -> TeacherTargets:
        """Return the predictions for the texts of a batch; both are on the host.

        Raises:
            UserError: The teacher has not read one of them.
        """
        keys = self._keys(batch)
        assert self._table is not None, "a text was found"
        table = self._table.with_format("numpy")
        rows = [table[self.rows[key]] for key in keys]
        top, lookahead = self.settings["top_tokens"], self.settings["lookahead"]
        is_everywhere = self.settings["positions"] == "all"
        places = max(1, *(len(row["positions"]) for row in rows))  # where none thinks, one pads
        if is_everywhere:
            places = batch.input_ids.shape[1]
        shapes = {"tokens": (lookahead, top), "logprobs": (lookahead, top), "rest": (lookahead,),
                  "true_logprobs": (lookahead,)}  # fmt: skip
        arrays: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            whole = np.zeros((len(rows), places, *shape), _ARRAYS[name])
            for line, row in zip(whole, rows, strict=True):
                line[: len(row["positions"])] = row[name].reshape(-1, *shape)
            arrays[name] = torch.from_numpy(whole)
        arrays["tokens"] = arrays["tokens"].long()
        positions = None
        if not is_everywhere:
            positions = torch.full((len(rows), places), NO_POSITION)
            for line, row in zip(positions, rows, strict=True):
                line[: len(row["positions"])] = torch.from_numpy(row["positions"]).long()
        return TeacherTargets(positions, **arrays, num_tokens=torch.zeros((), dtype=torch.long))


def write_teacher(
    model: QuietStarForCausalLM,
    data: TrainData,
    steps: range,
    folder: Path,
    *,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    top: int,
    settings: dict[str, Any],
    advance: Callable[[], object] = lambda: None,
) -> tuple[int, int]:
    """Have a model that thinks predict the texts of a run, and keep what it predicts.

    Texts that are there already are passed over, so the same call goes on where one was ended.

    Returns:
        How many texts the folder holds, and how many of them are new.

    Args:
        model: Teacher, which thinks by its own settings.
        data: Texts of the run.
        steps: Steps of the run whose texts are taught.
        folder: Where to write.
        batch_size: Sequences of a step.
        micro_batch_size: Sequences at once.
        seed: Seed of the thoughts' noise, with the texts' places in the run.
        top: Most likely tokens that are kept of each prediction.
        settings: What else ``teacher.json`` says of the teacher; another call's must be the same.
        advance: Called after every micro-batch.

    Raises:
        UserError: The folder is of another teacher, or cannot be written.
    """
    thoughts = model.thoughts
    is_everywhere = thoughts.positions == "all"
    content = {
        "format_version": FORMAT_VERSION,
        "top_tokens": min(top, model.output_head.num_logits),
        "lookahead": 1 if is_everywhere else thoughts.lookahead,
        "positions": thoughts.positions,
        "seed": seed,
        **settings,
    }
    if file_kind(folder) == "none":
        folder.mkdir(parents=True)
        write_json(folder / SETTINGS_FILE, content)
    elif not (folder / SETTINGS_FILE).is_file():
        raise UserError(f"--out ({folder}): holds something else already. Give a new folder.")
    known = TeacherFolder(folder, "--out")
    changed = {key: known.settings.get(key) for key in content}
    if changed := {key: was for key, was in changed.items() if was != content[key]}:
        short = "top_tokens", "lookahead", "positions", "seed", "vocab_size"
        how = [f"{key} {was}, now {content[key]}" if key in short else key
               for key, was in changed.items()]  # fmt: skip
        raise UserError(
            f"--out ({folder}): was written with other settings ({'; '.join(how)}). Give a new"
            " folder."
        )
    seen, part = set(known.rows), known.num_parts
    rows: dict[str, list[Any]] = {name: [] for name in _FEATURES}

    def flush() -> None:
        nonlocal part, rows
        if rows["key"]:
            with whole_folder(folder / PART.format(part)) as new:
                Dataset.from_dict(rows, _FEATURES).save_to_disk(str(new))
            part, rows = part + 1, {name: [] for name in _FEATURES}

    try:
        for step in steps:
            for start in range(0, batch_size, micro_batch_size):
                some = range(start, min(start + micro_batch_size, batch_size))
                batch = data.batch(step, batch_size, some)
                texts = zip(batch.input_ids, batch.attention_mask, strict=True)
                keys = [text_key(ids[mask]) for ids, mask in texts]
                new = [n for n, key in enumerate(keys) if key not in seen and key not in keys[:n]]
                if new:
                    _teach(model, batch, new, keys, seed, top, rows)
                    seen.update(keys)
                advance()
                if len(rows["key"]) >= TEXTS_OF_A_PART:
                    flush()
    finally:  # an interrupt, too, keeps the texts that were taught
        flush()
    return len(seen), len(seen) - len(known.rows)


def _teach(
    model: QuietStarForCausalLM,
    batch: Batch,
    some: list[int],
    keys: list[str],
    seed: int,
    top: int,
    rows: dict[str, list[Any]],
) -> None:
    """Add the predictions for some texts of a batch to the rows of a part."""
    index, device = torch.tensor(some), model.device
    result = model.teach(
        batch.input_ids[index].to(device),
        batch.attention_mask[index].to(device),
        batch.labels[index].to(device),
        answers=batch.answers[index].to(device),
        marked=batch.marked[index].to(device),
        sample_ids=batch.sample_ids[index].to(device),
        seed=seed,
        top=top,
    )
    for n, text in enumerate(some):
        if result.positions is None:
            count = int(batch.attention_mask[text].sum())
            positions = torch.arange(count)
        else:
            positions = result.positions[n][result.positions[n] >= 0].cpu()
            count = len(positions)
        rows["key"].append(keys[text])
        rows["positions"].append(positions.numpy())
        for name in ("tokens", "logprobs", "rest", "true_logprobs"):
            rows[name].append(getattr(result, name)[n, :count].flatten().cpu().numpy())
